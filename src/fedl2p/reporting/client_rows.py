"""Where each client's row lies in the pictures of strategies, and what is written at its left."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from fedl2p.reporting.client_views import ClientView, Group, describe
from fedl2p.reporting.svg import LONGEST_NAME, element, shorten, text, title

TALL = 24.0
"""Rows of this height, in pixels, have room for the client's name."""
GAP = 6.0


@dataclass(frozen=True)
class Rows:
    """Rows of one height in groups, all in pixels from the top of the drawing.

    ``head`` is kept free above the first row; ``starts`` are the tops of the groups; ``bottom`` is
    where the last row ends.
    """

    groups: tuple[Group, ...]
    head: float
    height: float
    starts: tuple[float, ...]
    bottom: float

    @classmethod
    def of(cls, groups: Sequence[Group], head: float) -> Rows:
        """Lay out groups so that some tens of clients and a thousand both fit about a screen."""
        count = sum(len(group.clients) for group in groups)
        height = min(28.0, max(0.8, 660.0 / max(1, count)))
        starts, top = [], head
        for group in groups:
            starts.append(top)
            top += len(group.clients) * height + GAP
        return cls(tuple(groups), head, height, tuple(starts), top - GAP)

    def places(self) -> Iterator[tuple[ClientView, float]]:
        """Yield every client with the top of its row."""
        for group, top in zip(self.groups, self.starts, strict=True):
            for i, view in enumerate(group.clients):
                yield view, top + i * self.height


def row_names(rows: Rows) -> str:
    """Write the names of clients, where they fit, or of groups, and mark seen and unseen rows."""
    names = _client_names(rows) if rows.height >= TALL else _group_names(rows)
    marks = [
        _pool_mark(group, top, rows.height)
        for group, top in zip(rows.groups, rows.starts, strict=True)
    ]
    return element("g", "".join([*names, *marks]), class_="rows")


def row_tooltips(rows: Rows) -> str:
    """Lay a tooltip over every row that a pointer can hit."""
    if rows.height < 2:
        return ""
    return "".join(
        element(
            "rect",
            title(describe(view)),
            x="0",
            width="100%",
            y=y,
            height=rows.height,
            class_="hover",
        )
        for view, y in rows.places()
    )


def _client_names(rows: Rows) -> list[str]:
    parts = []
    for view, y in rows.places():
        middle = y + rows.height / 2
        for words, down, kind in ((view.name, -1, "name"), (view.kind, 10, "small")):
            name = shorten(words, LONGEST_NAME)
            parts.append(text(name, x=-12, y=middle + down, text_anchor="end", class_=kind))
    return parts


def _group_names(rows: Rows) -> list[str]:
    parts, free = [], -math.inf
    for group, top in zip(rows.groups, rows.starts, strict=True):
        height = len(group.clients) * rows.height
        middle = max(top + height / 2, free)
        # A name that would be pushed below its own rows by the one above is left out.
        if middle <= top + height + GAP:
            name = shorten(group.label, LONGEST_NAME)
            parts.append(text(name, x=-12, y=middle + 4, text_anchor="end", class_="name"))
            free = middle + 13
    return parts


def _pool_mark(group: Group, top: float, height: float) -> str:
    parts, start = [], 0
    for pool, members in groupby(group.clients, key=lambda view: view.pool):
        count = len(list(members))
        parts.append(
            element(
                "rect",
                title(f"{group.label}: {count} {pool}"),
                x=-7,
                width=4,
                y=top + start * height + 0.5,
                height=max(0.5, count * height - 1),
                class_=pool,
            )
        )
        start += count
    return "".join(parts)
