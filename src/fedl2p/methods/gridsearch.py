"""Grid search over mixes and learning rates, per client or once for all.

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

from fedl2p.core.finetuning.evaluation import evaluate
from fedl2p.core.finetuning.stacking import map_stacks
from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.settings import InnerLoop
from fedl2p.core.working_copies import working_copies
from fedl2p.method import Client, Outcome, State, Update
from fedl2p.methods.base.personalizing import (
    WithoutRounds,
    choose_constant,
    evaluate_global,
    finetune_stack,
    personalize_with,
)
from fedl2p.methods.base.settings import Grid

WORST = 1e4
"""Replaces the loss, in nats, of a grid point at which fine-tuning diverged."""

WORST_OF_OTHERS = 1e30
"""The same of losses that are not in nats and may be of any size."""


def search(
    net: FunctionalModel, clients: Sequence[Client], grid: Grid, inner: InnerLoop
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
    pairs = [(client, point) for client in clients for point in points]

    def stack(
        clients: Sequence[Client], points: Sequence[tuple[float, float]]
    ) -> list[tuple[float, float]]:
        hyperparams = _stacked(net, points).to(net.device, net.dtype)
        state = finetune_stack(net, clients, hyperparams, inner)
        parts = [c.data.validation for c in clients if c.data.validation]
        return evaluate(net, state, hyperparams.mix, parts)

    scores = torch.tensor(
        map_stacks(
            stack,
            net,
            [client.data for client, _ in pairs],
            [client for client, _ in pairs],
            [point for _, point in pairs],
            unequal_sizes=True,
        )
    ).view(len(clients), len(points), 2)
    worst = WORST if net.objective.in_nats else WORST_OF_OTHERS
    losses = scores[..., 0].nan_to_num(nan=worst).clamp(max=worst)
    # without an accuracy, which is NaN then and could not travel
    return losses, scores[..., 1].nan_to_num(nan=0.0)


def best_point(
    points: Sequence[tuple[float, float]], losses: Tensor, accuracies: Tensor, criterion: str
) -> tuple[float, float]:
    """Return the grid point of lowest loss, or of highest accuracy (ties by loss)."""
    losses = losses.nan_to_num(nan=float("inf"), posinf=float("inf"))
    if criterion == "accuracy":
        losses = torch.where(
            accuracies >= accuracies.max(), losses, torch.full_like(losses, float("inf"))
        )
    return points[int(losses.argmin())]


def _stacked(net: FunctionalModel, points: Sequence[tuple[float, float]]) -> Hyperparams:
    """Return the hyperparameters of one grid point (mix, rate) per client."""
    return Hyperparams.stack(
        [Hyperparams.constant(net.sites, mix=mix, rate=rate) for mix, rate in points]
    )


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
        net = working_copies(model).net

        def choose(clients: Sequence[Client]) -> tuple[Hyperparams, None]:
            losses, accuracies = search(net, clients, self.grid, self.inner)
            chosen = [
                best_point(self.grid.points, loss, accuracy, self.grid.criterion)
                for loss, accuracy in zip(losses, accuracies, strict=True)
            ]
            return _stacked(net, chosen), None

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
        losses, accuracies = search(working_copies(model).net, clients, self.grid, self.inner)
        return [
            Update(
                update.client,
                shared={"loss": losses[i], "accuracy": accuracies[i]},
                weight=update.weight,
                metrics=update.metrics,
            )
            for i, update in enumerate(evaluate_global(model, clients))
        ]

    def validate(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        """Evaluate the global model, without searching again."""
        return evaluate_global(model, clients)

    def personalize(
        self, model: nn.Module, state: State, clients: Sequence[Client]
    ) -> list[Outcome]:
        """Fine-tune every client at the winning grid point."""
        mix, rate = best_point(
            self.grid.points, state["loss"], state["accuracy"], self.grid.criterion
        )
        choose = choose_constant(working_copies(model).net, mix, rate)
        return personalize_with(model, clients, self.inner, choose)


METHODS = {
    "gridsearch": lambda s: GridSearch(name="gridsearch", grid=s.grid, inner=s.finetune),
    "bestfixed": lambda s: BestFixed(name="bestfixed", grid=s.grid, inner=s.finetune),
}
