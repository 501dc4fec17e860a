"""Grid search: the expensive search that FedL2P replaces.

``gridsearch`` searches for every client by itself: it fine-tunes once per grid point on the
training part, takes the point with the lowest loss on the client's validation part, and keeps that
model.
``bestfixed`` searches once for all: every seen client tries the grid, the server averages the
validation losses (one round, one number per grid point travels), and everybody uses the winner; the
best that any fixed strategy of :mod:`fedl2p.methods.finetuning` can do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedl2p.core.finetuning.inner_loop import on
from fedl2p.core.finetuning.stacking import evaluate, over_stacks, resident
from fedl2p.core.functional.model import Net
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.settings import InnerLoop
from fedl2p.method import Client, Outcome, State, Update
from fedl2p.methods.base.personalizing import (
    WithoutRounds,
    constant_for,
    judge_global,
    personalize_with,
    pick,
    tune,
)
from fedl2p.methods.base.settings import Grid

WORST = 1e4
"""Stands for the loss (nats) of a grid point at which fine-tuning diverged."""


def search(
    net: Net, clients: Sequence[Client], grid: Grid, inner: InnerLoop
) -> tuple[Tensor, Tensor]:
    """Try every grid point on every client.

    Returns
    -------
    losses, accuracies
        Shape (C, G), on each client's validation part.

    Raises
    ------
    ValueError
        If a client has no validation part: the training part must not choose.
    """
    for client in clients:
        if client.data.validation is None:
            raise ValueError(
                f"client {client.name!r} has no validation part, which a search needs; give it one"
            )
    points = grid.points
    pairs = [(c, point) for c in clients for point in points]

    def stack(members: list[int]) -> list[tuple[float, float]]:
        hyperparams = Hyperparams.stack(
            [
                Hyperparams.constant(net.sites, mix=pairs[i][1][0], rate=pairs[i][1][1])
                for i in members
            ]
        )
        hyperparams = on(net, hyperparams)
        state = tune(net, [pairs[i][0] for i in members], hyperparams, inner)
        parts = [c.data.validation for c in (pairs[i][0] for i in members) if c.data.validation]
        return evaluate(net, state, hyperparams.mix, parts)

    scores = torch.tensor(over_stacks(net, [c.data for c, _ in pairs], stack, ragged=True))
    scores = scores.view(len(clients), len(points), 2)
    return scores[..., 0].nan_to_num(nan=WORST).clamp(max=WORST), scores[..., 1]


@dataclass(frozen=True, kw_only=True)
class GridSearch(WithoutRounds):
    """Search per client; nothing travels.

    Parameters
    ----------
    grid
        Mixes, rates and the criterion.
    inner
        Epochs and batch size of every trial.
    """

    grid: Grid
    inner: InnerLoop

    def personalize(
        self, model: nn.Module, state: State, clients: Sequence[Client]
    ) -> list[Outcome]:
        """Search and fine-tune; the seconds contain the search."""
        net = resident(model).net

        def choose(members: list[int]) -> tuple[Hyperparams, None]:
            losses, accuracies = search(net, [clients[i] for i in members], self.grid, self.inner)
            chosen = [
                pick(self.grid.points, loss, accuracy, self.grid.criterion)
                for loss, accuracy in zip(losses, accuracies, strict=True)
            ]
            return (
                Hyperparams.stack(
                    [Hyperparams.constant(net.sites, mix=m, rate=r) for m, r in chosen]
                ),
                None,
            )

        return personalize_with(model, clients, self.inner, choose)


@dataclass(frozen=True, kw_only=True)
class BestFixed(GridSearch):
    """Search once over all seen clients; the grid's mean validation losses travel."""

    @property
    def rounds(self) -> Literal["one"]:
        """One round in which every seen client takes part."""
        return "one"

    def start(self, model: nn.Module, *, seed: int = 0) -> State:
        """Return a loss and an accuracy of 0 for each grid point."""
        points = len(self.grid.points)
        return {"loss": torch.zeros(points), "accuracy": torch.zeros(points)}

    def train(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        """Return every client's validation loss and accuracy at each grid point."""
        losses, accuracies = search(resident(model).net, clients, self.grid, self.inner)
        return [
            Update(
                judged.client,
                shared={"loss": losses[i], "accuracy": accuracies[i]},
                weight=judged.weight,
                metrics=judged.metrics,
            )
            for i, judged in enumerate(judge_global(model, clients))
        ]

    def validate(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        """Judge the global model, without searching again."""
        return judge_global(model, clients)

    def personalize(
        self, model: nn.Module, state: State, clients: Sequence[Client]
    ) -> list[Outcome]:
        """Fine-tune every client at the winning grid point."""
        mix, rate = pick(self.grid.points, state["loss"], state["accuracy"], self.grid.criterion)
        choose = constant_for(resident(model).net, mix, rate)
        return personalize_with(model, clients, self.inner, choose)


METHODS = {
    "gridsearch": lambda s: GridSearch(name="gridsearch", grid=s.grid, inner=s.finetune),
    "bestfixed": lambda s: BestFixed(name="bestfixed", grid=s.grid, inner=s.finetune),
}
