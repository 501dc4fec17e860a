"""Nets whose tensors have several dtypes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foreign.nets.case import Case, seeded


class HalfBackbone(nn.Module):
    """A bfloat16 backbone under a float32 head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.to(torch.bfloat16)).to(self.head.weight.dtype))


class WideNorm(nn.Module):
    """A float32 net with statistics in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.o = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.n(self.a(x).double())).to(self.o.weight.dtype))


def half_backbone() -> nn.Module:
    net = seeded(HalfBackbone)().float()
    net.body.bfloat16()
    return net


def wide_norm() -> nn.Module:
    net = seeded(WideNorm)().float()
    net.n.double()
    return net


def halved(make: type[nn.Module] = HalfBackbone) -> nn.Module:
    return seeded(make)().bfloat16()


CASES = {
    "bfloat16 backbone, float32 head": Case(
        build=half_backbone, shape=(5,), tolerance=2e-2, differentiable=False
    ),
    "float64 norm in a float32 net": Case(
        build=wide_norm, shape=(5,), tolerance=1e-5, differentiable=False
    ),
    "bfloat16 throughout": Case(build=halved, shape=(5,), tolerance=5e-2, differentiable=False),
}
