"""Names of clients that are computed by position: a million of them take no memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload


class LazyNames(Sequence[str]):
    """What computed names have in common: they look and compare like a tuple of strings.

    Slices are lazy too. ``index`` and ``in`` look a name up by what it says, without a walk.
    A subclass of one's own says ``find``, ``at`` and ``__len__``; no name may occur twice.
    """

    def find(self, name: object) -> int | None:
        """Return the position of a name, or None if it is none of these."""
        raise NotImplementedError

    def at(self, position: int) -> str:
        """Return the name at a position from 0 to ``len(self) - 1``."""
        raise NotImplementedError

    def at_all(self, positions: range) -> LazyNames:
        """Return the names at some positions."""
        return _Picked(self, positions)

    @overload
    def __getitem__(self, key: int) -> str: ...

    @overload
    def __getitem__(self, key: slice) -> LazyNames: ...

    def __getitem__(self, key: int | slice) -> str | LazyNames:
        if isinstance(key, slice):
            return self.at_all(range(len(self))[key])
        try:
            return self.at(range(len(self))[key])
        except IndexError:
            raise IndexError(f"there is no name {key}; there are {len(self)}") from None

    def __contains__(self, name: object) -> bool:
        return self.find(name) is not None

    def index(self, value: Any, start: int = 0, stop: int | None = None) -> int:
        """Return the position of a name.

        Raises
        ------
        ValueError
            If it is none of these, or not between ``start`` and ``stop``.
        """
        position = self.find(value)
        if position is None or position not in range(len(self))[slice(start, stop)]:
            raise ValueError(f"{value!r} is none of these {len(self)} names")
        return position

    def count(self, value: Any) -> int:
        """Return 1 for a name that is there, 0 for any other."""
        return int(value in self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, tuple | LazyNames):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(self))


class Numbered(LazyNames):
    """The names ``<prefix>0``, ``<prefix>1`` and so on, made when they are asked for.

    Parameters
    ----------
    prefix
        What all names begin with.
    count
        How many.

    Raises
    ------
    ValueError
        If ``count`` is negative.
    """

    def __init__(self, prefix: str, count: int) -> None:
        if count < 0:
            raise ValueError(f"count is {count}, but must be 0 or more names")
        self.prefix = prefix
        self._numbers = range(count)

    def find(self, name: object) -> int | None:
        """Return the position of a name, or None if it is none of these."""
        if not isinstance(name, str) or not name.startswith(self.prefix):
            return None
        digits = name[len(self.prefix) :]
        # No number of clients has 20 digits, and Python refuses to read thousands of them.
        if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
            return None
        number = int(digits)
        if str(number) != digits or number not in self._numbers:
            return None
        return self._numbers.index(number)

    def at(self, position: int) -> str:
        """Return the name at a position."""
        return f"{self.prefix}{self._numbers[position]}"

    def at_all(self, positions: range) -> Numbered:
        """Return the names at some positions."""
        picked = Numbered(self.prefix, 0)
        picked._numbers = _among(self._numbers, positions)
        return picked

    def __len__(self) -> int:
        return len(self._numbers)

    def __repr__(self) -> str:
        return f"<{len(self)} names {self.prefix}...>"


class Chained(LazyNames):
    """The names of one sequence, then those of another; no name is in both.

    Parameters
    ----------
    first, second
        Lazy or not; those of a tuple are looked up in a dictionary, made when it is needed.
    """

    def __init__(self, first: Sequence[str], second: Sequence[str]) -> None:
        self._parts = (first, second)
        self._finders: list[Callable[[object], int | None]] = []

    def find(self, name: object) -> int | None:
        """Return the position of a name, or None if it is none of these."""
        if not self._finders:
            self._finders = [finder(part) for part in self._parts]
        position = self._finders[0](name)
        if position is None and (position := self._finders[1](name)) is not None:
            position += len(self._parts[0])
        return position

    def at(self, position: int) -> str:
        """Return the name at a position."""
        first, second = self._parts
        return first[position] if position < len(first) else second[position - len(first)]

    def __len__(self) -> int:
        return sum(map(len, self._parts))


class _Picked(LazyNames):
    """Some of other lazy names, by position."""

    def __init__(self, names: LazyNames, positions: range) -> None:
        self._names = names
        self._positions = positions

    def find(self, name: object) -> int | None:
        position = self._names.find(name)
        return (
            self._positions.index(position)
            if position is not None and position in self._positions
            else None
        )

    def at(self, position: int) -> str:
        return self._names.at(self._positions[position])

    def at_all(self, positions: range) -> LazyNames:
        return _Picked(self._names, _among(self._positions, positions))

    def __len__(self) -> int:
        return len(self._positions)


def _among(numbers: range, positions: range) -> range:
    """Return ``numbers[i] for i in positions``; as a slice that could not run down to 0."""
    if not positions:
        return range(0)
    first, step = numbers[positions[0]], numbers.step * positions.step
    return range(first, first + step * len(positions), step)


def finder(names: Sequence[str]) -> Callable[[object], int | None]:
    """Return a function that gives the position of a name, or None if it is none of these.

    Computed names know it; for others a dictionary is made, once.
    """
    if isinstance(names, LazyNames):
        return names.find
    positions: dict[object, int] = {}
    for position, name in enumerate(names):
        positions.setdefault(name, position)
    return positions.get


def chained(first: Sequence[str], second: Sequence[str]) -> Sequence[str]:
    """Return the names of two sequences one after another, as a tuple only if both are tuples."""
    if isinstance(first, tuple) and isinstance(second, tuple):
        return first + second
    if not len(second):
        return first
    return Chained(first, second) if len(first) else second
