"""Means with Student's t-intervals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the half-width of its 95 % confidence interval, None for a single value."""

    mean: float
    half: float | None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Lower and upper end."""
        return None if self.half is None else (self.mean - self.half, self.mean + self.half)


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent values and its 95 % Student t-interval.

    Raises
    ------
    ValueError
        If there is no value.
    ModuleNotFoundError
        If SciPy is not installed and there are two values or more.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no values to average; give at least one")
    if n == 1:
        return Interval(values[0], None)
    from scipy import stats

    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, df=n - 1)
    return Interval(statistics.fmean(values), float(quantile * stats.sem(values)))
