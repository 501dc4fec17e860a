"""Where the rounds of a stage stand, in memory and as a checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedl2p.federation.checkpoints import Checkpoint
from fedl2p.federation.round_records import Federated, RoundRecord
from fedl2p.federation.settings import Rounds
from fedl2p.method import State

_PLAIN = ("round", "made_in", "best_round", "best_loss", "averaged", "waited", "dry")
_FLAGS = ("finished", "stopped_early")


@dataclass
class Position:
    """The loop's whole state besides what strategy and clients remember.

    Parameters
    ----------
    state, made_in
        The current state and the round that made it (0: the start).
    best_state, best_round, best_loss
        The state with the lowest loss so far; None before any is judged.
    average, averaged
        Moving average of the states made so far (Polyak averaging), and how many entered.
    round
        Rounds done.
    waited
        Rounds since the loss was last lower.
    dry
        Rounds in a row with too few good answers.
    """

    state: State
    made_in: int = 0
    best_state: State = field(default_factory=dict)
    best_round: int = 0
    best_loss: float | None = None
    average: State = field(default_factory=dict)
    averaged: int = 0
    round: int = 0
    waited: int = 0
    dry: int = 0
    finished: bool = False
    stopped_early: bool = False
    records: list[RoundRecord] = field(default_factory=list)

    def judge(self, loss: float, *, patience: int) -> None:
        """Take note of the loss of the current state; finish if patience has run out."""
        if math.isnan(loss):
            return
        if self.best_loss is None or loss < self.best_loss:
            self.best_state, self.best_round, self.best_loss = self.state, self.made_in, loss
            self.waited = 0
            return
        self.waited += 1
        if patience and self.waited >= patience:
            self.finished = self.stopped_early = True

    def made(self, state: State, *, decay: float) -> None:
        """Take the state that this round has made, and let it enter the average.

        The average is the plain mean of the states until there are 1 / (1 - decay) of them, and
        forgets the older ones by ``decay`` per round from then on.
        """
        self.state, self.made_in = state, self.round
        self.averaged += 1
        share = max(1 - decay, 1 / self.averaged)
        self.average = {
            name: torch.lerp(self.average.get(name, tensor), tensor, share)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in state.items()
        }

    def result(self, rounds: Rounds) -> Federated:
        """Return the state to keep: the last where no loss is known."""
        if rounds.keep == "average" and self.averaged:
            return Federated(
                state=self.average,
                best_round=self.made_in,
                records=tuple(self.records),
                stopped_early=self.stopped_early,
            )
        last = rounds.keep != "best" or self.best_loss is None
        return Federated(
            state=self.state if last else self.best_state,
            best_round=self.made_in if last else self.best_round,
            records=tuple(self.records),
            stopped_early=self.stopped_early,
        )

    def to_checkpoint(
        self,
        *,
        job: Mapping[str, Any],
        memory: State,
        kept: Mapping[str, State],
        has_model: tuple[str, ...],
    ) -> Checkpoint:
        """Return everything that continuing needs.

        Parameters
        ----------
        job
            What identifies the stage: a checkpoint of another one is refused.
        memory
            What the server optimizer remembers.
        kept
            What clients in this process keep, by client.
        has_model
            Clients that have been sent the frozen model.
        """
        values = {name: getattr(self, name) for name in (*_PLAIN, *_FLAGS)}
        values["records"] = [_finite(dataclasses.asdict(record)) for record in self.records]
        values |= {"job": dict(job), "clients": list(kept), "has_model": list(has_model)}
        groups = {"state": self.state, "best": self.best_state, "server": memory}
        groups["average"] = self.average
        groups |= {f"kept {name}": state for name, state in kept.items()}
        return Checkpoint(groups, values)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Position:
        """Return the position that was saved."""
        values = checkpoint.values
        for name in (*_PLAIN, *_FLAGS):
            kinds = {"best_loss": (float, int, type(None))}.get(name, (int,))
            if not isinstance(values[name], kinds):
                raise TypeError(f"{name} is {values[name]!r}")
        return cls(
            state=checkpoint.groups["state"],
            best_state=checkpoint.groups["best"],
            average=checkpoint.groups["average"],
            records=[RoundRecord(**_with_nan(record)) for record in values["records"]],
            **{name: values[name] for name in (*_PLAIN, *_FLAGS)},
        )


def refuse_other_job(folder: Path, saved: Mapping[str, Any], job: Mapping[str, Any]) -> None:
    """Raise if a checkpoint belongs to another stage, and name the first difference.

    Raises
    ------
    ValueError
        If any entry differs.
    """
    for name in (*job, *(saved.keys() - job.keys())):
        if saved.get(name) != job.get(name):
            raise ValueError(
                f"the checkpoint in {folder} is of another run: {name} is {saved.get(name)!r} "
                f"there and {job.get(name)!r} here; use the same settings or another folder"
            )


def _with_nan(record: dict[str, Any]) -> dict[str, Any]:
    return {k: math.nan if v is None else v for k, v in record.items()}


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    # JSON has no NaN.
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()}
