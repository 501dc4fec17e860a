"""Checkpoints of a stage: one safetensors file per round, written so that no crash can spoil it.

A file holds the tensors, and in its header everything else as JSON with a hash over both. The
newest two are kept; a damaged newest falls back to the one before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fedl2p.atomic_files import write_tensors
from fedl2p.federation.flower.records import content_hash
from fedl2p.method import State

log = logging.getLogger("fedl2p")

_NAME = re.compile(r"round-(\d{6})\.safetensors")
_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """Named groups of tensors, and plain values with a JSON form."""

    groups: dict[str, State]
    values: dict[str, Any]


def save(folder: Path, position: int, checkpoint: Checkpoint) -> None:
    """Write the checkpoint of one position (a round) and remove all but the newest two.

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
    path = folder / f"round-{position:06d}.safetensors"
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
    """Tell whether a folder holds checkpoints."""
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
