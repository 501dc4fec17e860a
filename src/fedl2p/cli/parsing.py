"""What a command line says, in fields; and what is wrong with it, in one line."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from typing import Any, TypeVar

T = TypeVar("T")

_EXTRAS = {
    "flwr": "flower",
    "ray": "ray",
    "sklearn": "data",
    "soundfile": "audio",
    "scipy": "report",
    "jinja2": "report",
    "matplotlib": "report",
    "captum": "explain",
    "tyro": "cli",
    "rich": "cli",
}


class UsageError(Exception):
    """What the user gave cannot be used; the message is one line that says what to do."""


def parse(kind: type[T], args: list[str], *, prog: str, **settings: Any) -> T:
    """Parse a command's fields; tyro's boxed messages become one line."""
    import tyro

    asks_help = any(arg in ("-h", "--help") for arg in args)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _wide(not asks_help):
            parsed: T = tyro.cli(kind, args=args, prog=prog, **settings)
            return parsed
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(one_line(said.getvalue())) from None


def one_line(boxed: str) -> str:
    """Return the message of one of tyro's boxes: what is inside, up to the first rule, in one line.

    Hints at options of similar names, which stand below the first rule, are appended.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", boxed)
    lines = [line.strip("│ ") for line in plain.splitlines() if line.strip()]
    # Where the terminal has no box characters, the title is the first line, with a rule below it.
    lines = (
        [line for line in lines if not line.startswith(("╭", "╰"))] if "╭" in plain else lines[2:]
    )
    parts: list[list[str]] = [[]]
    for line in lines:
        if set(line) <= {"─", "-"}:
            parts.append([])
        else:
            parts[-1].append(line)
    message = re.sub(r"^Error parsing (\S+):", lambda m: m[1] + ":", " ".join(parts[0]))
    message = message[:1].lower() + message[1:]
    for part in parts[1:]:
        if part and part[0].startswith("Perhaps you meant"):
            similar = [line.split()[0] for line in part[1:] if line.startswith("--")]
            message += f"; perhaps you meant {' or '.join(similar)}"
    return message or "the command line cannot be understood; see fedl2p --help"


@contextlib.contextmanager
def _wide(wanted: bool) -> Iterator[None]:
    """Let tyro's boxes be so wide that no word is broken; what it shows is taken apart again."""
    before = os.environ.get("COLUMNS")
    if wanted:
        os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if wanted:
            os.environ.pop("COLUMNS")
            if before is not None:
                os.environ["COLUMNS"] = before


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn ValueError, the package's errors for users, into usage errors."""
    try:
        yield
    except ValueError as problem:
        raise UsageError(str(problem)) from problem


def missing_package(problem: ModuleNotFoundError) -> str:
    """Return what to say where a package is not installed: the extra that brings it."""
    package = (problem.name or "").partition(".")[0]
    if package not in _EXTRAS:
        return str(problem)
    return f"{package} is not installed; install it with: pip install 'fedl2p[{_EXTRAS[package]}]'"
