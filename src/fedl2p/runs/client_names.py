"""Names of clients that are safe in a log, a terminal, a table and as names of files."""

from __future__ import annotations

from fedl2p.runs import layout
from fedl2p.runs.columns import FORMULA

LONGEST_NAME = 200
"""Most characters of a client's name as that of a file; with suffixes, systems allow 255."""


def check_name(name: str) -> None:
    """Refuse a client's name that could do harm in a log, a terminal, a table or as a file's name.

    Raises
    ------
    ValueError
        If it is not one line of printable text, too long, or begins like a spreadsheet's formula.
    """
    if not name or not name.isprintable():
        raise ValueError(
            f"the name of the client {name[:30]!a} is not one line of printable text in UTF-8; "
            "rename it, or the file that it is called like"
        )
    if len(name) > LONGEST_NAME or len(layout.as_file_name(name)) > LONGEST_NAME:
        raise ValueError(
            f"the name of the client {name[:30]!a}... is too long for a file of it; shorten it, or "
            "the name of the file that it is called like"
        )
    if name.startswith(FORMULA):
        raise ValueError(
            f"the name of the client {name[:30]!a} begins with {name[0]!r}, which a spreadsheet "
            "takes for a formula; rename it, or the file that it is called like"
        )
