"""Local training: every client trains alone from the initial weights, on its own data.

The floor that any federation must beat. Plain SGD and plain batch-norm, as in FedAvg's local
training, for more epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from fedl2p.core.settings import InnerLoop
from fedl2p.core.working_copies import working_copies
from fedl2p.method import Client, Outcome, State
from fedl2p.methods.base.personalizing import WithoutRounds, choose_constant, personalize_with


@dataclass(frozen=True, kw_only=True)
class Local(WithoutRounds):
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

    def personalize(
        self, model: nn.Module, state: State, clients: Sequence[Client]
    ) -> list[Outcome]:
        """Train every client from the initial weights, with its own norm statistics."""
        choose = choose_constant(working_copies(model).net, 1.0, self.rate)
        return personalize_with(model, clients, self.inner, choose)


METHODS = {
    "local": lambda s: Local(
        name="local",
        rate=s.local.rate,
        inner=InnerLoop(
            epochs=s.local_epochs,
            batch_size=s.local.batch_size,
            statistics=s.finetune.statistics,
            final=s.finetune.final,
        ),
    )
}
