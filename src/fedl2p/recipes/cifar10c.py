"""The paper's CIFAR-10-C: the CIFAR-10 model, 25 clients for each of ten corruptions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fedl2p.data.cifar10c import CORRUPTIONS, Cifar10C
from fedl2p.federation.settings import Rounds
from fedl2p.recipes import _paper, cifar10
from fedl2p.runs import layout
from fedl2p.study.settings import Study

CELLS = cifar10.CELLS
"""The columns of the paper's table, and what the recipe's function takes for each."""


def recipe(alpha: float = 0.1, *, as_published: bool = False, smoke: bool = False) -> Study:
    """Return the study; its global model is that of CIFAR-10 under the same label skew.

    Parameters
    ----------
    alpha
        Concentration of the Dirichlet distribution that clients' classes come from.
    as_published
        Whether FedL2P learns as its authors had it; otherwise our way.
    smoke
        Whether to make it small, to try it out: two corruptions.
    """
    folder = Path("runs", f"cifar10-alpha-{alpha:g}")
    published = Study(
        data=Cifar10C(seen=25, alpha=alpha, severity=2),
        model="fedl2p.models:resnet18_cifar",
        pretrained=folder / layout.GLOBAL_MODEL,
        pretrained_by=(
            f"fedl2p run {_model(smoke)} --data.alpha {alpha:g} --methods fedavg --out {folder}"
        ),
        methods=("fedavg", "finetuning-global", "finetuning-client", "local", "fedl2p"),
        pretrain=Rounds(rounds=500, clients_per_round=10, keep="last"),
        learn=Rounds(rounds=500, clients_per_round=25, patience=100),
        settings=_paper.settings(rate=1e-3, epochs=15, turns=500 * 25 / 250),
    )
    study = published if as_published else _paper.ours(published)
    if not smoke:
        return study
    return _paper.miniature(study, Cifar10C(alpha=alpha, corruptions=CORRUPTIONS[:2], seen=2))


def global_model(alpha: float = 0.1, *, as_published: bool = False, smoke: bool = False) -> Study:
    """Return the study that trains the global model, which is the same either way, and no more."""
    return dataclasses.replace(
        cifar10.recipe(alpha, smoke=smoke), recipe=_model(smoke), methods=("fedavg",)
    )


def _model(smoke: bool) -> str:
    return "cifar10_smoke" if smoke else "cifar10"
