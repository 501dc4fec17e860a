"""Axes: numbers to places, with round ticks and lines through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedl2p.reporting.number_formats import signed
from fedl2p.reporting.svg import element, nice_ticks, text


@dataclass(frozen=True)
class Axis:
    """A linear axis from ``low`` to ``high`` with ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def around(cls, values: Sequence[float], most: int = 6) -> Axis:
        """Enclose finite values between round ticks."""
        ticks = nice_ticks(min(values), max(values), most)
        return cls(ticks[0], ticks[-1], tuple(ticks))

    def place(self, value: float) -> float:
        """Return where a number lies, 0 at the low end, 1 at the high end."""
        return (value - self.low) / (self.high - self.low)

    def across(self, value: float) -> str:
        """Return the horizontal position of a number."""
        return f"{100 * self.place(value):.2f}%"


def upright_lines(
    axis: Axis,
    *,
    top: float,
    bottom: float,
    words_at: float,
    words: Callable[[float], str] = signed,
) -> str:
    """Draw a line at every tick of a horizontal axis of differences, the one at zero stronger."""
    parts = []
    for tick in axis.ticks:
        x = axis.across(tick)
        kind = "zero" if tick == 0 else "grid"
        parts.append(element("line", x1=x, x2=x, y1=top, y2=bottom, class_=kind))
        parts.append(text(words(tick), x=x, y=words_at, text_anchor="middle"))
    return "".join(parts)
