"""Layers that write buffers in training, besides batch-norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from foreign.nets.case import Case, seeded


class HandWritten(nn.Module):
    """Batch-norm in one's own words, its statistics written in place."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("var", torch.ones(features))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.weight * (x - self.mean) / (self.var + 1e-5).sqrt()
        mean, var = x.mean(0), x.var(0, unbiased=False)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * mean)
            self.var = 0.9 * self.var + 0.1 * var  # another tensor, in the place of the old
            self.seen += 1
        return self.weight * (x - mean) / (var + 1e-5).sqrt()


class Averaged(nn.Module):
    """Reads, in training too, an average of what it has seen."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.centre.copy_(0.8 * self.centre + 0.2 * x.detach().mean(0))
        return x - self.centre


def with_layer(layer: nn.Module) -> nn.Module:
    """Return Linear, the layer, BatchNorm1d, Linear."""
    return nn.Sequential(nn.Linear(5, 6), layer, nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 3))


def instance_normed() -> nn.Module:
    """Return a convolution with instance-norm that keeps statistics."""
    return nn.Sequential(
        nn.Conv1d(2, 4, 3),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


CASES = {
    "InstanceNorm with statistics": Case(
        build=seeded(instance_normed), shape=(2, 6), state=True, steps=1
    ),
    "hand-written batch-norm": Case(
        build=seeded(lambda: with_layer(HandWritten(6))), shape=(5,), state=True, steps=1
    ),
    "running average": Case(
        build=seeded(lambda: with_layer(Averaged(6))), shape=(5,), state=True, steps=1
    ),
    "spectral_norm": Case(
        build=seeded(lambda: with_layer(parametrizations.spectral_norm(nn.Linear(6, 6)))),
        shape=(5,),
        state=True,
        steps=1,
    ),
    "old spectral_norm": Case(
        build=seeded(lambda: with_layer(spectral_norm(nn.Linear(6, 6)))),
        shape=(5,),
        state=True,
        steps=1,
    ),
}
