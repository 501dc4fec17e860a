"""Numbers as the page writes them."""

from __future__ import annotations

import math

MINUS = "\N{MINUS SIGN}"
NO_NUMBER = "\N{EN DASH}"
LEVEL = 0.0005
"""Accuracies closer than 0.05 points are called level: they print the same."""


def percent(fraction: float) -> str:
    """Return a fraction as percent with one decimal, without the percent sign."""
    return f"{100 * fraction:.1f}" if math.isfinite(fraction) else NO_NUMBER


def share(fraction: float) -> str:
    """Return a share of clients as percent without decimals, without the percent sign."""
    return f"{100 * fraction:.0f}" if math.isfinite(fraction) else NO_NUMBER


def loss(nats: float) -> str:
    """Return a loss with three decimals."""
    return f"{nats:.3f}" if math.isfinite(nats) else "not finite"


def points(difference: float) -> str:
    """Return a difference of fractions in percentage points, with its sign."""
    return "0.0" if abs(difference) < LEVEL else signed(100 * difference, ".1f")


def seconds(value: float) -> str:
    """Return seconds with about three digits, to the millisecond at most."""
    if not math.isfinite(value):
        return NO_NUMBER
    if value < 0.0005:
        return "<0.001" if value > 0 else "0"
    decimals = max(0, 2 - math.floor(math.log10(value))) if value >= 1 else 3
    return f"{value:.{decimals}f}"


def signed(value: float, form: str = "g") -> str:
    """Return a number with its sign, zero without."""
    return f"{value:+{form}}".replace("-", MINUS) if value else "0"


def bytes_of(count: float) -> str:
    """Return a number of bytes in the unit that suits it, powers of 1000."""
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,.0f} B"


def span(counts: list[int]) -> str:
    """Return the range of counts: one number if they are all the same."""
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def short_number(value: float, digits: int = 2) -> str:
    """Return two digits, or a few more, as a person writes them."""
    if value == 0 or 0.001 <= abs(value) < 1000:
        return f"{float(f'{value:.{digits}g}'):g}"
    mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
