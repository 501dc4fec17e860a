"""How the recipes have FedL2P learn: our settings, and the paper's in their place."""

from __future__ import annotations

import dataclasses

from fedl2p.core.settings import InnerLoop
from fedl2p.federation.settings import DEFAULT_ROUNDS, Rounds
from fedl2p.methods.base.settings import MetaLearning
from fedl2p.study.settings import Study


def learning(*, rounds: int, clients_per_round: int) -> Rounds:
    """Return the rounds that learn the meta-nets.

    Clients send clipped hypergradients; the server takes one Adam step on their mean. Its rate
    fades out, so that the last state needs neither selection nor averaging.
    """
    return dataclasses.replace(DEFAULT_ROUNDS, rounds=rounds, clients_per_round=clients_per_round)


def published(study: Study, *, validation_batches: int) -> Study:
    """Return the study in which FedL2P learns with the paper's settings.

    These are form and initialisation of the meta-nets, hypergradient, SGD on the client, plain
    averaging, the round with the lowest validation loss, running statistics that start at 0 and 1,
    15 epochs, inner learning rate 0.001. Data, global model, clients per round and what the last
    fine-tuning reads stay. ``validation_batches`` of at most 32 are in a client's validation part.
    """
    meta = MetaLearning.published(base_rate=1e-3)
    # as many outer steps as a client takes in its rounds
    steps = study.settings.alone_steps * meta.outer_epochs * validation_batches
    return dataclasses.replace(
        study,
        learn=Rounds(rounds=study.learn.rounds, clients_per_round=study.learn.clients_per_round),
        settings=dataclasses.replace(
            study.settings,
            finetune=InnerLoop(
                epochs=15, statistics="published", final=study.settings.finetune.final
            ),
            meta=meta,
            alone_steps=steps,
            alone_optimizer="sgd",
            alone_rate=None,
        ),
    )
