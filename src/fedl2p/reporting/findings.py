"""What the numbers of a run say, in words; the same words whether they flatter or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedl2p.reporting.client_views import (
    ClientView,
    Group,
    client_views,
    group_views,
    kind_key,
    label,
    main_pool,
    merit,
)
from fedl2p.reporting.intervals import mean_interval
from fedl2p.reporting.method_names import method_name
from fedl2p.reporting.number_formats import LEVEL, percent, points, signed
from fedl2p.runs.reading import RunFolder
from fedl2p.runs.results import Pool, Summary

FEWEST = 6
"""Clients below this allow no word on a correlation."""
WEAK = 0.3
"""A rank correlation below this is weak."""


def headline(run: RunFolder, method: str) -> str:
    """Return the main result as one sentence."""
    pool = main_pool(run)
    summary = summary_of(run, method, pool)
    if summary is None or not math.isfinite(summary.loss if _by_loss(run) else summary.accuracy):
        return f"{label(method)} has no tested client, so there is no accuracy to report."
    parts = []
    for words, baseline in baselines(run, method, pool):
        if method_name(baseline.method).role == "fixed":
            words += f" ({lower(label(baseline.method))})"
        if _by_loss(run):
            parts.append(f"{loss_gap(summary, baseline)} {words}")
            continue
        gap = summary.accuracy - baseline.accuracy
        side = "above" if gap > 0 else "below"
        by = "level with" if abs(gap) < LEVEL else f"{abs(100 * gap):.1f} points {side}"
        parts.append(f"{by} {words}")
    if _by_loss(run):
        start = f"{label(method)} reaches a loss of {summary.loss:.4g} on {pool} clients"
    else:
        before, after = percent(summary.accuracy_before), percent(summary.accuracy)
        start = f"{label(method)} takes {pool} clients from {before} to {after} %"
    return f"{start}{': ' if parts else ''}{' and '.join(parts)}."


def _by_loss(run: RunFolder) -> bool:
    return not run.report.has_accuracy


def loss_gap(summary: Summary, baseline: Summary) -> str:
    """Return how far a loss lies below or above another one, in percent of that."""
    if not baseline.loss:
        return f"{abs(summary.loss):.4g} above" if summary.loss else "level with"
    gap = (summary.loss - baseline.loss) / abs(baseline.loss)
    side = "above" if gap > 0 else "below"
    return "level with" if abs(gap) < LEVEL else f"{abs(100 * gap):.1f} % {side}"


def statements(run: RunFolder, method: str, views: Sequence[ClientView]) -> list[str]:
    """Return who gained, who lost, and whether the distance of a client's data explains it."""
    if not views:
        return []
    words = words_of(run)
    out = [_who_gained(method, views, words)]
    groups = group_views(views)
    key = kind_key(run)
    if key is not None and len(groups) > 1:
        best = groups[: 2 if len(groups) > 3 else 1]
        top = " and ".join(_group_words(group, words) for group in best)
        out.append(
            f"By {key}, the largest gains are those of {top}; the smallest those of "
            f"{_group_words(groups[-1], words)}."
        )
    return out + _distance_and_gain(views)


def compared(run: RunFolder, method: str, baseline: str, views: Sequence[ClientView]) -> str:
    """Return on how many clients a method is above, below and level with a baseline."""
    gaps = [view.over_baseline for view in views if view.over_baseline is not None]
    return f"{label(method)} against {lower(label(baseline))}: {_counts(gaps, words_of(run))}."


def lower(name: str) -> str:
    """Return a name as it stands within a sentence; abbreviations stay."""
    return name[0].lower() + name[1:] if name[1:2].islower() else name


@dataclass(frozen=True)
class Words:
    """What better, worse and the unit of a gain are called."""

    better: str = "above"
    worse: str = "below"
    unit: str = "points"


def words_of(run: RunFolder) -> Words:
    """Return those of accuracies, or of losses, of which the lower is better."""
    return Words("better", "worse", "percent") if _by_loss(run) else Words()


def _counts(gaps: Sequence[float], words: Words) -> str:
    above = sum(gap > LEVEL for gap in gaps)
    below = sum(gap < -LEVEL for gap in gaps)
    return f"{words.better} on {above}, {words.worse} on {below} of {len(gaps)} clients"


def baselines(run: RunFolder, method: str, pool: Pool) -> list[tuple[str, Summary]]:
    """Return what a method is measured against: the best fixed strategy, then the search."""
    other = "other " if method_name(method).role == "fixed" else ""
    out = []
    for role, words in (
        ("fixed", f"the best {other}fixed strategy"),
        ("search", "grid search per client"),
    ):
        table = [
            summary
            for summary in run.report.methods
            if (summary.pool, method_name(summary.method).role) == (pool, role)
            and summary.method != method
            and math.isfinite(merit(run, summary))
        ]
        if table:
            out.append((words, max(table, key=lambda summary: merit(run, summary))))
    return out


def paired(run: RunFolder, method: str, baseline: str, pool: Pool) -> list[str]:
    """Return what the differences of the clients say that both methods have tested."""
    views = client_views(run, method, baseline=baseline)
    gaps = [v.over_baseline for v in views if v.pool == pool and v.over_baseline is not None]
    if len(gaps) < 2:
        return []
    interval = mean_interval(gaps)
    low, high = map(points, interval.bounds or (math.nan, math.nan))
    return [
        _counts(gaps, words_of(run)),
        f"mean difference {points(interval.mean)}, 95 % interval {low} to {high}",
    ]


def _who_gained(method: str, views: Sequence[ClientView], words: Words) -> str:
    gains = [view.gain for view in views]
    text = f"{label(method)} against the starting model: {_counts(gains, words)}"
    worst = min(views, key=lambda view: view.gain)
    if worst.gain < -LEVEL:
        text += f"; {worst.name} loses most ({points(worst.gain)} {words.unit})"
    return text + "."


def _group_words(group: Group, words: Words) -> str:
    size = len(group.clients)
    unseen = ", unseen" if group.only_unseen else ""
    unit = "client" if size == 1 else "clients"
    return f"{group.label} ({points(group.mean_gain)} {words.unit}, {size} {unit}{unseen})"


def _distance_and_gain(views: Sequence[ClientView]) -> list[str]:
    pairs = [(view.distance, view.gain) for view in views if view.distance is not None]
    distances, gains = zip(*pairs, strict=True) if pairs else ((), ())
    if len(pairs) < FEWEST or min(len(set(distances)), len(set(gains))) < 2:
        return []
    from scipy import stats

    found = stats.spearmanr(distances, gains)
    how = f"(rank correlation {signed(float(found.statistic), '.2f')})"
    if abs(found.statistic) < WEAK or found.pvalue > 0.05:
        return [
            f"How far a client's data lie from the global model says little about its gain {how}."
        ]
    side = "more" if found.statistic > 0 else "less"
    return [f"The farther a client's data lie from the global model, the {side} it gains {how}."]


def summary_of(run: RunFolder, method: str, pool: str) -> Summary | None:
    """Return a method's summary on a pool, if there is one."""
    table = run.report.methods
    return next((s for s in table if (s.method, s.pool) == (method, pool)), None)
