"""Forwards that draw random numbers without a dropout layer."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreign.nets.case import Case, seeded

Draw = Callable[[Tensor, bool], Tensor]


class Drawing(nn.Module):
    """Linear, batch-norm, something random, linear."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.a, self.n, self.o = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.draw(torch.tanh(self.n(self.a(x))), self.training))


def dropped(h: Tensor, training: bool) -> Tensor:
    return F.dropout(h, 0.4, training)


def stochastic_depth(h: Tensor, training: bool) -> Tensor:
    """Drop whole examples, as timm's drop_path does."""
    if not training:
        return h
    keep = h.new_empty(len(h), 1).bernoulli_(0.7)
    return h * keep / 0.7


def noisy(h: Tensor, training: bool) -> Tensor:
    return h + 0.3 * torch.randn_like(h) if training else h


def python_random(h: Tensor, training: bool) -> Tensor:
    """Skip a layer by a draw of Python's generator, as LayerDrop is often written."""
    return h * random.uniform(0.5, 1.5) if training else h


CASES = {
    "F.dropout": Case(build=seeded(lambda: Drawing(dropped)), shape=(5,), random=True),
    "stochastic depth": Case(
        build=seeded(lambda: Drawing(stochastic_depth)), shape=(5,), random=True
    ),
    "randn in forward": Case(build=seeded(lambda: Drawing(noisy)), shape=(5,), random=True),
    "random.uniform in forward": Case(
        build=seeded(lambda: Drawing(python_random)), shape=(5,), random=True
    ),
    "RReLU": Case(
        build=seeded(
            lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.RReLU(), nn.Linear(6, 3))
        ),
        shape=(5,),
        random=True,
    ),
    "nn.Dropout": Case(
        build=seeded(
            lambda: nn.Sequential(
                nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3)
            )
        ),
        shape=(5,),
        random=True,
    ),
}
