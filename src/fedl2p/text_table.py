"""Tables and short representations for a terminal and for a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Protocol


def columns(rows: Sequence[Sequence[str]], *, gap: int = 3) -> list[str]:
    """Return aligned lines; the first row is the head, and the first column stands left.

    A head may have several lines; ``gap`` spaces are between two columns.
    """
    heads = [cell.split("\n") for cell in rows[0]]
    high = max(map(len, heads))
    heads = [[*[""] * (high - len(head)), *head] for head in heads]
    rows = [*zip(*heads, strict=True), *rows[1:]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append(("  " + (" " * gap).join(cells)).rstrip())
    lines.insert(high, "  " + "-" * (sum(widths) + gap * (len(widths) - 1)))
    return lines


def html_table(rows: Sequence[Sequence[str]], *, caption: str = "") -> str:
    """Return a table for a notebook; the first row is the head, the first column stands left."""

    def line(cells: Sequence[str], tag: str) -> str:
        ends = ("left", *["right"] * (len(cells) - 1))
        pairs = zip(cells, ends, strict=True)
        inner = (f'<{tag} style="text-align:{end}">{escape(c)}</{tag}>' for c, end in pairs)
        return f"<tr>{''.join(inner)}</tr>"

    head = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "".join(line(row, "td") for row in rows[1:])
    return f"<table>{head}<thead>{line(rows[0], 'th')}</thead><tbody>{body}</tbody></table>"


class _Shown(Protocol):
    """What says its parts as rich's protocol has it."""

    def __rich_repr__(self) -> Iterable[tuple[str, object]]: ...


def short_repr(value: _Shown) -> str:
    """Return one line of the parts that ``__rich_repr__`` names."""
    parts = ", ".join(f"{name}={part!r}" for name, part in value.__rich_repr__())
    return f"{type(value).__name__}({parts})"


class Words(str):
    """Text that represents itself without quotation marks."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def span(values: Sequence[float], form: str = ".3g") -> Words:
    """Return the smallest and the largest of some numbers in words; ``none`` without any."""
    if not values:
        return Words("none")
    low, high = format(min(values), form), format(max(values), form)
    return Words(low if low == high else f"{low} to {high}")
