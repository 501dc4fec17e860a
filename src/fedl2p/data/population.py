"""The clients of a study: their names, which of them are unseen, and the data of each."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import overload

from fedl2p.core import trees
from fedl2p.core.clientdata import ClientData
from fedl2p.core.trees import Tree


class Population(ABC):
    """Clients by name: ``seen`` ones take part in training, ``unseen`` ones come afterwards.

    Names are tuples, or :class:`NumberedNames` where there are so many that a tuple of them would
    cost memory. Data are made or read when they are opened.
    """

    seen: Sequence[str]
    unseen: Sequence[str]
    classes: int
    shape: tuple[int, ...]

    @property
    def names(self) -> Sequence[str]:
        """All client names: the seen ones, then the unseen ones, in the order of the population."""
        if isinstance(self.seen, NumberedNames):
            return self.seen + self.unseen
        return (*self.seen, *self.unseen)

    @abstractmethod
    def open(self, name: str) -> ClientData:
        """Return the data of one client; the same data at every call.

        Raises
        ------
        KeyError
            If there is no such client.
        """

    def about(self, name: str) -> Mapping[str, str | float]:
        """Return the description of a client for reports, e.g. ``{"sensor": "blur"}``."""
        return {}

    def pretraining(self) -> Population | None:
        """Return the population that the global model is pre-trained on; None for this one.

        Where there is one, e.g. of public data, the rounds of pre-training take place where the
        study runs, with that population's seen clients.
        """
        return None


def num_outputs(y: Tree) -> int:
    """Return the number of classes of labels, or of values per example of other targets.

    Integers are labels from 0; floating targets are of shape (n, values, ...) or (n,).
    """
    first = trees.first_leaf(y)
    if not first.is_floating_point():
        return max(0, int(first.max())) + 1
    return first.shape[1] if first.dim() > 1 else 1


class NumberedNames(Sequence[str]):
    """The names of a prefix and a number, made by position: a million of them take no memory.

    Parameters
    ----------
    prefix
        The beginning of every name.
    numbers
        The numbers that follow it, e.g. ``range(1_000_000)``.
    """

    def __init__(self, prefix: str, numbers: range) -> None:
        self._ranges = [(prefix, numbers)]

    def __add__(self, other: Sequence[str]) -> Sequence[str]:
        """Return these names and then others; a tuple if the others are not numbered."""
        if not isinstance(other, NumberedNames):
            return (*self, *other) if other else self
        both = NumberedNames("", range(0))
        both._ranges = self._ranges + other._ranges
        return both

    def __len__(self) -> int:
        return sum(len(numbers) for _, numbers in self._ranges)

    @overload
    def __getitem__(self, key: int) -> str: ...

    @overload
    def __getitem__(self, key: slice) -> tuple[str, ...]: ...

    def __getitem__(self, key: int | slice) -> str | tuple[str, ...]:
        if isinstance(key, slice):
            return tuple(self[i] for i in range(len(self))[key])
        position = range(len(self))[key]
        for prefix, numbers in self._ranges:
            if position < len(numbers):
                return f"{prefix}{numbers[position]}"
            position -= len(numbers)
        raise AssertionError("a position below the length is in one of the ranges")

    def __contains__(self, name: object) -> bool:
        for prefix, numbers in self._ranges:
            if isinstance(name, str) and name.startswith(prefix):
                digits = re.fullmatch("0|[1-9][0-9]{0,17}", name.removeprefix(prefix))
                if digits and int(digits[0]) in numbers:
                    return True
        return False
