"""The data of one client: labelled examples in up to three disjoint parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from fedl2p.core import trees
from fedl2p.core.trees import Tree
from fedl2p.core.user_data import read_examples

if TYPE_CHECKING:
    from torch import Tensor

# Text, so that sources can be imported without loading torch.
Augment: TypeAlias = "Callable[[Any, torch.Generator], Any]"
"""``augment(x, generator) -> x`` on one batch; every draw comes from ``generator``.

Where the client has ``raw`` examples it gets a batch of these and returns the model's inputs.
"""


class Examples(NamedTuple):
    """Labelled examples: trees of tensors (n, ...), see :mod:`fedl2p.core.trees`.

    Attributes
    ----------
    x
        Inputs. The model is called as ``model(x)``, ``model(**x)`` for a dictionary, ``model(*x)``
        for a tuple.
    y
        Targets, as the loss takes them (:mod:`fedl2p.core.objective`): class labels of shape (n,)
        for the default one.
    """

    x: Tree
    y: Tree

    @property
    def num(self) -> int:
        """The number of examples, n."""
        return trees.length(self.y)

    def take(self, index: Tensor | slice) -> Examples:
        """Return some of the examples."""
        return Examples(trees.rows(self.x, index), trees.rows(self.y, index))

    def batches(self, size: int) -> list[Examples]:
        """Return all examples in order, ``size`` at a time; the last batch may be smaller."""
        pairs = zip(trees.split(self.x, size), trees.split(self.y, size), strict=True)
        return [Examples(x, y) for x, y in pairs]

    def to(self, device: torch.device | str) -> Examples:
        """Return the same examples on another device."""
        return Examples(trees.to_device(self.x, device), trees.to_device(self.y, device))


@dataclass(frozen=True)
class ClientData:
    """The data of one client.

    Parameters
    ----------
    train
        Examples that fine-tuning and local training read. A part may be given as anything that
        :mod:`fedl2p.core.user_data` reads: a pair (inputs, targets), a data set, a loader.
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
        example once. For class labels of shape (n,).
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
            given = getattr(self, part)
            if given is None and part != "train":
                continue
            examples = Examples(*read_examples(given, what=part))
            _check_lengths(part, examples)
            same = isinstance(given, Examples) and all(map(is_, given, examples))
            object.__setattr__(self, part, given if same else examples)
        if self.balanced:
            _check_classes(self.train.y)
        self._check_raw()

    def _check_raw(self) -> None:
        if self.raw is not None and self.augment is None:
            raise ValueError("raw is given without augment, which makes inputs of it; give both")
        parts = (
            ("raw", self.raw, self.train),
            ("raw_validation", self.raw_validation, self.validation),
        )
        for name, raw, part in parts:
            expected = 0 if part is None else part.num
            if raw is not None and len(raw) != expected:
                raise ValueError(
                    f"{name} has {len(raw)} examples, but its part has {expected}; give one for "
                    "each example of the part"
                )

    def joined(self) -> ClientData:
        """Return the same data with the validation part joined to the training part as well."""
        if self.validation is None:
            return self
        x = trees.cat([self.train.x, self.validation.x])
        y = trees.cat([self.train.y, self.validation.y])
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


def _check_lengths(part: str, examples: Examples) -> None:
    named = [
        *(("inputs" + name, leaf) for name, leaf in trees.named_leaves(examples.x)),
        *(("targets" + name, leaf) for name, leaf in trees.named_leaves(examples.y)),
    ]
    for name, leaf in named:
        if leaf.dim() == 0:
            raise ValueError(f"{part}: {name} are one number; give a first dimension of examples")
    (first, of_first), *others = named
    for name, leaf in others:
        if len(leaf) != len(of_first):
            raise ValueError(
                f"{part}: {len(of_first)} {first} but {len(leaf)} {name}; give one of each per "
                "example"
            )
    if len(of_first) == 0:
        remedy = "leave the part out (None)"
        if part == "train":
            remedy = "a client needs at least one, or is to be left out itself"
        raise ValueError(f"{part} has no examples; {remedy}")


def _check_classes(y: Tree) -> None:
    if not isinstance(y, torch.Tensor) or y.dim() != 1 or y.is_floating_point() or y.min() < 0:
        raise ValueError(
            "balanced batches need class labels, integers from 0 of shape (n,), but the targets "
            f"are {trees.describe(y)}; leave balanced off"
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
