"""Handwritten digits of six kinds of clients: sensor, few classes, few images, codes, noise."""

from __future__ import annotations

from fedl2p.core.settings import InnerLoop, MetaNetsConfig
from fedl2p.data.kinds import Kinds
from fedl2p.federation.settings import Rounds
from fedl2p.methods.base.settings import LocalTraining, MetaLearning, Settings
from fedl2p.recipes import _ours
from fedl2p.recipes.kinds import variant
from fedl2p.recipes.registry import recipe
from fedl2p.study.settings import METHODS, Study

SLOW = ("local", "gridsearch", "l2p")
"""Baselines that the recipe leaves out unless they are asked for."""


@recipe
def digits(*, early_stopping: bool = False, smoke: bool = False) -> Study:
    """Return the study; the whole job takes less than two minutes on two cores.

    Of the 1,797 images 500 are clean ones for the global model; the clients draw from pools of 519
    for training, 259 for validation and 519 for test.

    Grid search, L2P and local training on every client alone take longer than all the rest;
    ``--methods all`` has them too.

    Parameters
    ----------
    early_stopping
        Whether fine-tuning reads the training part alone and stops early by the validation part;
        otherwise it reads all labelled images.
    smoke
        Whether to shrink the study to seconds, to try it out.
    """
    study = Study(
        data=Kinds(
            dataset="digits",
            seen=60,
            unseen=36,
            sizes=(6, 12, 25, 50, 100),
            test=100,
            severity=(0.3, 1.0),
            clean=500,
        ),
        pretrain=Rounds(rounds=40, keep="last"),  # each is an epoch of the clean images
        methods=tuple(name for name in METHODS if name not in SLOW),
        learn=_ours.learning(rounds=30, clients_per_round=30),
        settings=Settings(
            finetune=InnerLoop(epochs=5, final="train+validation"),
            # larger rates than 0.1 destroy the models of clients with a handful of images
            meta=MetaLearning(nets=MetaNetsConfig(base_rate=0.05, initial_mix=0.5, max_rate=0.1)),
            local=LocalTraining(rate=0.1),
            alone_steps=15,  # a client takes part in 30 x 30 / 60 rounds
        ),
    )
    small = Kinds(dataset="digits", seen=6, unseen=6, sizes=(16,), test=30, clean=300)
    return variant(
        study,
        early_stopping=early_stopping,
        smoke=small if smoke else None,
    )
