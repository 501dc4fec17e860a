"""Records of a stage's rounds, and the state that it ends with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from fedl2p.method import State
from fedl2p.runs.columns import RoundLine, names_of


@dataclass(frozen=True)
class RoundRecord(RoundLine):
    """One round: its line of ``rounds.csv``, and what else is known of it.

    Parameters
    ----------
    bytes_model
        The part of ``bytes_down`` that is the frozen model, which is sent to each client once.
    reasons
        Why each of the ``failures`` had no usable answer, one line by client name: the lines of
        ``failures.csv``.
    """

    bytes_model: int = 0
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)


BYTES = tuple(name for name in names_of(RoundRecord) if name.startswith("bytes"))
"""The fields that count bytes, which answers have too."""


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
