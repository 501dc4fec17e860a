"""Norms that are reached, extended or switched in ways of one's own."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.utils import parametrizations, parametrize

from foreign.nets.case import Case, seeded


class Base(nn.Module):
    """Linear, batch-norm, tanh, linear, of which the others change one thing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.o = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.n(self.a(x))))


class ThroughAList(Base):
    """Reaches the norm through a plain list and a plain dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.ns, self.by_name = [self.n], {"a": self.a}

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.ns[0](self.by_name["a"](x))))


class Functional(Base):
    """Calls batch_norm itself."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.n
        h = F.batch_norm(
            self.a(x), n.running_mean, n.running_var, n.weight, n.bias, self.training, 0.1, n.eps
        )
        return self.o(torch.tanh(h))


class ImportedFunctional(Base):
    """The same by a name imported before, with keywords."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.n
        h = batch_norm(
            self.a(x),
            running_mean=n.running_mean,
            running_var=n.running_var,
            weight=n.weight,
            training=self.training,
        )
        return self.o(torch.tanh(h + n.bias))


class AsksForTheType(Base):
    """Does something of its own where a layer is a batch-norm, and reads its count of batches."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
            if isinstance(layer, nn.BatchNorm1d):
                assert type(layer) is nn.BatchNorm1d
                assert layer.num_batches_tracked is not None
                x = torch.tanh(2.0 * x)
        return x


class NormAndActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: batch-norm by the functional form, then an activation."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            self.momentum,
            self.eps,
        )
        return self.act(self.drop(x))


class NormThenScale(nn.BatchNorm1d):
    """A batch-norm that calls torch's and goes on."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.tanh(super().forward(input)) * 1.5


class ActivatedConv(nn.Module):
    """A convolution with timm's kind of norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 4, 3, padding=1), NormAndActivation(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))


class TrainOverride(Base):
    """Keeps its norm in evaluation mode, as detectors do."""

    def train(self, mode: bool = True) -> TrainOverride:
        super().train(mode)
        self.n.eval()
        return self


class FunctionalFrozen(Base):
    """Calls batch_norm always with the running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.n
        h = F.batch_norm(self.a(x), n.running_mean, n.running_var, n.weight, n.bias)
        return self.o(torch.tanh(h))


class Positive(nn.Module):
    """A parametrization that keeps a tensor positive."""

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x)


def extended() -> nn.Module:
    """Return a net whose norm is a subclass that calls torch's forward."""
    net = Base()
    net.n = NormThenScale(6)
    return net


def parametrized() -> nn.Module:
    """Return a net whose norm has a parametrized weight."""
    net = Base()
    parametrize.register_parametrization(net.n, "weight", Positive())
    return net


def weight_normed() -> nn.Module:
    """Return a net whose first weight is a direction and a length."""
    net = Base()
    parametrizations.weight_norm(net.a)
    return net


def instance_forward() -> nn.Module:
    """Return a net whose norm and root have forwards of their own."""
    net = Base()

    def forward(self: nn.BatchNorm1d, x: Tensor) -> Tensor:
        return torch.sin(nn.BatchNorm1d.forward(self, 2.0 * x))

    net.n.forward = types.MethodType(forward, net.n)
    return net


def doubled(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(2.0 * x for x in inputs)


def shifted(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return torch.tanh(output + 0.5)


def halved(module: nn.Module, grads: tuple[Tensor, ...], _: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (0.5 * grads[0],)


def hooked() -> nn.Module:
    """Return a net with hooks before and after its norm and its head."""
    net = Base()
    net.n.register_forward_pre_hook(doubled)
    net.n.register_forward_hook(shifted)
    net.o.register_forward_hook(shifted)
    return net


def backward_hooked() -> nn.Module:
    """Return a net that halves the gradient behind its norm."""
    net = Base()
    net.n.register_full_backward_hook(halved)
    return net


def frozen_norm() -> nn.Module:
    """Return a net whose norm was put into evaluation mode."""
    net = Base()
    net.n.eval()
    return net


CASES = {
    "norm through a list": Case(build=seeded(ThroughAList), shape=(5,)),
    "functional batch_norm": Case(build=seeded(Functional), shape=(5,)),
    "imported batch_norm": Case(build=seeded(ImportedFunctional), shape=(5,)),
    "isinstance in forward": Case(build=seeded(AsksForTheType), shape=(5,)),
    "norm and activation": Case(build=seeded(ActivatedConv), shape=(2, 5, 5)),
    "norm that calls super": Case(build=seeded(extended), shape=(5,)),
    "parametrized norm": Case(build=seeded(parametrized), shape=(5,)),
    "weight_norm": Case(build=seeded(weight_normed), shape=(5,)),
    "instance forward": Case(build=seeded(instance_forward), shape=(5,)),
    "forward hooks": Case(build=seeded(hooked), shape=(5,)),
    "backward hook": Case(build=seeded(backward_hooked), shape=(5,), differentiable=False),
    "norm in eval mode": Case(build=seeded(frozen_norm), shape=(5,)),
    "train() override": Case(build=seeded(TrainOverride), shape=(5,)),
    "functional frozen": Case(build=seeded(FunctionalFrozen), shape=(5,)),
}
