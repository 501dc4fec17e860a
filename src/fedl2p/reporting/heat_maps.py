"""Heat maps side by side that share their rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

from fedl2p.reporting.number_formats import short_number
from fedl2p.reporting.svg import (
    COLOURS,
    SMALL,
    add_axes,
    longest,
    new_figure,
    shorten,
    write,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

# From pale to dark, or over a pale middle, in hues that colour-blind people tell apart.
TEALS = ("#dcefec", "#86c3bf", "#23777e", "#07303a")
PURPLES = ("#e6def0", "#b9a8d6", "#7357a6", "#341a5c")
BLUE_TO_ORANGE = ("#2c5f8a", "#a3c5de", "#e8e6e1", "#f3c088", "#a3520c")
WIDTH = 540.0
TITLE, FOOT = 36.0, 34.0
"""Pixels for the title above the column names, and for the colour bar below the rows."""
BETWEEN, BETWEEN_GROUPS = 16.0, 5.0
NAME_WIDTH = 12.0
"""Pixels that an upright column name needs."""


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Numbers that are drawn as colours.

    Parameters
    ----------
    title, unit
        Two lines above the map.
    columns
        Names.
    values
        One sequence per row, in the order of the columns; NaN is drawn grey.
    colours
        From low to high, at equal distances.
    norm
        From numbers to [0, 1].
    ends
        What stands at the two ends of the colour bar.
    """

    title: str
    unit: str
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    colours: Sequence[str]
    norm: Normalize
    ends: tuple[str, str]

    @property
    def colour_map(self) -> Colormap:
        """The colours, and grey for no number."""
        from matplotlib.colors import LinearSegmentedColormap

        colours = LinearSegmentedColormap.from_list("", list(self.colours))
        return colours.with_extremes(bad="#969696")


@dataclass(frozen=True)
class Rows:
    """Rows of one height, in groups; lengths in pixels from the top of the first row.

    Parameters
    ----------
    names
        Of the rows, or of the groups if they are as many.
    sizes
        Numbers of rows of the groups.
    height
        Of a row.
    """

    names: Sequence[str]
    sizes: Sequence[int]
    height: float

    @property
    def starts(self) -> list[float]:
        """Tops of the groups."""
        sizes = accumulate(self.sizes, initial=0)
        return [
            count * self.height + i * BETWEEN_GROUPS
            for i, count in zip(range(len(self.sizes)), sizes, strict=False)
        ]

    @property
    def bottom(self) -> float:
        """Where the last row ends."""
        return self.starts[-1] + self.sizes[-1] * self.height

    @property
    def middles(self) -> list[float]:
        """The middle of every row."""
        return [
            start + (i + 0.5) * self.height
            for start, size in zip(self.starts, self.sizes, strict=True)
            for i in range(size)
        ]

    @property
    def name_places(self) -> list[float]:
        """The middle of what each name stands for."""
        if len(self.names) == sum(self.sizes):
            return self.middles
        return [
            start + size * self.height / 2
            for start, size in zip(self.starts, self.sizes, strict=True)
        ]


def log_norm(values: Iterable[float]) -> tuple[Normalize, tuple[str, str]]:
    """Return a logarithmic scale over positive finite values, and what its ends say.

    Of many values the outer 1 % at each end is cut off: one dead channel or one runaway rate would
    otherwise use up the whole range.
    """
    from matplotlib.colors import LogNorm

    usable = sorted(v for v in values if 0 < v < math.inf)
    if not usable:
        return LogNorm(0.1, 10.0), ("", "")
    cut = len(usable) // 100
    low, high = usable[cut], usable[-1 - cut]
    if high < low * 1.05:
        low, high = low / 2, high * 2
    ends = (short_number(low), short_number(high))
    if low > usable[0] or high < usable[-1]:
        ends = (f"≤ {ends[0]}", f"≥ {ends[1]}")
    return LogNorm(low, high), ends


def head_height(columns: Sequence[str]) -> float:
    """Return the height of title and column names above the rows, pixels."""
    return TITLE + longest([shorten(name) for name in columns], SMALL) + 8


