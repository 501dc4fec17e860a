"""Reading and writing the small files of a run's folder, with errors that say what to do."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from fedl2p import atomic_files
from fedl2p.runs.validation import from_plain, from_text

T = TypeVar("T")

LARGEST_TABLE = 1 << 30
"""Most bytes of a table, or of another file that grows with the number of clients."""


def missing(path: Path) -> ValueError:
    """Return the error for a file that a finished run has and this folder lacks."""
    return ValueError(
        f"{path} is missing; give the folder of a finished run, or finish this one with "
        f"`fedl2p run RECIPE --out {path.parent} --resume`"
    )


def damaged(path: Path, why: str) -> ValueError:
    """Return the error for a file that cannot be understood. ``why`` says what is wrong with it."""
    return ValueError(
        f"{path} is damaged: {why}; restore it from a copy, or run again into a new folder"
    )


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader finds the old or the new content, never a part.

    Raises
    ------
    ValueError
        If the folder does not exist.
    OSError
        If the disk does not take it; the old content is still there then.
    """
    if not path.parent.is_dir():
        raise ValueError(
            f"folder {path.parent} does not exist; create it before writing {path.name}"
        )
    atomic_files.write_text(path, text)


def without_infinities(value: Any) -> Any:
    """Return JSON values with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_infinities(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def with_number(number: float, value: Any) -> Any:
    """Return JSON values with a number in place of every null."""
    if isinstance(value, dict):
        return {key: with_number(number, item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_number(number, item) for item in value]
    return number if value is None else value


def read_json(path: Path, *, limit: int = atomic_files.SMALL) -> dict[str, Any]:
    """Read a JSON file whose top level is an object, of at most ``limit`` bytes.

    Raises
    ------
    ValueError
        If the file is missing, is not JSON, or holds something else at its top level.
    """
    text = _read_text(path, limit)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise damaged(path, f"not JSON at line {error.lineno} ({error.msg})") from None
    except RecursionError:
        raise damaged(path, "it is nested too deeply") from None
    except ValueError as error:  # e.g. a number of more digits than Python converts
        raise damaged(path, f"not JSON that can be read ({error})") from None
    if not isinstance(content, dict):
        raise damaged(path, f"its top level is a {type(content).__name__}, not an object")
    return content


def read_fields(path: Path, kind: type[T], *, limit: int = atomic_files.SMALL) -> T:
    """Read a JSON file of the fields of a dataclass.

    Raises
    ------
    ValueError
        If the file is missing or damaged, or a field is missing, unknown or of another type.
    """
    content = read_json(path, limit=limit)
    try:
        return from_plain(kind, content)
    except ValueError as error:
        raise damaged(path, str(error)) from None


def read_table(path: Path, kind: type[T], columns: Sequence[str]) -> list[T]:
    """Read a CSV file that has at least these columns, as one object of a dataclass per line.

    Raises
    ------
    ValueError
        If the file is missing, lacks a column, or a line has too few or too many fields or a value
        of another type.
    """
    # Not splitlines: a quoted name may hold anything that looks like the end of a line.
    text = io.StringIO(_read_text(path, LARGEST_TABLE), newline="")
    reader = csv.DictReader(text, strict=True)
    try:
        absent = [column for column in columns if column not in (reader.fieldnames or ())]
        lines = list(reader)
    except csv.Error as error:
        raise damaged(path, f"not CSV at line {reader.line_num} ({error})") from None
    if absent:
        raise damaged(path, f"it has no column {', '.join(absent)}")
    made = []
    for number, line in enumerate(lines, 2):
        if None in line or None in line.values():
            raise damaged(path, f"line {number} does not have one field per column")
        try:
            made.append(from_text(kind, {column: line[column] for column in columns}))
        except ValueError as error:
            raise damaged(path, f"line {number}: {error}") from None
    return made


def _read_text(path: Path, limit: int) -> str:
    try:
        return atomic_files.read_text(path, limit=limit)
    except (FileNotFoundError, NotADirectoryError):
        raise missing(path) from None
    except UnicodeDecodeError:
        raise damaged(path, "it is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); give a file that can"
        ) from None
    except ValueError as error:
        raise damaged(path, str(error)) from None
