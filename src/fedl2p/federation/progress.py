"""How far the rounds of a stage have come, in memory and as checkpoints that no crash can spoil.

A checkpoint is one safetensors file per round. It holds the tensors, and in its header everything
else as JSON with a hash over both. The newest two are kept; a damaged newest falls back to the one
before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fedl2p.atomic_files import write_tensors
from fedl2p.federation.messages import content_hash
from fedl2p.federation.round_records import Federated, RoundRecord
from fedl2p.federation.settings import Rounds
from fedl2p.method import State

log = logging.getLogger("fedl2p")

_PLAIN = ("round", "made_in", "best_round", "best_loss", "averaged", "waited", "dry")
_FLAGS = ("finished", "stopped_early")

_NAME = re.compile(r"round-(\d{6})\.safetensors")
_KEPT = 2


@dataclass
class Progress:
    """The loop's whole state besides what server optimizer and clients remember.

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
        """Note the loss of the current state; finish if patience has run out."""
        if math.isnan(loss):
            return
        if self.best_loss is None or loss < self.best_loss:
            self.best_state, self.best_round, self.best_loss = self.state, self.made_in, loss
            self.waited = 0
            return
        self.waited += 1
        if patience and self.waited >= patience:
            self.finished = self.stopped_early = True

    def advance(self, state: State, *, decay: float) -> None:
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
        state, made_in = self.state, self.made_in
        if rounds.keep == "average" and self.averaged:
            state = self.average
        elif rounds.keep == "best" and self.best_loss is not None:
            state, made_in = self.best_state, self.best_round
        return Federated(
            state=state,
            best_round=made_in,
            records=tuple(self.records),
            stopped_early=self.stopped_early,
        )

    def to_checkpoint(
        self,
        *,
        job: Mapping[str, Any],
        optimizer: State,
        kept: Mapping[str, State],
        has_model: list[str] | None,
    ) -> Checkpoint:
        """Return everything that continuing needs.

        Parameters
        ----------
        job
            What identifies the stage: a checkpoint of another one is refused.
        optimizer
            What the server optimizer remembers.
        kept
            What clients on this machine keep, by client.
        has_model
            Clients that have been sent the frozen model; None for all.
        """
        values = {name: getattr(self, name) for name in (*_PLAIN, *_FLAGS)}
        values["records"] = [_finite(dataclasses.asdict(record)) for record in self.records]
        values |= {"job": dict(job), "clients": list(kept), "has_model": has_model}
        groups = {"state": self.state, "best": self.best_state, "server": optimizer}
        groups["average"] = self.average
        groups |= {f"kept {name}": state for name, state in kept.items()}
        return Checkpoint(groups, values)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Progress:
        """Return the progress that was saved."""
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


@dataclass(frozen=True)
class Checkpoint:
    """Named groups of tensors, and plain values with a JSON form."""

    groups: dict[str, State]
    values: dict[str, Any]


def save(folder: Path, round: int, checkpoint: Checkpoint) -> None:
    """Write the checkpoint of a round and remove all but the newest two.

    When this returns, the file is on the disk; until then, the older ones are untouched.

    Raises
    ------
    OSError
        If the disk does not take it; the older checkpoints are still there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Groups and names may hold any character, so tensors go by number and the header says which.
    tensors: State = {}
    index: list[list[str]] = []
    for group, state in checkpoint.groups.items():
        for name, tensor in state.items():
            tensors[str(len(index))] = tensor
            index.append([group, name])
    header = json.dumps(
        {"groups": list(checkpoint.groups), "index": index, "values": checkpoint.values},
        allow_nan=False,
    )
    metadata = {"fedl2p": header, "hash": _hash(tensors, header)}
    path = folder / f"round-{round:06d}.safetensors"
    write_tensors(path, tensors, metadata=metadata)
    _remove(_paths(folder)[_KEPT:])


def load_newest(folder: Path) -> Checkpoint | None:
    """Return the newest sound checkpoint of a folder, or None if there is none at all.

    A damaged one is named in the log and the one before it is taken. Older ones that a process
    killed during ``save`` could not remove any more are removed.

    Raises
    ------
    ValueError
        If there are checkpoints, but every one is damaged.
    """
    paths = _paths(folder)
    for place, path in enumerate(paths):
        try:
            newest = _load(path)
        except (
            *(SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError),
            RecursionError,
        ) as error:
            log.warning("checkpoint %s is damaged (%s); taking the one before", path, error)
        else:
            _remove(paths[max(_KEPT, place + 1) :])
            return newest
    if paths:
        raise ValueError(
            f"every checkpoint in {folder} is damaged; remove that folder to start this stage again"
        )
    return None


def exist(folder: Path) -> bool:
    """Return whether a folder holds checkpoints."""
    return bool(_paths(folder))


def _load(path: Path) -> Checkpoint:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        header = metadata["fedl2p"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if _hash(tensors, header) != metadata["hash"]:
        raise ValueError("its content does not match its hash")
    content = json.loads(header)
    groups: dict[str, State] = {group: {} for group in content["groups"]}
    for number, (group, name) in enumerate(content["index"]):
        if not isinstance(name, str):
            raise TypeError(f"a tensor's name is {name!r}, not a text")
        groups[group][name] = tensors[str(number)]
    return Checkpoint(groups, content["values"])


def _hash(tensors: State, header: str) -> str:
    return hashlib.blake2b((content_hash(tensors) + header).encode(), digest_size=16).hexdigest()


def _remove(old: list[Path]) -> None:
    for path in old:
        path.unlink(missing_ok=True)


def _paths(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True)
