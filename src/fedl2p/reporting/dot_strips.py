"""Strips of dots: one row per group of clients, one dot per client."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedl2p.reporting.axes import Axis, upright_lines
from fedl2p.reporting.client_views import ClientView, Group, describe
from fedl2p.reporting.number_formats import points
from fedl2p.reporting.svg import LONGEST_NAME, drawing, element, shorten, text, title

MOST_TOOLTIPS = 1500
"""Beyond this many clients a dot has no tooltip: the page would grow by megabytes."""
BINS = 70
"""Across the axis; dots of one bin are stacked."""

Mark = tuple[ClientView, float]


def strips(
    groups: Sequence[Group], value: Callable[[ClientView], float | None], *, label: str
) -> str:
    """Return one row of dots per group, a dot per client, with the group's mean at the right.

    Parameters
    ----------
    groups
        Rows, from the top.
    value
        A client's number, a fraction that is drawn in points; None leaves the client out.
    label
        What it shows, for those who hear the page.
    """
    rows = [
        (group, [(view, 100 * v) for view in group.clients if (v := value(view)) is not None])
        for group in groups
    ]
    numbers = [v for _, marks in rows for _, v in marks]
    if not numbers:
        return '<p class="quiet">No client has both results.</p>'
    axis = Axis.around([0.0, *numbers])
    row_height = 34.0 if len(numbers) / len(rows) < 60 else 90.0
    height = row_height * len(rows)
    parts = [upright_lines(axis, top=0.0, bottom=height, words_at=height + 16)]
    for i, (group, marks) in enumerate(rows):
        middle = (i + 0.5) * row_height
        parts.append(_row_label(group, len(marks), middle))
        if marks:
            parts.append(_dots(marks, axis, middle, row_height, len(numbers) <= MOST_TOOLTIPS))
            parts.append(_mean(marks, axis, middle))
    return drawing("".join(parts), height=height + 22, label=label)


def _row_label(group: Group, count: int, middle: float) -> str:
    note = f"{count} client" if count == 1 else f"{count} clients"
    if group.only_unseen and "unseen" not in group.label:
        note = f"{count}, all unseen" if count > 1 else "1, unseen"
    name = shorten(group.label, LONGEST_NAME)
    return text(name, x=-10, y=middle - 1, text_anchor="end", class_="name") + text(
        note, x=-10, y=middle + 12, text_anchor="end", class_="small"
    )


def _dots(
    marks: Sequence[Mark], axis: Axis, middle: float, row_height: float, tooltips: bool
) -> str:
    # Clients with nearly the same value are stacked about the middle, so that none hides another.
    bins: dict[int, list[Mark]] = {}
    for view, value in sorted(marks, key=lambda mark: mark[1]):
        bins.setdefault(round(axis.place(value) * BINS), []).append((view, value))
    tallest = max(len(members) for members in bins.values())
    step = min(7.0, (row_height - 8) / max(1, tallest - 1))
    return "".join(
        element(
            "circle",
            title(f"{describe(view)} · {points(value / 100)} points") if tooltips else "",
            cx=axis.across(value),
            cy=middle + step * (i - (len(members) - 1) / 2),
            r=3.5 if step > 3 else 2.2,
            class_=view.pool,
        )
        for members in bins.values()
        for i, (view, value) in enumerate(members)
    )


def _mean(marks: Sequence[Mark], axis: Axis, middle: float) -> str:
    mean = sum(value for _, value in marks) / len(marks)
    x = axis.across(mean)
    bar = element("line", x1=x, x2=x, y1=middle - 13, y2=middle + 13, class_="mean")
    # The number stands in the right margin: a nested drawing of no width at the right edge.
    number = text(points(mean / 100), x=46, y=middle + 4, text_anchor="end", class_="value")
    margin = element("svg", number, x="100%", y="0", width="1", height="1", class_="box")
    # A bar would hide the only dot of its row.
    return bar + margin if len(marks) > 1 else margin
