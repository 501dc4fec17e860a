"""The digits recipe with the published settings of FedL2P instead of ours, for comparison."""

from __future__ import annotations

import dataclasses

from fedl2p.core.settings import InnerLoop
from fedl2p.federation.settings import Rounds
from fedl2p.methods.base.settings import MetaLearning
from fedl2p.recipes import digits
from fedl2p.study.settings import Study


def recipe() -> Study:
    """Return the digits study with everything that the paper sets restored.

    Meta-nets and their initialisation, the reference's hypergradient, SGD on the client, plain
    averaging, the round with the lowest validation loss, running statistics that start at 0 and 1,
    15 epochs, inner learning rate 0.001. Data, global model and cohorts stay the digits recipe's.
    """
    ours = digits.recipe()
    return dataclasses.replace(
        ours,
        learn=Rounds(rounds=ours.learn.rounds, clients_per_round=ours.learn.clients_per_round),
        settings=dataclasses.replace(
            ours.settings,
            finetune=InnerLoop(epochs=15, statistics="published"),
            meta=MetaLearning.published(base_rate=1e-3),
            alone_optimizer="sgd",
            alone_rate=None,
            # as many outer steps as a client takes in its rounds: 2 batches, 3 passes, 15 rounds
            alone_steps=90,
        ),
    )
