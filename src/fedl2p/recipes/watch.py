"""Smartwatch exercises, a client per arm: 7 people are seen, 3 unseen; 7 exercises."""

from __future__ import annotations

from fedl2p.core.settings import InnerLoop, MetaNetsConfig
from fedl2p.data.watch import Watch
from fedl2p.federation.settings import Rounds
from fedl2p.methods.base.settings import LocalTraining, MetaLearning, Settings
from fedl2p.recipes import _ours
from fedl2p.recipes.fashion import miniature
from fedl2p.recipes.registry import recipe
from fedl2p.study.settings import Study


@recipe
def watch(*, smoke: bool = False) -> Study:
    """Return the study.

    Parameters
    ----------
    smoke
        Whether to shrink the study to seconds, to try it out.
    """
    study = Study(
        data=Watch(),
        model="fedl2p.models:small_strided",
        pretrain=Rounds(rounds=60, clients_per_round=7, keep="last"),
        learn=_ours.learning(rounds=30, clients_per_round=14),
        settings=Settings(
            finetune=InnerLoop(epochs=5, final="train+validation"),
            meta=MetaLearning(nets=MetaNetsConfig(base_rate=0.05, initial_mix=0.5)),
            local=LocalTraining(rate=0.1),
            alone_steps=30,  # a client takes part in every round
        ),
    )
    return miniature(study, Watch()) if smoke else study
