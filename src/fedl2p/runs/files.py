"""Reading and writing the small files of a run folder, with errors that say what to do."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedl2p.atomic_files import write_text


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
    write_text(path, text)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file whose top level is an object.

    Raises
    ------
    ValueError
        If the file is missing, is not JSON, or holds something else at its top level.
    """
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise damaged(path, f"not JSON at line {error.lineno} ({error.msg})") from None
    except RecursionError:
        raise damaged(path, "it is nested too deeply") from None
    except ValueError as error:
        if str(path) in str(error):
            raise
        # e.g. a number of more digits than Python converts
        raise damaged(path, f"not JSON that can be read ({error})") from None
    if not isinstance(content, dict):
        raise damaged(path, f"its top level is a {type(content).__name__}, not an object")
    return content


MADE_BY = "made_by"
"""The entry of config.json that is no setting: the versions that started the run."""


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a run's config.json; return the settings, and the versions that started the run.

    Raises
    ------
    ValueError
        If the file is missing or damaged.
    """
    settings = read_json(path)
    versions = settings.pop(MADE_BY, {})
    if not isinstance(versions, dict):
        raise damaged(path, f"{MADE_BY} is not an object of package names and versions")
    return settings, {str(name): str(version) for name, version in versions.items()}


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read a CSV file that has at least these columns, as one dictionary per line.

    Raises
    ------
    ValueError
        If the file is missing, lacks a column, or a line has too few or too many fields.
    """
    # Not splitlines: a quoted name may hold anything that looks like the end of a line.
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    try:
        absent = [column for column in columns if column not in (reader.fieldnames or ())]
        lines = list(reader)
    except csv.Error as error:
        raise damaged(path, f"not CSV at line {reader.line_num} ({error})") from None
    if absent:
        raise damaged(path, f"it has no column {', '.join(absent)}")
    for number_of_line, line in enumerate(lines, 2):
        if None in line or None in line.values():
            raise damaged(path, f"line {number_of_line} does not have one field per column")
    return lines


def number(path: Path, line: dict[str, str], column: str) -> float:
    """Return a field of a CSV line as a number; an empty field is NaN."""
    text = line[column].strip()
    try:
        return float(text) if text else float("nan")
    except ValueError:
        raise damaged(path, f"column {column} holds {text!r}, not a number") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise missing(path) from None
    except UnicodeDecodeError:
        raise damaged(path, "it is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); give a file that can"
        ) from None
