"""Handwritten digits where everybody has a sensor: 40 seen and 20 unseen clients, label skew."""

from __future__ import annotations

from fedl2p.core.settings import InnerLoop, MetaNetsConfig
from fedl2p.data.digits import Digits
from fedl2p.federation.settings import Rounds
from fedl2p.methods.base.settings import LocalTraining, MetaLearning, Settings
from fedl2p.recipes import _ours
from fedl2p.recipes.registry import recipe
from fedl2p.study.settings import Study


@recipe
def digits_sensors(*, as_published: bool = False) -> Study:
    """Return the study; the whole job takes minutes on two cores.

    Parameters
    ----------
    as_published
        Whether FedL2P learns with the paper's settings; otherwise with ours.
    """
    study = Study(
        data=Digits(),
        # The last state: clients' sensors differ so much that the loss of an averaged model,
        # measured with averaged norm statistics, does not tell which round fine-tunes best.
        pretrain=Rounds(rounds=150, clients_per_round=20, keep="last"),
        learn=_ours.learning(rounds=30, clients_per_round=20),
        settings=Settings(
            finetune=InnerLoop(epochs=5, early_stopping=True),
            # in the middle of what the grid's winners use; rates beyond 0.3 make clients diverge
            meta=MetaLearning(nets=MetaNetsConfig(base_rate=0.1)),
            local=LocalTraining(rate=0.3),
            alone_steps=15,  # a client takes part in 30 x 20 / 40 rounds
        ),
    )
    return _ours.published(study, validation_batches=2) if as_published else study
