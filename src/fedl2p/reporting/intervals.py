"""Means with Student's t-intervals, and rank correlation, in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean and the half-width of its confidence interval; None if there is one value only."""

    mean: float
    half: float | None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Lower and upper end."""
        return None if self.half is None else (self.mean - self.half, self.mean + self.half)


def t_quantile(df: int, confidence: float = 0.95) -> float:
    """Return t such that a Student variable lies in [-t, t] with probability ``confidence``.

    Parameters
    ----------
    df
        Degrees of freedom, >= 1.
    confidence
        In (0, 1).

    Notes
    -----
    Bisection on the closed form for whole degrees of freedom, Abramowitz and Stegun 26.7.3 and
    26.7.4, so that a comparison needs no statistics package.
    """
    if df < 1 or not 0.0 < confidence < 1.0:
        raise ValueError(
            f"df is {df} and confidence {confidence}; give df >= 1 and a confidence in (0, 1)"
        )
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        if _central_probability(middle, df) < confidence:
            low = middle
        else:
            high = middle
    return math.tan(low) * math.sqrt(df)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the mean of independent values and its t-interval.

    Raises
    ------
    ValueError
        If there is no value.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no values to average; give at least one")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Interval(mean, t_quantile(n - 1, confidence) * math.sqrt(variance / n))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation, in [-1, 1]; NaN if one of the two is constant."""
    a, b = _ranks(first), _ranks(second)
    if not a:
        return math.nan
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    spread = math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))
    return covariance / spread if spread > 0 else math.nan


def _central_probability(theta: float, df: int) -> float:
    cosine = math.cos(theta)
    odd = df % 2
    if df == 1:
        return 2 * theta / math.pi
    term = total = cosine if odd else 1.0
    for k in range(2 + odd, df - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    total *= math.sin(theta)
    return 2 * (theta + total) / math.pi if odd else total


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for place in range(start, stop):
            ranks[order[place]] = (start + stop - 1) / 2
        start = stop
    return ranks
