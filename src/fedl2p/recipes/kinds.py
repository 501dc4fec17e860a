"""Fashion-MNIST of six kinds of clients: sensor, few classes, few images, codes, noise."""

from __future__ import annotations

import dataclasses

from fedl2p.core.settings import InnerLoop, MetaNetsConfig
from fedl2p.data.kinds import Kinds
from fedl2p.federation.settings import Rounds
from fedl2p.methods.base.settings import Grid, LocalTraining, MetaLearning, Settings
from fedl2p.recipes import _ours
from fedl2p.recipes.registry import recipe
from fedl2p.study.settings import Study


@recipe
def kinds(*, early_stopping: bool = False, smoke: bool = False) -> Study:
    """Return the study; the whole job takes minutes on two cores.

    Parameters
    ----------
    early_stopping
        Whether fine-tuning reads the training part alone and stops early by the validation part;
        otherwise it reads all labelled images.
    smoke
        Whether to shrink the study to seconds, to try it out.
    """
    study = Study(
        data=Kinds(),
        model="fedl2p.models:small_strided",
        pretrain=Rounds(rounds=8, keep="last"),  # each is an epoch of the clean images
        learn=_ours.learning(rounds=30, clients_per_round=30),
        settings=Settings(
            finetune=InnerLoop(epochs=5, final="train+validation"),
            # larger rates than 0.1 destroy the models of clients with a handful of images
            meta=MetaLearning(nets=MetaNetsConfig(base_rate=0.05, initial_mix=0.5, max_rate=0.1)),
            local=LocalTraining(rate=0.1, end_rate=0.01, end_round=8),
            alone_steps=8,  # a client takes part in 30 x 30 / 120 rounds
        ),
    )
    return variant(
        study,
        early_stopping=early_stopping,
        smoke=Kinds(seen=6, unseen=6, sizes=(16,), test=30, clean=1000) if smoke else None,
    )


def variant(study: Study, *, early_stopping: bool, smoke: Kinds | None) -> Study:
    """Return a variant of a study of kinds; ``smoke`` is its data in miniature."""
    if early_stopping:
        finetune = InnerLoop(epochs=study.settings.finetune.epochs, early_stopping=True)
        study = dataclasses.replace(
            study, settings=dataclasses.replace(study.settings, finetune=finetune)
        )
    if smoke is None:
        return study
    full = study.settings
    return dataclasses.replace(
        study,
        data=smoke,
        pretrain=dataclasses.replace(study.pretrain, rounds=2),
        learn=dataclasses.replace(study.learn, rounds=2, clients_per_round=6),
        settings=dataclasses.replace(
            full,
            finetune=dataclasses.replace(full.finetune, epochs=2),
            local_epochs=2,
            alone_steps=2,
            grid=Grid(mixes=(0.0, 1.0), rates=(0.01, 0.1)),
        ),
    )
