"""L2P: FedL2P without federation (the ablation of Lee et al., "FedL2P", NeurIPS 2023, section 4).

Every client learns meta-nets of its own, on its own training and validation parts, with as many
outer steps as it would have taken part in, and uses them for itself. What it lacks is other
clients' experience. The outer loop is FedL2P's own; where FedL2P's server takes Adam steps, the
client does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.profiles import Profile
from fedl2p.core.working_copies import working_copies
from fedl2p.method import Client, Outcome, State, Update
from fedl2p.methods.base.personalizing import evaluate_global, personalize_with, profile_of
from fedl2p.methods.fedl2p import FedL2P, MetaLearner


@dataclass(frozen=True, kw_only=True)
class L2P(FedL2P):
    """Meta-nets learned by each client alone; nothing travels.

    Parameters
    ----------
    steps
        Outer steps per client.
    optimizer
        ``adam`` where FedL2P's server uses it, ``sgd`` as published.
    rate
        Learning rate of the outer steps.
    """

    steps: int
    optimizer: Literal["sgd", "adam"]
    rate: float | None

    @property
    def rounds(self) -> Literal["none"]:
        """It has no federated training."""
        return "none"

    def train(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        """Evaluate the global model; nothing is shared."""
        return evaluate_global(model, clients)

    def personalize(
        self, model: nn.Module, state: State, clients: Sequence[Client]
    ) -> list[Outcome]:
        """Learn meta-nets, let them choose, fine-tune; the seconds contain the learning."""
        work = working_copies(model)
        learner = MetaLearner(
            work.net,
            self.build_metanets(work.net.sites),
            self.meta,
            self.inner,
            optimizer=self.optimizer,
            steps=self.steps,
            rate=self.rate,
        )

        def choose(clients: Sequence[Client]) -> tuple[Hyperparams, list[Profile]]:
            profiles = [profile_of(work, c, self.meta.nets.groups) for c in clients]
            starts = [self.start(model, seed=c.seed) for c in clients]
            learned = learner.run(starts, clients, profiles)
            weights = {k: torch.stack([state[k] for state, _ in learned]) for k in starts[0]}
            with torch.no_grad():
                hyperparams = learner.nets.per_client(weights, Profile.stack(profiles))
            return hyperparams, profiles

        return personalize_with(
            model, clients, self.inner, choose, unequal_sizes=learner.unequal_sizes
        )


METHODS = {
    "l2p": lambda s: L2P(
        name="l2p",
        meta=s.meta,
        inner=s.finetune,
        steps=s.alone_steps,
        optimizer=s.alone_optimizer,
        rate=s.alone_rate,
    )
}
