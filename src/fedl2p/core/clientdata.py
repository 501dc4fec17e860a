"""What one client holds: labelled examples in up to three disjoint parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Augment = Callable[[Tensor, torch.Generator], Tensor]
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
    raw
        The training examples in the form that ``augment`` takes, shape (n, ...), if that is not the
        model's own: waveforms, where ``train.x`` holds their spectra. None: it takes ``train.x``.
    weights
        How often each training example is drawn, shape (n,), > 0: an epoch then draws n examples
        with replacement, in proportion. None: every example once per epoch, in random order.
    """

    train: Examples
    validation: Examples | None = None
    test: Examples | None = None
    augment: Augment | None = None
    raw: Tensor | None = None
    weights: Tensor | None = None

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
        count = len(self.train.x)
        if self.raw is not None and (self.augment is None or len(self.raw) != count):
            raise ValueError(
                f"raw has {len(self.raw)} examples for {count} training examples "
                f"{'and no augment' if self.augment is None else ''}; give one each, and an "
                "augment that turns them into the model's inputs"
            )
        if self.weights is not None:
            _check_weights(self.weights, count)

    def to(self, device: torch.device | str) -> ClientData:
        """Return the same data on another device."""
        return ClientData(
            self.train.to(device),
            None if self.validation is None else self.validation.to(device),
            None if self.test is None else self.test.to(device),
            self.augment,
            None if self.raw is None else self.raw.to(device),
            self.weights,
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
        For :attr:`ClientData.weights`: shape (n,), float64, sums to 1.
    """
    counts = torch.bincount(y)
    return 1.0 / (counts[y] * (counts > 0).sum()).to(torch.float64)


def _check_weights(weights: Tensor, count: int) -> None:
    if weights.shape != (count,):
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}, but there are {count} training examples; "
            "give one weight each"
        )
    if not bool((weights > 0).all() and weights.isfinite().all()):
        raise ValueError("weights must all be above 0 and finite; leave examples out instead")
