"""Shared by the recipes of the paper: published settings, ours in their place, a miniature.

R. Lee et al., "FedL2P: Federated Learning to Personalize", NeurIPS 2023, arXiv 2310.02420; the
numbers are those of the configuration files of its public code, https://github.com/royson/fedl2p.
"""

from __future__ import annotations

import dataclasses

from fedl2p.core.settings import DataParts, InnerLoop, MetaNetsConfig
from fedl2p.methods.base.settings import Baselines, Grid, LocalTraining, MetaLearning, Settings
from fedl2p.recipes import _ours
from fedl2p.study.settings import Source, Study

ALPHAS = (1000.0, 1.0, 0.5, 0.1)
"""The label skews of the paper's tables, from none to strong."""

METHODS = (
    *("fedavg", "finetuning-global", "finetuning-client", "local"),
    *("fedbabu", "perfedavg", "fedl2p"),
)
"""Rows of a table whose global model is pre-trained by FedAvg.

Without the grid searches and l2p, which take many times as long.
"""


def settings(
    *,
    rate: float,
    epochs: int,
    turns: float,
    local: LocalTraining | None = None,
    final: DataParts = "train",
) -> Settings:
    """Return the published settings of the methods.

    Parameters
    ----------
    rate
        Inner learning rate: of plain fine-tuning, and where FedL2P's base rates start.
    epochs
        Of the inner loop.
    turns
        Rounds of learning per client, on average: rounds x clients per round / clients. l2p takes
        that many times the outer epochs as outer steps, one batch of validation data each.
    local
        Local training of a round; None for one epoch at rate 0.1.
    final
        What the last fine-tuning reads.
    """
    meta = MetaLearning.published(base_rate=rate)
    return Settings(
        finetune=InnerLoop(epochs=epochs, batch_size=32, statistics="published", final=final),
        finetune_rate=rate,
        local=local or LocalTraining(epochs=1, batch_size=32, rate=0.1),
        meta=meta,
        alone_steps=max(1, round(turns * meta.outer_epochs)),
        alone_optimizer="sgd",
        alone_rate=None,
        baselines=Baselines(rate=rate),
    )


def ours(published: Study) -> Study:
    """Return the study with our settings of FedL2P; data, global model and baselines stay.

    Meta-nets, hypergradient, server optimizer and its schedule, and early stopping are those of the
    digits_sensors recipe; learned rates start at the published rate.
    """
    theirs, learn = published.settings, published.learn
    turns = theirs.alone_steps / theirs.meta.outer_epochs
    return dataclasses.replace(
        published,
        learn=_ours.learning(rounds=learn.rounds, clients_per_round=learn.clients_per_round),
        settings=dataclasses.replace(
            theirs,
            finetune=dataclasses.replace(
                theirs.finetune,
                statistics=InnerLoop.statistics,
                # needs validation data that the final fine-tuning does not train on
                early_stopping=theirs.finetune.final == "train",
            ),
            meta=MetaLearning(nets=MetaNetsConfig(base_rate=theirs.finetune_rate)),
            alone_steps=max(1, round(turns)),
            alone_optimizer=Settings.alone_optimizer,
            alone_rate=Settings.alone_rate,
        ),
    )


def miniature(study: Study, data: Source) -> Study:
    """Return the study with the same stages and methods on less data, in few short rounds.

    The model downsamples its input first.
    """
    full = study.settings
    return dataclasses.replace(
        study,
        data=data,
        model=f"{study.model}_coarse",
        pretrain=dataclasses.replace(study.pretrain, rounds=2, clients_per_round=2),
        learn=dataclasses.replace(study.learn, rounds=2, clients_per_round=2),
        settings=dataclasses.replace(
            full,
            finetune=dataclasses.replace(full.finetune, epochs=1, batch_size=16),
            local_epochs=1,
            meta=dataclasses.replace(full.meta, outer_epochs=1),
            grid=Grid(mixes=(0.0, 1.0), rates=(0.001, 0.01)),
            alone_steps=1,
        ),
    )
