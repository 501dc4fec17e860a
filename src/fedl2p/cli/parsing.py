"""Parse a command's options by tyro, whose errors become one line."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

HELP = frozenset({"-h", "--help", "--help-all"})


def parse(cli: Callable[..., Any], args: Sequence[str], *, prog: str, **settings: Any) -> Any:
    """Return what ``tyro.cli`` or an application's ``cli`` makes of the arguments.

    Raises
    ------
    ValueError
        With one line, if the arguments do not fit.
    SystemExit
        After help was printed.
    """
    from tyro.conf import PositionalMetavarFromFieldName

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), _unwrapped(HELP.isdisjoint(args)):
            return cli(args=args, prog=prog, config=(PositionalMetavarFromFieldName,), **settings)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(one_line(errors.getvalue())) from None


def one_line(box: str) -> str:
    """Return the message in a box that tyro drew: without helptexts of options, in one line."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    _, *lines = (line.strip("│ ") for line in plain.splitlines())
    rules = r"^[─-]+$|^╰.*$"
    first, *others = filter(None, map(str.strip, re.split(rules, "\n".join(lines), flags=re.M)))
    message = re.sub(r"^Error parsing (?:study\.)?(\S+):", r"\1:", " ".join(first.split()))
    message = re.sub(r"^Expected one of (.*?)\.?$", r"missing: one of \1", message)
    message = message[:1].lower() + message[1:].rstrip(".")
    for paragraph in others:
        text = " ".join(paragraph.split())
        if text.startswith("Perhaps you meant"):
            message += "; perhaps you meant " + " or ".join(re.findall(r"(?m)^--\S+", paragraph))
        elif text.startswith("Available"):
            message += f"; a{text[1:]}"
        elif text.startswith("For full helptext"):
            message += "; see" + re.sub(r"^For full helptext, (run|see):?", "", text)
    return message


@contextlib.contextmanager
def _unwrapped(active: bool) -> Iterator[None]:
    """Make tyro's boxes too wide for a line break; :func:`one_line` reads them."""
    before = os.environ.get("COLUMNS")
    if active:
        os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if active:
            os.environ.pop("COLUMNS")
            if before is not None:
                os.environ["COLUMNS"] = before
