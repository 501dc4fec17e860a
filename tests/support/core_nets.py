"""Small networks and a plain torch training loop for the tests of core."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedl2p.core.finetuning.batches import Batches, StackBatch
from fedl2p.core.finetuning.optimizers import Optimizer
from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.hypergradients.estimators import stack_hypergradient
from fedl2p.core.hypergradients.problem import Hypergradient, Problem
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.objective import Objective
from fedl2p.core.settings import HypergradientConfig, Statistics
from fedl2p.core.sites import is_mixable_norm

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class ConvNet(nn.Module):
    """Convolution, batch-norm, convolution, batch-norm over 1, 2 or 3 dimensions, and a head."""

    def __init__(self, dims: int, *, classes: int = 3, **norm: object) -> None:
        super().__init__()
        self.conv1 = CONVS[dims](2, 4, 3, padding=1)
        self.norm1 = NORMS[dims](4, **norm)
        self.conv2 = CONVS[dims](4, 5, 3, padding=1)
        self.norm2 = NORMS[dims](5, **norm)
        self.head = nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm1(self.conv1(x)))
        return self.head(torch.tanh(self.norm2(self.conv2(x))).flatten(2).mean(2))


class SharedNorm(nn.Module):
    """One batch-norm layer under two names, run twice per pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        self.second = nn.Sequential(nn.Linear(6, 6), self.first[1])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class TiedWeights(nn.Module):
    """Two linear layers that share their weight, not their bias, with a norm in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.norm(self.first(x))))))


class UnusedNorm(nn.Module):
    """A norm and a layer that never run."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)
        self.extra = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


def mlp(*, norm: bool = True) -> nn.Sequential:
    """Return Linear, BatchNorm1d (or nothing), tanh, Linear on 4 inputs and 3 classes."""
    middle: list[nn.Module] = [nn.BatchNorm1d(6)] if norm else []
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 3))


def settled(model: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return the model with seeded weights and running statistics unlike their start."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    model.double()
    with torch.no_grad():
        for p in model.parameters():
            fan = p[0].numel() if p.dim() > 1 else 1
            p.copy_(normal(p) * (fan**-0.5 if p.dim() > 1 else 0.3))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                module.weight.add_(1.0)
            if is_mixable_norm(module):
                module.running_mean.copy_(0.3 * normal(module.running_mean))
                module.running_var.copy_(0.5 + normal(module.running_var) ** 2)
    return model.to(dtype)


def examples(
    count: int, *shape: int, seed: int = 0, classes: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Return inputs (count, *shape) off the standard normal, and labels (count,)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x = 0.4 + 1.5 * torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(classes, (count,), generator=generator)


def cut(pair: tuple[Tensor, Tensor], size: int) -> list[tuple[Tensor, Tensor]]:
    """Cut examples into batches, each for one client, shapes (1, size, ...) and (1, size)."""
    x, y = pair
    return [(a[None], b[None]) for a, b in zip(x.split(size), y.split(size), strict=True)]


def plain_training(
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    rates: float | dict[str, float],
    *,
    frozen_statistics: bool = False,
) -> nn.Module:
    """Train ``model`` in place by plain SGD, its batch-norm layers being torch's own."""
    model.train()
    if frozen_statistics:
        for module in model.modules():
            if is_mixable_norm(module):
                module.eval()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for x, y in batches:
        grads = torch.autograd.grad(F.cross_entropy(model(x[0]), y[0]), list(trained.values()))
        with torch.no_grad():
            for (name, p), grad in zip(trained.items(), grads, strict=True):
                p -= (rates if isinstance(rates, float) else rates[name]) * grad
    return model


def hypergradient_of(
    net: FunctionalModel,
    hyperparams: Hyperparams,
    batches: Batches,
    validation: tuple[Tensor, Tensor] | list[StackBatch],
    *,
    config: HypergradientConfig,
    statistics: Statistics = "corrected",
    following: tuple[Tensor, Tensor] | None = None,
    optimizer: Optimizer | None = None,
) -> Hypergradient:
    """Return the hypergradient of a stack; its validation batch may be one pair of all clients."""
    problem = Problem(
        net=net,
        mix=hyperparams.mix,
        rate=hyperparams.rate,
        batches=batches,
        validation=validation if isinstance(validation, list) else [StackBatch(*validation)],
        statistics=statistics,
        following=following,
        optimizer=optimizer,
    )
    return stack_hypergradient(problem, config)


cross_entropy = Objective().losses_of_many
"""The default loss: mean cross-entropy of each of C clients."""
