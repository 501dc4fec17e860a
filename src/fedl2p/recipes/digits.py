"""Real handwritten digits, 40 seen and 20 unseen clients with label skew and a sensor each."""

from __future__ import annotations

import dataclasses

from fedl2p.core.settings import InnerLoop, MetaNetsConfig
from fedl2p.data.digits import Digits
from fedl2p.federation.settings import Rounds
from fedl2p.methods.base.settings import LocalTraining, MetaLearning, Settings
from fedl2p.recipes.registry import recipe
from fedl2p.study.settings import Study


@recipe
def digits(*, as_published: bool = False) -> Study:
    """Return the study; the whole job takes minutes on two cores.

    Parameters
    ----------
    as_published
        Whether FedL2P learns with the paper's settings: form and initialisation of the meta-nets,
        hypergradient, SGD on the client, plain averaging, the round with the lowest validation
        loss, running statistics that start at 0 and 1, 15 epochs, inner learning rate 0.001. Data,
        global model and clients per round stay. Otherwise our settings.
    """
    ours = Study(
        data=Digits(),
        # The last state: clients' sensors differ so much that the loss of an averaged model,
        # measured with averaged norm statistics, does not tell which round fine-tunes best.
        pretrain=Rounds(rounds=150, clients_per_round=20, keep="last"),
        # Clients send clipped hypergradients; the server takes one Adam step on their mean. Its
        # rate fades out, so that the last state needs neither selection nor averaging.
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
    if not as_published:
        return ours
    return dataclasses.replace(
        ours,
        learn=Rounds(rounds=30, clients_per_round=20),
        settings=dataclasses.replace(
            ours.settings,
            finetune=InnerLoop(epochs=15, statistics="published"),
            meta=MetaLearning.published(base_rate=1e-3),
            # as many outer steps as a client takes in its rounds: 2 batches, 3 passes, 15 rounds
            alone_steps=90,
            alone_optimizer="sgd",
            alone_rate=None,
        ),
    )
