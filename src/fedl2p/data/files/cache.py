"""Decoded examples of a data set in one memory-mapped file, shared by all its clients.

A cache is a folder with ``x.npy`` (all examples, first dimension) and ``columns.json`` (its key and
one list per column, e.g. the labels). It is built in a temporary folder and renamed, so that it is
either complete or absent. Processes that open it share the pages of the file; a client copies only
its rows.
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
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

FORMAT = 1
"""Raised when the layout of a cache changes: older ones are then built again."""

# Text, so that sources can be imported without loading numpy.
Allocate: TypeAlias = "Callable[[tuple[int, ...], DTypeLike], np.ndarray]"
"""``allocate(shape, dtype)``: the array of all examples, to be filled in place; call it once."""

Columns = dict[str, list[Any]]
"""Lists of numbers or text by name; they need not be equally long."""


@dataclass(frozen=True)
class DecodedExamples:
    """A data set's decoded examples.

    Parameters
    ----------
    x
        All examples, memory-mapped, read-only.
    columns
        The lists that are stored beside them, by name.
    """

    x: np.ndarray
    columns: Mapping[str, list[Any]]

    def column(self, name: str) -> np.ndarray:
        """Return a column of numbers as int64."""
        return np.asarray(self.columns[name], dtype=np.int64)


def fingerprint(files: Sequence[Path]) -> list[list[Any]]:
    """Return name, size and modification time of the source files of a cache.

    Part of a cache's key: a file that is replaced makes the cache old.
    """
    stats = [(file, file.stat()) for file in files]
    return [[file.name, stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def open_cache(
    place: Path, *, key: Mapping[str, Any], build: Callable[[Allocate], Columns]
) -> DecodedExamples:
    """Open a cache; build it first if there is none for this key.

    Parameters
    ----------
    place
        The cache's folder, e.g. ``data/cifar10/cache/all``.
    key
        Plain values on which the content depends; usually with a :func:`fingerprint`. A cache with
        another key is replaced.
    build
        Gets ``allocate``, fills the array it returns, and returns the columns.

    Raises
    ------
    ValueError
        If the folder cannot be written. Errors of ``build`` are passed on. Nothing is left then.
    """
    key = json.loads(json.dumps({"format": FORMAT, **key}))
    cache = _open(place, key)
    if cache is not None:
        return cache
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
        _build(temporary, key, build)
        _rename(temporary, place)
    except OSError as problem:
        raise ValueError(
            f"cannot write the decoded data into {place} ({problem.strerror or problem}); free "
            "some space, or name another root folder"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # a new folder that is not empty stays
            for folder in new:
                folder.rmdir()
    cache = _open(place, key)
    if cache is None:
        raise ValueError(f"{place} was changed while it was made; try again")
    return cache


def _open(place: Path, key: Mapping[str, Any]) -> DecodedExamples | None:
    """Return the cache, or None if it is missing, damaged or of another key."""
    try:
        content = json.loads((place / "columns.json").read_text(encoding="utf-8"))
        if content["key"] != key:
            return None
        x = np.load(place / "x.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    return DecodedExamples(x, content["columns"])


def _build(folder: Path, key: Mapping[str, Any], build: Callable[[Allocate], Columns]) -> None:
    arrays: list[np.memmap[Any, Any]] = []

    def allocate(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        assert not arrays, "a cache holds one array"
        place = folder / "x.npy"
        arrays.append(np.lib.format.open_memmap(place, mode="w+", dtype=dtype, shape=shape))
        return arrays[0]

    columns = build(allocate)
    arrays.pop().flush()
    with (folder / "columns.json").open("w", encoding="utf-8") as file:
        json.dump({"key": key, "columns": columns}, file)
    for name in ("x.npy", "columns.json"):
        with (folder / name).open("rb+") as written:
            os.fsync(written.fileno())
    folder.chmod(0o755)  # mkdtemp makes it private


def _rename(temporary: Path, place: Path) -> None:
    """Rename the finished folder to its place; an older cache there is removed."""
    if place.exists():
        old = temporary.with_name(temporary.name + ".old")
        place.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    try:
        temporary.rename(place)
    except OSError:
        if not place.exists():  # else another process was faster: its cache is as good
            raise
