"""Fashion-MNIST as the paper has CIFAR-10: 1,000 clients of 50 images, label skew --data.alpha."""

from __future__ import annotations

import dataclasses

from fedl2p.core.settings import InnerLoop, MetaNetsConfig
from fedl2p.data.fashion import Fashion
from fedl2p.federation.settings import Rounds
from fedl2p.methods.base.settings import Grid, LocalTraining, MetaLearning, Settings
from fedl2p.recipes import _ours
from fedl2p.recipes.registry import recipe
from fedl2p.study.settings import Source, Study

METHODS = ("fedavg", "finetuning-global", "finetuning-client", "bestfixed", "local", "fedl2p")


@recipe
def fashion(alpha: float = 0.1, *, as_published: bool = False, smoke: bool = False) -> Study:
    """Return the study.

    Parameters
    ----------
    alpha
        Concentration of the Dirichlet distribution of clients' classes; published are 1000, 1.0,
        0.5 and 0.1.
    as_published
        Whether FedL2P learns with the paper's settings; otherwise with ours.
    smoke
        Whether to shrink the study to seconds, to try it out.
    """
    study = Study(
        data=Fashion(seen=1000, alpha=alpha, train=40, validation=10, test=10),
        model="fedl2p.models:small_strided",
        methods=METHODS,
        pretrain=Rounds(rounds=500, clients_per_round=10, keep="last"),
        learn=_ours.learning(rounds=30, clients_per_round=100),
        settings=Settings(
            finetune=InnerLoop(epochs=5, final="train+validation"),
            meta=MetaLearning(nets=MetaNetsConfig(base_rate=0.05, initial_mix=0.5)),
            local=LocalTraining(
                rate=0.1, decay=0.1, decay_rounds=(250, 375), reads="train+validation"
            ),
            alone_steps=3,  # a client takes part in 30 x 100 / 1000 rounds
        ),
    )
    if as_published:
        study = _ours.published(study, validation_batches=1)
    return miniature(study, Fashion(seen=6, alpha=alpha)) if smoke else study


def miniature(study: Study, data: Source) -> Study:
    """Return the study with the same stages and methods on less data, in few short rounds."""
    full = study.settings
    return dataclasses.replace(
        study,
        data=data,
        pretrain=dataclasses.replace(study.pretrain, rounds=2, clients_per_round=4),
        learn=dataclasses.replace(study.learn, rounds=2, clients_per_round=4),
        settings=dataclasses.replace(
            full,
            finetune=dataclasses.replace(full.finetune, epochs=2),
            local_epochs=2,
            alone_steps=2,
            grid=Grid(mixes=(0.0, 1.0), rates=(0.01, 0.1)),
        ),
    )
