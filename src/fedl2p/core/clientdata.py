"""What one client holds: labelled examples in up to three disjoint parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""``augment(x, generator) -> x`` on one batch; every random draw comes from ``generator``."""


class Examples(NamedTuple):
    """Labelled examples: ``x`` of shape (n, ...) and integer class labels ``y`` of shape (n,)."""

    x: Tensor
    y: Tensor

    def to(self, device: torch.device | str) -> Examples:
        """Return the same examples on another device."""
        return Examples(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class ClientData:
    """One client's own data.

    Parameters
    ----------
    train
        Examples that fine-tuning and local training read.
    validation
        Examples that choose (hyperparameters, rounds, early stopping); None if the client has none.
    test
        Examples that only the final evaluation reads; None if the client has none.
    augment
        Applied to each training batch, never to validation or test; None for no augmentation.
    """

    train: Examples
    validation: Examples | None = None
    test: Examples | None = None
    augment: Augment | None = None

    def __post_init__(self) -> None:
        for part in ("train", "validation", "test"):
            examples = getattr(self, part)
            if examples is None:
                continue
            if len(examples.x) != len(examples.y):
                raise ValueError(
                    f"{part}: {len(examples.x)} inputs but {len(examples.y)} labels; "
                    "give one label per input"
                )
            if len(examples.x) == 0:
                raise ValueError(f"{part} has no examples; leave the part out (None) instead")
            if examples.y.dim() != 1 or examples.y.is_floating_point():
                raise ValueError(
                    f"{part}: labels must be a 1-d integer tensor, got shape "
                    f"{tuple(examples.y.shape)} of {examples.y.dtype}"
                )

    def joined(self) -> ClientData:
        """Return the same data with the validation part joined to the training part as well."""
        if self.validation is None:
            return self
        x = torch.cat([self.train.x, self.validation.x])
        y = torch.cat([self.train.y, self.validation.y])
        return dataclasses.replace(self, train=Examples(x, y))

    def to(self, device: torch.device | str) -> ClientData:
        """Return the same data on another device."""
        return ClientData(
            self.train.to(device),
            None if self.validation is None else self.validation.to(device),
            None if self.test is None else self.test.to(device),
            self.augment,
        )
