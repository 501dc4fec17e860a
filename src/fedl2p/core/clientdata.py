"""The data of one client: labelled examples in up to three disjoint parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch

if TYPE_CHECKING:
    from torch import Tensor

# Text, so that sources can be imported without loading torch.
Augment: TypeAlias = "Callable[[Tensor, torch.Generator], Tensor]"
"""``augment(x, generator) -> x`` on one batch; every random draw comes from ``generator``.

Where the client has ``raw`` examples it gets a batch of these and returns the model's inputs.
"""


class Examples(NamedTuple):
    """Labelled examples: ``x`` of shape (n, ...) and integer class labels ``y`` of shape (n,)."""

    x: Tensor
    y: Tensor

    def to(self, device: torch.device | str) -> Examples:
        """Return the same examples on another device."""
        return Examples(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class ClientData:
    """The data of one client.

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
    raw
        The training examples in the form that ``augment`` takes, shape (n, ...), if the model takes
        another one: waveforms, where ``train.x`` holds their spectra. None: it takes ``train.x``.
    raw_validation
        The same of the validation examples: what :meth:`joined` adds to ``raw``.
    balanced
        Whether the client's classes are equally frequent in training batches on average: an epoch
        then draws as many examples as there are, with replacement. If not, an epoch is every
        example once.
    """

    train: Examples
    validation: Examples | None = None
    test: Examples | None = None
    augment: Augment | None = None
    raw: Tensor | None = None
    raw_validation: Tensor | None = None
    balanced: bool = False

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
        self._check_raw()

    def _check_raw(self) -> None:
        if self.raw is not None and self.augment is None:
            raise ValueError("raw is given without augment, which makes inputs of it; give both")
        parts = (
            ("raw", self.raw, self.train),
            ("raw_validation", self.raw_validation, self.validation),
        )
        for name, raw, part in parts:
            expected = 0 if part is None else len(part.x)
            if raw is not None and len(raw) != expected:
                raise ValueError(
                    f"{name} has {len(raw)} examples, but its part has {expected}; give one for "
                    "each example of the part"
                )

    def joined(self) -> ClientData:
        """Return the same data with the validation part joined to the training part as well."""
        if self.validation is None:
            return self
        x = torch.cat([self.train.x, self.validation.x])
        y = torch.cat([self.train.y, self.validation.y])
        if self.raw is None:
            return dataclasses.replace(self, train=Examples(x, y))
        if self.raw_validation is None:
            raise ValueError("raw_validation is missing, without which raw cannot be joined")
        raw = torch.cat([self.raw, self.raw_validation])
        return dataclasses.replace(self, train=Examples(x, y), raw=raw)

    def to(self, device: torch.device | str) -> ClientData:
        """Return the same data on another device."""
        return ClientData(
            self.train.to(device),
            None if self.validation is None else self.validation.to(device),
            None if self.test is None else self.test.to(device),
            self.augment,
            None if self.raw is None else self.raw.to(device),
            None if self.raw_validation is None else self.raw_validation.to(device),
            self.balanced,
        )


def class_balance(y: Tensor) -> Tensor:
    """Return weights under which each class that occurs is drawn equally often.

    Parameters
    ----------
    y
        Integer class labels, shape (n,).

    Returns
    -------
    Tensor
        Shape (n,), float64, sums to 1.
    """
    counts = torch.bincount(y)
    return 1.0 / (counts[y] * (counts > 0).sum()).to(torch.float64)
