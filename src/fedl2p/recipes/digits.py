"""Real handwritten digits, 40 seen and 20 unseen clients with label skew and a sensor each."""

from __future__ import annotations

from fedl2p.core.settings import InnerLoop, MetaNetsConfig
from fedl2p.data.digits import Digits
from fedl2p.federation.settings import Rounds
from fedl2p.methods.base.settings import LocalTraining, MetaLearning, Settings
from fedl2p.study.settings import Study


def recipe() -> Study:
    """Return the embedded default: the whole job in minutes on two cores, without a download."""
    return Study(
        data=Digits(),
        # The last state: the loss of an averaged model, measured with averaged norm statistics on
        # clients of such different sensors, does not say which round fine-tunes best.
        pretrain=Rounds(rounds=150, clients_per_round=20, keep="last"),
        # Clients send clipped hypergradients; the server takes one Adam step on their mean. Its
        # rate fades out, so that the last state needs neither luck nor averaging.
        learn=Rounds(
            rounds=30,
            clients_per_round=20,
            strategy="fedadam",
            server_rate=0.0075,
            server_schedule="cosine",
            server_tau=1e-8,
            keep="last",
        ),
        settings=Settings(
            finetune=InnerLoop(epochs=5, early_stopping=True),
            # in the middle of what the grid's winners use; rates beyond 0.3 make clients diverge
            meta=MetaLearning(nets=MetaNetsConfig(base_rate=0.1)),
            local=LocalTraining(rate=0.3),
            alone_steps=15,  # a client takes part in 30 x 20 / 40 rounds
        ),
    )
