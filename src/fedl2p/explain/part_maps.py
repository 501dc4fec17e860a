"""Heat maps of an explanation: every profile entry against every hyperparameter."""

from __future__ import annotations

from collections.abc import Sequence

from fedl2p.explain.explanation import Explanation, Moved
from fedl2p.explain.sentences import amount
from fedl2p.reporting.strategy_panels import Panel, column_names, head_height, one_name_in
from fedl2p.reporting.svg import (
    BLUE_TO_ORANGE,
    LONGEST_NAME,
    Scale,
    drawing,
    element,
    png,
    text,
    title,
)

MOST_ROWS = 60
ROW = 19.0
MOST_TOOLTIPS = 1500
"""Beyond this many cells only whole rows have a tooltip: the page would grow by megabytes."""

Row = tuple[str, str, list[int]]
"""A short name, the whole one, and the entries whose parts are added up in the row."""


def part_maps(explanation: Explanation) -> list[Panel]:
    """Return a heat map of the mixes, if there are any, and one of the rates, rows level."""
    kinds = [moved for moved in (explanation.mixes, explanation.rates) if moved]
    columns = sum(map(len, kinds))
    head = max(head_height([m.name for m in kind]) for kind in kinds)
    rows = _rows(explanation)
    return [_panel(kind, rows, head, columns) for kind in kinds]


def _rows(explanation: Explanation) -> list[Row]:
    """Return the entries in the profile's order; of very many, those that pushed least as one."""
    shown = sorted(explanation.ranking[:MOST_ROWS])
    rest = explanation.ranking[MOST_ROWS:]
    rows: list[Row] = [
        (explanation.entries[i].short(LONGEST_NAME), explanation.entries[i].name, [i])
        for i in shown
    ]
    others = f"{len(rest)} other entries"
    return [*rows, (others, others, rest)] if rest else rows


def _panel(kind: Sequence[Moved], rows: Sequence[Row], head: float, all_columns: int) -> Panel:
    names = [moved.name for moved in kind]
    cells = [[sum(moved.parts[i] for i in members) for moved in kind] for _, _, members in rows]
    most = max((abs(cell) for row in cells for cell in row), default=0.0) or 1.0
    scale = Scale(BLUE_TO_ORANGE, -most, most)
    every = one_name_in(len(names), all_columns)
    bottom = head + ROW * len(rows)
    parts = [column_names(names, every, head), _row_names(rows, head)]
    if rows:
        parts.append(
            element(
                "image",
                href=png([[scale.colour(cell) for cell in row] for row in cells]),
                x="0",
                y=head,
                width="100%",
                height=ROW * len(rows),
                preserveAspectRatio="none",
                class_="heat",
            )
        )
        parts.append(_tooltips(kind, rows, cells, head))
    what = "mix" if kind[0].kind == "mix" else "rate"
    return Panel(
        f"To the {what} of each {'norm layer' if what == 'mix' else 'parameter tensor'}",
        ("added share of own statistics" if what == "mix" else _rate_note(kind[0]))
        + (f"; one name in {every} is written" if every > 1 else ""),
        scale.legend((amount(kind[0], -most), amount(kind[0], most))),
        drawing(
            "".join(parts),
            height=bottom + 2,
            label=f"Heat map: what each profile entry added to each {what}",
            description=_strongest(kind, rows, cells),
        ),
        len(names),
        round(head - head_height(names)),
    )


def _rate_note(moved: Moved) -> str:
    return "factor on the learning rate" if moved.log else "added learning rate"


def _row_names(rows: Sequence[Row], head: float) -> str:
    names = [
        text(
            name,
            x=-10,
            y=head + (i + 0.5) * ROW + 4,
            text_anchor="end",
            class_="name",
        )
        for i, (name, _, _) in enumerate(rows)
    ]
    return element("g", "".join(names), class_="rows")


def _tooltips(
    kind: Sequence[Moved], rows: Sequence[Row], cells: Sequence[Sequence[float]], head: float
) -> str:
    """Lay a tooltip over every cell, or over every row where there are very many."""
    single = len(rows) * len(kind) <= MOST_TOOLTIPS
    width = 100 / len(kind) if single else 100
    parts = []
    for i, ((_, name, _), row) in enumerate(zip(rows, cells, strict=True)):
        for j, (moved, cell) in enumerate(zip(kind, row, strict=True)):
            if single:
                words = f"{name} to {moved.kind} of {moved.name}: {amount(moved, cell)}"
            elif j == 0:
                words = name
            else:
                break
            parts.append(
                element(
                    "rect",
                    title(words),
                    x=f"{width * j:.3f}%",
                    width=f"{width:.3f}%",
                    y=head + i * ROW,
                    height=ROW,
                    class_="hover",
                )
            )
    return "".join(parts)


def _strongest(kind: Sequence[Moved], rows: Sequence[Row], cells: Sequence[Sequence[float]]) -> str:
    """Return the largest cell in words."""
    places = [(abs(cells[i][j]), i, j) for i in range(len(rows)) for j in range(len(kind))]
    if not places:
        return "There is no profile entry."
    size, i, j = max(places)
    if size == 0:
        return "No entry moved anything."
    moved = kind[j]
    return (
        f"{len(rows)} rows by {len(kind)} columns. The strongest: {rows[i][1]} on the {moved.kind} "
        f"of {moved.name}, {amount(moved, cells[i][j])}."
    )