def draw_maps(
    maps: Sequence[HeatMap],
    rows: Rows,
    *,
    head: float,
    marks: Sequence[str] | None = None,
    width: float = WIDTH,
    beside: float = 0.0,
) -> tuple[Figure, float]:
    """Return a figure of heat maps, and where its free space at the right begins, pixels.

    Parameters
    ----------
    maps
        From left to right; each gets a share of the width by its number of columns.
    rows
        Common to all maps.
    head
        Height above the rows: at least each map's :func:`head_height`.
    marks
        A colour of :data:`fedl2p.reporting.svg.COLOURS` per row, drawn beside its name.
    width
        Of the figure, pixels.
    beside
        Part of it that is left free at the right, pixels.
    """
    figure = new_figure(width, head + rows.bottom + FOOT)
    left = longest(list(rows.names)) + (20 if marks else 10)
    names = add_axes(figure, left - (12 if marks else 6), head, 1, rows.bottom)
    _write_names(names, rows)
    if marks:
        _draw_marks(add_axes(figure, left - 9, head, 4, rows.bottom), rows, marks)
    free = width - left - beside - BETWEEN * (len(maps) - (0 if beside else 1))
    shares = [max(4, len(one.columns)) for one in maps]
    for one, share in zip(maps, shares, strict=True):
        part = free * share / sum(shares)
        axes = add_axes(figure, left, head, part, rows.bottom)
        _draw_map(axes, one, rows)
        _write_heads(axes, one, part, head)
        bar = add_axes(figure, left, head + rows.bottom + 8, min(part, 130.0), 8)
        _draw_colour_bar(bar, one, min(part, 130.0))
        left += part + BETWEEN
    return figure, left


def _write_names(axes: Axes, rows: Rows) -> None:
    axes.axis("off")
    above = -math.inf
    for name, middle in zip(rows.names, rows.name_places, strict=True):
        # A name that would touch the one above is left out.
        if middle - above >= NAME_WIDTH:
            write(axes, 0, middle, name, ha="right", va="center_baseline")
            above = middle


def _draw_marks(axes: Axes, rows: Rows, marks: Sequence[str]) -> None:
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=(rows.bottom, 0))
    first = 0
    for start, size in zip(rows.starts, rows.sizes, strict=True):
        for mark, run in groupby(range(size), key=lambda i: marks[first + i]):
            inside = list(run)
            top, bottom = (start + i * rows.height for i in (inside[0], inside[-1] + 1))
            axes.axhspan(top, bottom, color=COLOURS[mark], linewidth=0, clip_on=False)
        first += size


def _draw_map(axes: Axes, one: HeatMap, rows: Rows) -> None:
    columns, first = len(one.columns), 0
    for start, size in zip(rows.starts, rows.sizes, strict=True):
        axes.imshow(
            one.values[first : first + size],
            cmap=one.colour_map,
            norm=one.norm,
            aspect="auto",
            interpolation="none",
            extent=(0, columns, start + size * rows.height, start),
            clip_on=False,
        )
        first += size
    axes.set(xlim=(0, columns), ylim=(rows.bottom, 0), xticks=[], yticks=[])


def _write_heads(axes: Axes, one: HeatMap, width: float, head: float) -> None:
    columns = len(one.columns)
    every = math.ceil(columns * NAME_WIDTH / width)
    for i in range(0, columns, every):
        write(
            axes,
            (i + 0.5) * width / columns,
            -5,
            shorten(one.columns[i]),
            size=SMALL,
            colour="quiet",
            rotation=90,
            rotation_mode="anchor",
            va="center",
        )
    unit = one.unit + (f"; one name in {every}" if every > 1 else "")
    write(axes, 0, 14 - head, one.title, weight="bold")
    write(axes, 0, 28 - head, unit, size=SMALL, colour="quiet")


def _draw_colour_bar(axes: Axes, one: HeatMap, width: float) -> None:
    axes.imshow(
        [[i / 63 for i in range(64)]],
        cmap=one.colour_map,
        aspect="auto",
        interpolation="none",
        clip_on=False,
    )
    axes.set(xticks=[], yticks=[])
    for x, words, side in ((0, one.ends[0], "left"), (width, one.ends[1], "right")):
        write(axes, x, 19, words, size=SMALL, colour="quiet", ha=side)
