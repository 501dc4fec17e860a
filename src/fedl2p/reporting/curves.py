"""Learning curves."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedl2p.reporting.axes import Axis
from fedl2p.reporting.svg import drawing, element, nice_ticks, text, title

HEIGHT = 170.0
"""Of the area that the curve lies in, pixels."""


def curve(
    xs: Sequence[float], ys: Sequence[float], *, label: str, percent: bool, best: int | None
) -> str:
    """Return a learning curve; a round whose value is not finite leaves a gap.

    Parameters
    ----------
    xs
        Rounds of training behind the judged state.
    ys
        Losses in nats, or accuracies as fractions.
    label
        What it shows, for those who hear the page.
    percent
        Whether to write the values in percent.
    best
        Index of the point to mark, or None.
    """
    finite = [y for y in ys if math.isfinite(y)]
    if not finite:
        return '<p class="quiet">No finite value was recorded.</p>'
    low, high = min(xs), max(max(xs), min(xs) + 1)
    whole = [tick for tick in nice_ticks(low, high) if low <= tick <= high and tick == int(tick)]
    across = Axis(low, high, tuple(whole))
    up = Axis.around(finite, 5)
    parts = [_scales(across, up, percent), _line(xs, ys, across, up)]
    if best is not None:
        words = f"{100 * ys[best]:.1f} %" if percent else f"{ys[best]:.3f}"
        parts.append(
            element(
                "circle",
                title(f"lowest loss: after {xs[best]:g} rounds, {words}"),
                cx=across.across(xs[best]),
                cy=_height(up, ys[best]),
                r=4.5,
                class_="best",
            )
        )
    return drawing("".join(parts), height=HEIGHT + 22, label=label)


def _scales(across: Axis, up: Axis, percent: bool) -> str:
    parts = []
    for tick in up.ticks:
        y = _height(up, tick)
        words = f"{100 * tick if percent else tick:g}"
        parts.append(element("line", x1="0", x2="100%", y1=y, y2=y, class_="grid"))
        parts.append(text(words, x=-6, y=y + 4, text_anchor="end"))
    for tick in across.ticks:
        x = across.across(tick)
        parts.append(text(f"{tick:g}", x=x, y=HEIGHT + 16, text_anchor="middle"))
    return "".join(parts)


def _height(up: Axis, value: float) -> float:
    return HEIGHT * (1 - up.place(value))


def _line(xs: Sequence[float], ys: Sequence[float], across: Axis, up: Axis) -> str:
    # The curve lies in a box of its own that stretches with the page; its stroke does not.
    path, pen = [], "M"
    for x, y in zip(xs, ys, strict=True):
        if math.isfinite(y):
            path.append(f"{pen}{1000 * across.place(x):.1f} {1000 * (1 - up.place(y)):.1f}")
            pen = "L"
        else:
            pen = "M"
    return element(
        "svg",
        element("path", d=" ".join(path), class_="curve"),
        viewBox="0 0 1000 1000",
        preserveAspectRatio="none",
        x="0",
        y="0",
        width="100%",
        height=HEIGHT,
        class_="box",
    )
