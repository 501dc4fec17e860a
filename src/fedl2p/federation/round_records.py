"""What a stage leaves behind: one record per round, and the state that it ends with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedl2p.method import State


@dataclass(frozen=True)
class RoundRecord:
    """One round; the fields but the last two are the columns of ``rounds.csv``.

    Parameters
    ----------
    stage
        ``pretrain``, ``learn`` or the name of a method.
    round
        From 1. One more than the stage has rounds: the pass that only judges the last state.
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
    bytes_model
        The part of ``bytes_down`` that is the frozen model on its one journey to each client.
    reasons
        Why each of the ``failures`` had none, one line by client name: the lines of
        ``failures.csv``.
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
    bytes_model: int = 0
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def line(self) -> tuple[Any, ...]:
        """Return the values of a line of ``rounds.csv``."""
        return tuple(getattr(self, name) for name in COLUMNS)


_NO_COLUMNS = ("bytes_model", "reasons")

COLUMNS = tuple(f.name for f in dataclasses.fields(RoundRecord) if f.name not in _NO_COLUMNS)
"""The columns of ``rounds.csv``."""

FAILURE_COLUMNS = ("stage", "round", "client", "reason")
"""The columns of ``failures.csv``."""


@dataclass(frozen=True)
class Federated:
    """The end of a stage.

    Parameters
    ----------
    state
        The state kept: the best or the last, as ``Rounds.keep`` says.
    best_round
        The round that made it; 0 for the state of the start.
    records
        All rounds, from the first, also those before a resumption.
    stopped_early
        Whether patience ran out.
    """

    state: State
    best_round: int
    records: tuple[RoundRecord, ...]
    stopped_early: bool
