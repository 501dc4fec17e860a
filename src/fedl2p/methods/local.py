"""Local: every client trains alone from the initial weights, on nothing but its own data.

The floor that any federation must beat. Plain SGD and plain batch-norm, as in FedAvg's local
training, for more epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from fedl2p.core.cohort import resident
from fedl2p.core.innerloop import InnerLoop
from fedl2p.method import Client, Method, Outcome, State, Update
from fedl2p.methods.common import constant_for, judge_global, personalize_with


@dataclass(frozen=True, kw_only=True)
class Local(Method):
    """Training alone; nothing travels.

    Parameters
    ----------
    rate
        Learning rate.
    inner
        Epochs and batch size.
    """

    rate: float
    inner: InnerLoop

    @property
    def starts_from(self) -> Literal["scratch"]:
        """Initial weights."""
        return "scratch"

    @property
    def rounds(self) -> Literal["none"]:
        """It has no federated training."""
        return "none"

    def start(self, model: nn.Module, *, seed: int = 0, prepared: State | None = None) -> State:
        """Return an empty state."""
        return {}

    def train(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        """Judge the initial model; there is nothing to share."""
        return judge_global(model, clients)

    def personalize(
        self, model: nn.Module, state: State, clients: Sequence[Client]
    ) -> list[Outcome]:
        """Train every client from the initial weights, with its own norm statistics."""
        choose = constant_for(resident(model).net, 1.0, self.rate)
        return personalize_with(model, clients, self.inner, choose)


METHODS = {
    "local": lambda s: Local(
        name="local",
        rate=s.local.rate,
        inner=InnerLoop(
            epochs=s.local_epochs,
            batch_size=s.local.batch_size,
            statistics=s.finetune.statistics,
        ),
    )
}
