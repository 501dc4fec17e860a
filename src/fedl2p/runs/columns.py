"""Columns of the tables in a run's folder, each the fields of a dataclass, and tables as CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fedl2p.method import Scores


def names_of(kind: type) -> tuple[str, ...]:
    """Return the names of a dataclass's fields, in order."""
    return tuple(field.name for field in dataclasses.fields(kind))


SCORES = names_of(Scores)
"""The numbers of one personalized client, see :class:`fedl2p.method.Scores`."""

COUNTS = tuple(field.name for field in dataclasses.fields(Scores) if field.type == "int")
"""Those of them that count examples; the others are measured."""

ACCURACIES = tuple(name for name in SCORES if name.startswith("accuracy"))
"""Those that are fractions in [0, 1]."""

CLIENT_COLUMNS = ("method", "client", "pool", *SCORES)
"""Columns of ``clients.csv``."""


@dataclass(frozen=True)
class RoundLine:
    """One line of ``rounds.csv``.

    Parameters
    ----------
    stage
        ``pretrain``, ``learn`` or the name of a method.
    round
        From 1. One more than the stage has rounds: the pass that only evaluates the last state.
    clients
        Number of clients asked.
    loss
        Validation loss in nats of the state *received* in this round, so of the one that the round
        before made; mean over the clients, weighted as in the average. NaN if nobody gave one.
    accuracy
        The same for the accuracy, a fraction in [0, 1].
    seconds
        Wall-clock time.
    bytes_down, bytes_up
        Bytes of all messages of the round, to all clients and from all clients.
    failures
        Number of clients, of those asked, without a usable answer.
    """

    stage: str
    round: int
    clients: int
    loss: float
    accuracy: float
    seconds: float
    bytes_down: int
    bytes_up: int
    failures: int


ROUND_COLUMNS = names_of(RoundLine)
"""Columns of ``rounds.csv``."""


@dataclass(frozen=True)
class FailureLine:
    """One line of ``failures.csv``: which client had no usable answer in which round, and why."""

    stage: str
    round: int
    client: str
    reason: str


FAILURE_COLUMNS = names_of(FailureLine)
"""Columns of ``failures.csv``."""


def values_of(line: object, columns: Sequence[str]) -> list[Any]:
    """Return an object's attributes in the order of some columns."""
    return [getattr(line, name) for name in columns]


FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a text begins with that a spreadsheet takes for a formula."""


def to_csv(lines: Iterable[Sequence[Any]]) -> str:
    """Return lines of values as CSV.

    A text that a spreadsheet would run gets an apostrophe in front, as OWASP advises.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_plain(v) for v in line] for line in lines)
    return text.getvalue()


def _plain(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
