"""The paper's CIFAR-10-C: the CIFAR-10 model, 25 clients for each of ten corruptions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fedl2p.data.cifar10c import CORRUPTIONS, Cifar10C
from fedl2p.federation.settings import Rounds
from fedl2p.recipes.paper import settings as paper
from fedl2p.recipes.paper.cifar10 import cifar10
from fedl2p.recipes.registry import recipe
from fedl2p.runs import layout
from fedl2p.study.settings import Study


@recipe
def cifar10c(alpha: float = 0.1, *, as_published: bool = False, smoke: bool = False) -> Study:
    """Return the study. Its global model is that of CIFAR-10 under the same label skew.

    Parameters
    ----------
    alpha
        Concentration of the Dirichlet distribution of clients' classes.
    as_published
        Whether FedL2P learns with the paper's settings; otherwise with ours.
    smoke
        Whether to shrink the study to seconds, to try it out: two corruptions.
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
        settings=paper.settings(rate=1e-3, epochs=15, turns=500 * 25 / 250),
    )
    study = published if as_published else paper.ours(published)
    if not smoke:
        return study
    return paper.miniature(study, Cifar10C(alpha=alpha, corruptions=CORRUPTIONS[:2], seen=2))


def global_model(alpha: float = 0.1, *, as_published: bool = False, smoke: bool = False) -> Study:
    """Return the study that trains the global model and nothing else.

    Arguments are those of :func:`cifar10c`; the model is the same with either settings.
    """
    return dataclasses.replace(cifar10(alpha, smoke=smoke), methods=("fedavg",))


def _model(smoke: bool) -> str:
    return "cifar10_smoke" if smoke else "cifar10"
