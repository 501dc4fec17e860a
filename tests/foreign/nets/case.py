"""What a net brings to the contract: how it is built, what it reads, what it is known for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from support.core_nets import settled


@dataclass(frozen=True, kw_only=True)
class Case:
    """A net as users have them.

    Parameters
    ----------
    build
        Returns the net, seeded, in the dtype that it is used in.
    shape
        Of one example.
    tokens
        Size of the vocabulary of integer inputs; 0: inputs are floats.
    random
        A training forward draws random numbers.
    state
        A training forward writes buffers that the net reads again, besides batch-norm's.
    tolerance
        Relative, of outputs, weights and buffers against plain torch.
    differentiable
        Hypergradients equal finite differences to 1e-5.
    steps
        Inner steps of the hypergradient. State counts as a constant, so that with it only one
        step is exact.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: int = 0
    random: bool = False
    state: bool = False
    tolerance: float = 1e-7
    differentiable: bool = True
    steps: int = 3

    def examples(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return inputs (count, *shape) and labels (count,) of three classes."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(3, (count,), generator=generator)
        if self.tokens:
            return torch.randint(self.tokens, (count, *self.shape), generator=generator), labels
        x = torch.randn(count, *self.shape, generator=generator, dtype=torch.float64)
        return 0.4 + 1.5 * x, labels


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return a builder of the net in float64 with seeded weights and statistics of its own."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return settled(make())

    return build
