"""Bars to both sides of zero: what each profile entry added to one number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedl2p.explain.explanation import Entry, Moved
from fedl2p.explain.sentences import amount
from fedl2p.reporting.axes import Axis, upright_lines
from fedl2p.reporting.svg import LONGEST_NAME, drawing, element, text, title

MOST_BARS = 9
"""Entries with a bar of their own; the others share one."""
ROW = 34.0
SPACE = 8.0
"""Above the last bar, the sum, pixels."""

LABEL_ROOM = 0.3
"""Numbers of ticks nearer to each other than this part of the axis would touch on a phone."""


@dataclass(frozen=True)
class _Bar:
    name: str
    note: str
    full: str
    part: float
    whole: bool = False


def part_bars(moved: Moved, entries: Sequence[Entry], *, label: str, description: str) -> str:
    """Return one bar per entry, the longest first, then the other entries, then the sum.

    Parameters
    ----------
    moved
        What the entries moved.
    entries
        In the order of its parts.
    label, description
        What it shows, for those who hear the page.
    """
    bars = _bars(moved, entries)
    axis = Axis.around([0.0, *(bar.part for bar in bars)], 4)
    bottom = ROW * len(bars) + SPACE
    parts = [
        upright_lines(
            axis,
            top=0.0,
            bottom=bottom,
            words_at=bottom + 16,
            words=lambda tick: amount(moved, tick) if _labelled(tick, axis) else "",
        )
    ]
    for i, bar in enumerate(bars):
        middle = (i + 0.5) * ROW + (SPACE if bar.whole else 0.0)
        parts.append(_drawn(bar, axis, middle, amount(moved, bar.part)))
    return drawing("".join(parts), height=bottom + 22, label=label, description=description)


def gutter(entries: Sequence[Entry]) -> str:
    """Return the width that entry names and their numbers need left of a figure, as CSS."""
    names = max((len(entry.short(LONGEST_NAME)) for entry in entries), default=0)
    notes = max((len(_note(entry)) for entry in entries), default=0)
    return f"{26 + max(6.4 * max(names, 13), 5.6 * notes):.0f}px"


def _bars(moved: Moved, entries: Sequence[Entry]) -> list[_Bar]:
    order = sorted(range(len(entries)), key=lambda i: -abs(moved.parts[i]))
    # One entry alone is not "others".
    own = order if len(order) <= MOST_BARS + 1 else order[:MOST_BARS]
    bars = [
        _Bar(
            entries[i].short(LONGEST_NAME),
            _note(entries[i]),
            entries[i].name,
            moved.parts[i],
        )
        for i in own
    ]
    rest = order[len(own) :]
    if rest:
        words = f"{len(rest)} other entries"
        bars.append(_Bar(words, "their sum", words, sum(moved.parts[i] for i in rest)))
    return [*bars, _Bar("all together", "the change", "all entries", moved.change, whole=True)]


def _note(entry: Entry) -> str:
    value, typical = entry.numbers
    return f"{value}{entry.unit}, typical {typical}"


def _labelled(tick: float, axis: Axis) -> bool:
    """Tell whether a tick gets its number: zero, and an end that is far enough from it."""
    end = tick in (axis.ticks[0], axis.ticks[-1])
    return tick == 0 or (end and abs(tick) >= LABEL_ROOM * (axis.high - axis.low))


def _drawn(bar: _Bar, axis: Axis, middle: float, amount: str) -> str:
    low, high = sorted((axis.place(0.0), axis.place(bar.part)))
    kind = "whole" if bar.whole else "up" if bar.part > 0 else "down"
    number = text(amount, x=50, y=middle + 4, text_anchor="end", class_="value")
    return "".join(
        [
            text(bar.name, x=-10, y=middle - 1, text_anchor="end", class_="name"),
            text(bar.note, x=-10, y=middle + 12, text_anchor="end", class_="small"),
            element(
                "rect",
                title(f"{bar.full}: {bar.note}, {amount}"),
                x=f"{100 * low:.2f}%",
                width=f"{100 * (high - low):.2f}%",
                y=middle - 9,
                height=18,
                class_=kind,
            ),
            # The number stands in the right margin: a nested drawing at the right edge.
            element("svg", number, x="100%", y="0", width="1", height="1", class_="box"),
        ]
    )
