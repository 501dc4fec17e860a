"""The figures of the report: gains of clients, learning curves, learned mixes and rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from fedl2p.reporting.client_views import ClientView, Group
from fedl2p.reporting.heat_maps import (
    BLUE_TO_ORANGE,
    PURPLES,
    TEALS,
    HeatMap,
    Rows,
    draw_maps,
    head_height,
    log_norm,
)
from fedl2p.reporting.heat_maps import WIDTH as MAPS_WIDTH
from fedl2p.reporting.number_formats import points, signed
from fedl2p.reporting.svg import (
    COLOURS,
    SMALL,
    add_axes,
    house_style,
    inline_svg,
    longest,
    new_figure,
    shorten,
    write,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 420.0
"""Of strips and curves, pixels; wide enough for a desktop's half, small enough for a phone."""
BINS = 60
"""Across a strip; dots of one bin are stacked, so that none hides another."""


@house_style()
def gain_strips(
    groups: Sequence[Group],
    value: Callable[[ClientView], float | None],
    *,
    name: str,
    label: str,
    unit: str = "points",
) -> str | None:
    """Return one row of dots per group, a dot per client, with the group's mean at the right.

    Parameters
    ----------
    groups
        Rows, from the top.
    value
        A client's number, a fraction that is drawn in hundredths; None leaves the client out. If it
        leaves out everyone there is no figure.
    name, label
        See :func:`fedl2p.reporting.svg.inline_svg`.
    unit
        Of the numbers that are drawn.
    """
    rows = [
        (group, [(view, 100 * v) for view in group.clients if (v := value(view)) is not None])
        for group in groups
    ]
    rows = [(group, marks) for group, marks in rows if marks]
    numbers = [v for _, marks in rows for _, v in marks]
    if not numbers:
        return None
    names = [f"{shorten(group.label)} ({len(marks)})" for group, marks in rows]
    row_height = 26.0 if len(numbers) / len(rows) < 60 else 80.0
    height, left = row_height * len(rows), longest(names) + 10
    figure = new_figure(WIDTH, height + 30)
    axes = add_axes(figure, left, 6, WIDTH - left - 46, height)
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    _differences(axes, numbers, most=6)
    means = []
    for i, (_, marks) in enumerate(rows):
        _dots(axes, marks, i, row_height)
        mean = sum(v for _, v in marks) / len(marks)
        means.append(points(mean / 100))
        if len(marks) > 1:  # a bar would hide the only dot of its row
            axes.plot([mean, mean], [i - 0.38, i + 0.38], color=COLOURS["ink"], linewidth=2.5)
        axes.annotate(
            means[-1],
            (1, i),
            (42, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset pixels",
            ha="right",
            va="center_baseline",
            weight="bold",
        )
    said = "; ".join(f"{row} {mean}" for row, mean in zip(names, means, strict=True))
    return inline_svg(
        figure,
        name=name,
        label=label,
        description=f"Mean of each row in {unit}, its number of clients in brackets: {said}.",
    )


def _dots(
    axes: Axes, marks: Sequence[tuple[ClientView, float]], row: int, row_height: float
) -> None:
    low, high = axes.get_xlim()
    bins: dict[int, list[tuple[ClientView, float]]] = {}
    for view, value in sorted(marks, key=lambda mark: mark[1]):
        bins.setdefault(round(BINS * (value - low) / (high - low)), []).append((view, value))
    step = min(6.5, (row_height - 8) / max(1, max(map(len, bins.values())) - 1))
    for pool, face in (("seen", COLOURS["seen"]), ("unseen", "none")):
        dots = [
            (value, row + step * (i - (len(members) - 1) / 2) / row_height)
            for members in bins.values()
            for i, (view, value) in enumerate(members)
            if view.pool == pool
        ]
        axes.plot(
            [x for x, _ in dots],
            [y for _, y in dots],
            "o",
            markersize=6 if step > 3 else 4,
            markerfacecolor=face,
            markeredgecolor=COLOURS[pool],
            markeredgewidth=1.5 if pool == "unseen" else 0,
            alpha=0.8,
            clip_on=False,
        )


@house_style()
def learning_curve(
    xs: Sequence[float],
    ys: Sequence[float],
    *,
    name: str,
    label: str,
    percent: bool,
    best: int | None,
    unit: str = " nats",
) -> str | None:
    """Return a learning curve; None if no value is finite, a gap where one is not.

    Parameters
    ----------
    xs
        Rounds of training behind the judged state.
    ys
        Losses, or accuracies as fractions.
    name, label
        See :func:`fedl2p.reporting.svg.inline_svg`.
    percent
        Whether the values are written in percent.
    best
        Index of the point to mark, if its value is finite, or None.
    unit
        Written behind losses.
    """
    from matplotlib.ticker import MaxNLocator

    shown = [(100 * y if percent else y) if math.isfinite(y) else math.nan for y in ys]
    finite = [(x, y) for x, y in zip(xs, shown, strict=True) if math.isfinite(y)]
    if not finite:
        return None
    figure = new_figure(WIDTH, 200)
    axes = add_axes(figure, 40, 8, WIDTH - 54, 160)
    axes.plot(xs, shown, color=COLOURS["seen"], linewidth=2, clip_on=False)
    axes.set_xlim(min(xs), max(max(xs), min(xs) + 1))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.tick_params("y", labelsize=SMALL, labelcolor=COLOURS["quiet"])
    axes.set_xlabel("rounds of training", fontsize=SMALL, color=COLOURS["quiet"])
    axes.grid(axis="y")
    if best is not None and math.isfinite(shown[best]):
        axes.plot(
            [xs[best]],
            [shown[best]],
            "o",
            markersize=9,
            markerfacecolor=COLOURS["page"],
            markeredgecolor=COLOURS["seen"],
            markeredgewidth=2.5,
            clip_on=False,
        )
    unit = " %" if percent else unit
    said = [f"{y:.3g}{unit} after {x:g}" for x, y in (finite[0], finite[-1])]
    description = f"From {said[0]} to {said[1]} rounds."
    if best is not None and math.isfinite(shown[best]):
        description += f" Marked: {shown[best]:.3g}{unit} after {xs[best]:g} rounds."
    return inline_svg(figure, name=name, label=label, description=description)


@house_style()
def strategy_maps(groups: Sequence[Group], *, unit: str = "points of accuracy") -> list[str]:
    """Return what each client's data led to: divergence and mix, then rates and gain in ``unit``.

    The two figures have a row per client at the same height; clients without a strategy are left
    out. A model without batch-norm has the second figure only, a run without strategies none.
    """
    groups = [
        Group(label=group.label, clients=tuple(v for v in group.clients if v.strategy))
        for group in groups
    ]
    groups = [group for group in groups if group.clients]
    views = [view for group in groups for view in group.clients]
    table = [view.strategy for view in views if view.strategy]
    if not table:
        return []
    maps = [
        _heat_map("Divergence", "nats", [s.divergence or {} for s in table], TEALS),
        _heat_map("Mix", "of own statistics", [s.mix for s in table], BLUE_TO_ORANGE),
        _heat_map("Rate", "of each parameter tensor", [s.rate for s in table], PURPLES),
    ]
    rows = _client_rows(groups)
    marks = [view.pool for view in views] if len({view.pool for view in views}) > 1 else None
    head = max(head_height(one.columns) for one in maps)
    figures = []
    if norms := [one for one in maps[:2] if one.columns]:
        figure, _ = draw_maps(norms, rows, head=head, marks=marks)
        figures.append(
            inline_svg(
                figure,
                name="mixes",
                label="Heat maps, one row per client: divergence of its data, and its mix",
                description=_group_means(groups, "mix", lambda view: view.mean_mix, ".2f"),
            )
        )
    figure, left = draw_maps(maps[2:], rows, head=head, marks=marks, beside=100.0)
    _gain_bars(figure, left, views, rows, head, unit)
    figures.append(
        inline_svg(
            figure,
            name="rates",
            label="Heat map and bars, one row per client: its learning rates and its gain",
            description=_group_means(groups, "rate", lambda view: view.mean_rate, ".2g"),
        )
    )
    return figures


def _heat_map(
    title: str, unit: str, table: Sequence[Mapping[str, float | None]], colours: Sequence[str]
) -> HeatMap:
    from matplotlib.colors import Normalize

    columns = tuple(dict.fromkeys(name for line in table for name in line))
    cells = [[line.get(name) for name in columns] for line in table]
    values = [[math.nan if cell is None else cell for cell in line] for line in cells]
    if colours == BLUE_TO_ORANGE:
        norm, ends = Normalize(0.0, 1.0), ("0, global", "1, own")
    else:
        norm, ends = log_norm(value for line in values for value in line)
    return HeatMap(
        title=title,
        unit=unit,
        columns=columns,
        values=values,
        colours=colours,
        norm=norm,
        ends=ends,
    )


def _client_rows(groups: Sequence[Group]) -> Rows:
    """Lay out clients so that some tens and a thousand both fit about a screen."""
    sizes = [len(group.clients) for group in groups]
    height = min(22.0, max(0.7, 560.0 / sum(sizes)))
    if height < 14:  # too low for a name
        return Rows([shorten(group.label) for group in groups], sizes, height)
    clients = [view for group in groups for view in group.clients]
    return Rows([shorten(f"{view.name}, {view.kind}") for view in clients], sizes, height)


def _gain_bars(
    figure: Figure, left: float, views: Sequence[ClientView], rows: Rows, head: float, unit: str
) -> None:
    gains = [100 * view.gain for view in views]
    axes = add_axes(figure, left, head, MAPS_WIDTH - left - 12, rows.bottom)
    axes.barh(
        rows.middles,
        gains,
        height=rows.height - (1 if rows.height > 4 else 0),
        color=[COLOURS["gain" if gain >= 0 else "loss"] for gain in gains],
        clip_on=False,
    )
    axes.set(ylim=(rows.bottom, 0), yticks=[])
    _differences(axes, gains, most=3)
    axes.tick_params("x", labeltop=True, labelbottom=False)
    write(axes, 0, 14 - head, "Gain", weight="bold")
    write(axes, 0, 28 - head, unit, size=SMALL, colour="quiet")


def _differences(axes: Axes, values: Sequence[float], *, most: int) -> None:
    """Let a horizontal axis of differences have signed ticks and a line at zero."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.03 * (high - low) or 1.0
    axes.set_xlim(low - room, high + room)
    axes.xaxis.set_major_locator(MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: signed(tick)))
    axes.grid(axis="x")
    axes.axvline(0, color=COLOURS["quiet"], linewidth=1.5)


def _group_means(
    groups: Sequence[Group],
    what: str,
    number: Callable[[ClientView], float | None],
    form: str,
) -> str:
    """Return the mean of a client's number over each group in words."""
    said = []
    for group in groups:
        known = [v for view in group.clients if (v := number(view)) is not None]
        if known:
            said.append(f"{group.label} {sum(known) / len(known):{form}}")
    return f"Mean {what} of each group: {'; '.join(said)}."
