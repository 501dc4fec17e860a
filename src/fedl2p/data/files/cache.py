"""Decoded examples of a data set in one memory-mapped file, shared by all its clients.

A cache is a folder with ``x.npy`` (all examples, first dimension) and ``columns.json`` (the key it
was made for, and one list per column, e.g. the labels). It is built in a temporary folder beside
its place and renamed, so that it is there completely or not at all. Processes that open it share
the pages of the file; a client copies only its own rows.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap

FORMAT = 1
"""Raised when the layout of a cache changes: older ones are then built again."""

Allocate = Callable[[tuple[int, ...], "np.typing.DTypeLike"], np.ndarray]
"""``allocate(shape, dtype)``: the array of all examples, to be filled in place; call it once."""

Columns = dict[str, list[Any]]
"""Plain values (numbers or text), one list per column, as many as it needs."""


@dataclass(frozen=True)
class Cached:
    """A data set's decoded examples.

    Parameters
    ----------
    x
        All examples, memory-mapped, read-only.
    columns
        What was stored beside them: lists of plain values.
    """

    x: np.ndarray
    columns: Mapping[str, list[Any]]

    def column(self, name: str) -> np.ndarray:
        """Return a column of numbers as int64."""
        return np.asarray(self.columns[name], dtype=np.int64)


def fingerprint(files: Sequence[Path]) -> list[list[Any]]:
    """Return name, size and time of change of the files that a cache is made from.

    Part of a cache's key: a file that is replaced makes the cache old.
    """
    found = [(file, file.stat()) for file in files]
    return [[file.name, stat.st_size, stat.st_mtime_ns] for file, stat in found]


def cached(place: Path, *, key: Mapping[str, Any], build: Callable[[Allocate], Columns]) -> Cached:
    """Open a cache, and build it first if there is none for this key.

    Parameters
    ----------
    place
        The cache's folder, e.g. ``data/cifar10/cache/all``.
    key
        Plain values that say what it is made from and how; usually with a :func:`fingerprint`.
        A cache with another key is replaced.
    build
        Gets ``allocate``, fills the array it returns, and returns the columns.

    Returns
    -------
    Cached
        The examples and their columns.

    Raises
    ------
    ValueError
        If the folder cannot be written. What ``build`` raises is passed on; nothing is left then.
    """
    wanted = json.loads(json.dumps({"format": FORMAT, **key}))
    found = _open(place, wanted)
    if found is not None:
        return found
    new = [folder for folder in place.parents if not folder.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(
            tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}.", suffix=".tmp")
        )
    except OSError as problem:
        raise ValueError(
            f"cannot write into {place.parent} ({problem.strerror}); decoded data is kept there: "
            "make it writable, or name another root folder"
        ) from None
    try:
        _build(temporary, wanted, build)
        _put(temporary, place)
    except OSError as problem:
        raise ValueError(
            f"cannot write the decoded data into {place} ({problem.strerror or problem}); free "
            "some space, or name another root folder"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # those in which something lies by now stay
            for folder in new:
                folder.rmdir()
    built = _open(place, wanted)
    if built is None:
        raise ValueError(f"{place} was changed while it was made; try again")
    return built


def _open(place: Path, wanted: Any) -> Cached | None:
    """Return the cache if it is there, whole, and of this key."""
    try:
        content = json.loads((place / "columns.json").read_text(encoding="utf-8"))
        if content["key"] != wanted:
            return None
        x = np.load(place / "x.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None  # missing or damaged: it is built again
    return Cached(x, content["columns"])


def _build(folder: Path, key: Any, build: Callable[[Allocate], Columns]) -> None:
    arrays: list[np.memmap[Any, Any]] = []

    def allocate(shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
        assert not arrays, "a cache holds one array"
        arrays.append(open_memmap(folder / "x.npy", mode="w+", dtype=dtype, shape=shape))
        return arrays[0]

    columns = build(allocate)
    arrays.pop().flush()
    with (folder / "columns.json").open("w", encoding="utf-8") as file:
        json.dump({"key": key, "columns": columns}, file)
    for name in ("x.npy", "columns.json"):
        with (folder / name).open("rb+") as written:
            os.fsync(written.fileno())
    folder.chmod(0o755)  # mkdtemp makes it private


def _put(made: Path, place: Path) -> None:
    """Rename the finished folder into its place; an older cache there goes."""
    if place.exists():
        old = made.with_name(made.name + ".old")
        place.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    try:
        made.rename(place)
    except OSError:
        if not place.exists():  # else another process was faster: its cache is as good
            raise
