"""From profile to gain: pictures that share their rows, one row per client."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedl2p.reporting.axes import Axis, upright_lines
from fedl2p.reporting.client_rows import TALL, Rows, row_names, row_tooltips
from fedl2p.reporting.client_views import Group
from fedl2p.reporting.svg import (
    BLUE_TO_ORANGE,
    LONGEST_NAME,
    PURPLES,
    TEALS,
    Scale,
    drawing,
    element,
    png,
    shorten,
    text,
    title,
)
from fedl2p.runs.reading import Strategy

FEWEST_COLUMN_NAMES, MOST_COLUMN_NAMES = 11, 20
PANELS_WIDTH, NAME_WIDTH = 760, 12
"""What the heat maps share on a desktop, and what an upright column name needs, pixels."""

Value = Callable[[Strategy, str], float | None]


@dataclass(frozen=True)
class Panel:
    """One picture of the strategy section.

    ``width`` is its share of the section, in columns. ``spare`` is the height, in pixels, that it
    leaves empty at its top so that its rows lie level with those beside it; a page that stacks the
    pictures takes it back.
    """

    heading: str
    note: str
    legend: str
    markup: str
    width: int
    spare: int


def strategy_panels(groups: Sequence[Group]) -> list[Panel]:
    """Return the pictures from profile to gain, one row per client, of clients with a strategy.

    Without batch-norm in the model there are only the rates and the gains; if no client has a
    strategy there is nothing.
    """
    groups = [
        Group(label=group.label, clients=tuple(v for v in group.clients if v.strategy))
        for group in groups
    ]
    groups = [group for group in groups if group.clients]
    if not groups:
        return []
    maps = _maps([view.strategy for group in groups for view in group.clients if view.strategy])
    columns = sum(len(one.columns) for one in maps)
    head = max(head_height(one.columns) for one in maps)
    rows = Rows.of(groups, head)
    return [*(_heat_panel(one, rows, columns) for one in maps), _gain_panel(rows)]


def gutter(groups: Sequence[Group]) -> str:
    """Return the width that row labels need left of a figure, as CSS."""
    names = [group.label for group in groups]
    if Rows.of(groups, 0.0).height >= TALL:
        names += [view.name for group in groups for view in group.clients]
    # Rows also say how many clients they hold, in smaller type: 12 letters at least.
    longest = max(min(len(name), LONGEST_NAME) for name in [*names, 12 * "x"])
    return f"{26 + 6.7 * longest:.0f}px"


@dataclass(frozen=True)
class _Map:
    heading: str
    note: str
    unit: str
    columns: tuple[str, ...]
    scale: Scale
    ends: tuple[str, str] | None
    value: Value


def _maps(table: Sequence[Strategy]) -> list[_Map]:
    profiled = dict.fromkeys(name for s in table for name in s.divergence or ())
    far = Scale.logarithmic(TEALS, [v for s in table for v in (s.divergence or {}).values()])
    rates = Scale.logarithmic(PURPLES, [v for s in table for v in s.rate.values()])
    maps = [
        _Map(
            "Profile",
            "how far the features lie from the global model's, at each norm layer",
            "nats, log scale",
            tuple(profiled),
            far,
            None,
            lambda s, name: (s.divergence or {}).get(name),
        ),
        _Map(
            "Mix",
            "whose statistics each norm layer uses",
            "",
            tuple(dict.fromkeys(name for s in table for name in s.mix)),
            Scale(BLUE_TO_ORANGE, 0.0, 1.0),
            ("0, global", "1, own"),
            lambda s, name: s.mix.get(name),
        ),
        _Map(
            "Rate",
            "how fast each parameter tensor fine-tunes",
            "learning rate, log scale",
            tuple(dict.fromkeys(name for s in table for name in s.rate)),
            rates,
            None,
            lambda s, name: s.rate.get(name),
        ),
    ]
    return [one for one in maps if one.columns]


def _heat_panel(one: _Map, rows: Rows, all_columns: int) -> Panel:
    every = one_name_in(len(one.columns), all_columns)
    parts = [column_names(one.columns, every, rows.head), row_names(rows)]
    for group, top in zip(rows.groups, rows.starts, strict=True):
        pixels = [
            [one.scale.colour(one.value(view.strategy, column)) for column in one.columns]
            for view in group.clients
            if view.strategy
        ]
        parts.append(
            element(
                "image",
                href=png(pixels),
                x="0",
                y=top,
                width="100%",
                height=rows.height * len(group.clients),
                preserveAspectRatio="none",
                class_="heat",
            )
        )
    parts.append(row_tooltips(rows))
    label = f"{one.heading}: heat map, one row per client"
    return Panel(
        one.heading,
        one.note + (f"; one name in {every} is written" if every > 1 else ""),
        one.scale.legend(one.ends) + _unit(one.unit),
        drawing("".join(parts), height=rows.bottom + 2, label=label),
        len(one.columns),
        round(rows.head - head_height(one.columns)),
    )


def _gain_panel(rows: Rows) -> Panel:
    gains = [100 * view.gain for group in rows.groups for view in group.clients]
    axis = Axis.around([0.0, *gains], 4)
    parts = [
        row_names(rows),
        upright_lines(axis, top=rows.head, bottom=rows.bottom, words_at=rows.head - 8),
    ]
    for view, y in rows.places():
        low, high = sorted((axis.place(0.0), axis.place(100 * view.gain)))
        parts.append(
            element(
                "rect",
                x=f"{100 * low:.2f}%",
                width=f"{100 * (high - low):.2f}%",
                y=y,
                height=rows.height - (1 if rows.height > 4 else 0),
                class_="gain" if view.gain >= 0 else "loss",
            )
        )
    parts.append(row_tooltips(rows))
    return Panel(
        "Gain",
        "accuracy after minus before fine-tuning",
        _unit("percentage points"),
        drawing("".join(parts), height=rows.bottom + 2, label="Gain: bars, one row per client"),
        5,
        round(rows.head - head_height(())),
    )


def one_name_in(columns: int, all_columns: int) -> int:
    """Return how many columns share one name, so that names do not touch.

    A picture gets its share of the width that pictures side by side divide.
    """
    room = int(PANELS_WIDTH / NAME_WIDTH * columns / all_columns)
    return math.ceil(columns / min(MOST_COLUMN_NAMES, max(FEWEST_COLUMN_NAMES, room)))


def head_height(columns: Sequence[str]) -> float:
    """Return the height that upright column names need, pixels."""
    return 14.0 + 6.2 * max((min(len(name), LONGEST_NAME) for name in columns), default=2)


def column_names(columns: Sequence[str], every: int, head: float) -> str:
    """Write one in ``every`` column names upright, ending just above ``head`` pixels."""
    parts = []
    for i in range(0, len(columns), every):
        name = shorten(columns[i], LONGEST_NAME)
        upright = text(name, transform="rotate(-90)", x=0, y=4, class_="column")
        parts.append(
            element(
                "svg",
                title(columns[i]) + upright,
                x=f"{100 * (i + 0.5) / len(columns):.2f}%",
                y=head - 7,
                width="1",
                height="1",
                class_="box",
            )
        )
    return "".join(parts)


def _unit(words: str) -> str:
    return f'<div class="quiet">{html.escape(words)}</div>' if words else ""
