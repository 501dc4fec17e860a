"""The four answers on a report's first screen: what was gained, for whom, who lost, the cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedl2p import methods
from fedl2p.reporting import findings
from fedl2p.reporting.client_views import ClientView, Group, group_views, main_pool
from fedl2p.reporting.number_formats import (
    LEVEL,
    NO_NUMBER,
    bytes_of,
    percent,
    points,
    seconds,
    share,
)
from fedl2p.runs.reading import RunFolder
from fedl2p.runs.results import Summary


@dataclass(frozen=True)
class Card:
    """A question, its answer in one number, and the lines that the number rests on."""

    title: str
    value: str
    details: tuple[str, ...]


def cards(run: RunFolder, method: str, views: Sequence[ClientView]) -> list[Card]:
    """Return the four answers for a method; none without a tested client of the main pool.

    Parameters
    ----------
    run, method
        A run's folder, and the method that its page is about.
    views
        The clients under this method.
    """
    pool = main_pool(run)
    summary = findings.summary_of(run, method, pool)
    views = [view for view in views if view.pool == pool]
    if summary is None or not views:
        return []
    return [
        _gained(run, method, summary),
        _for_whom(run, views),
        _lost(run, method, summary, views),
        _cost(run, method, summary),
    ]


def _gained(run: RunFolder, method: str, summary: Summary) -> Card:
    lines = []
    if run.report.has_accuracy:
        value = f"{points(summary.accuracy - summary.accuracy_before)} points"
        for pool in dict.fromkeys((summary.pool, "seen")):
            if (of_pool := findings.summary_of(run, method, pool)) is not None:
                before, after = percent(of_pool.accuracy_before), percent(of_pool.accuracy)
                worst = percent(of_pool.accuracy_worst_decile)
                lines.append(f"{pool} clients: {before} → {after} %, their worst tenth {worst} %")
    else:
        value = f"loss {summary.loss:.4g}"
        lines.append(f"mean over the test examples of {summary.clients} {summary.pool} clients")
        if (seen := findings.summary_of(run, method, "seen")) and summary.pool != "seen":
            lines.append(f"seen clients: {seen.loss:.4g}")
    for words, baseline in findings.baselines(run, method, summary.pool):
        if run.report.has_accuracy:
            gap = f"{points(summary.accuracy - baseline.accuracy)} points"
        else:
            gap = f"loss {findings.loss_gap(summary, baseline)}"
        paired = findings.paired(run, method, baseline.method, summary.pool)
        lines.append(f"against {words}: {'; '.join((gap, *paired))}")
    return Card("What was gained", value, tuple(lines))


def _for_whom(run: RunFolder, views: Sequence[ClientView]) -> Card:
    words = findings.words_of(run)
    gainers = sum(view.gain > LEVEL for view in views)
    than = "better than" if words.better == "better" else words.better
    lines = [f"{views[0].pool} clients are {than} their starting model"]
    best = [group for group in group_views(views) if group.mean_gain > LEVEL][:3]
    if len(group_views(views)) > 1:
        lines += [_mean_of(group, words.unit) for group in best]
    return Card("For whom", f"{gainers} of {len(views)}", tuple(lines))


def _lost(run: RunFolder, method: str, summary: Summary, views: Sequence[ClientView]) -> Card:
    words = findings.words_of(run)
    lines = [f"of the {summary.pool} clients are made worse than by their starting model"]
    for role, baseline in findings.baselines(run, method, summary.pool):
        lines.append(f"{role}: {share(baseline.share_worse)} %")
    losers = [group for group in group_views(views) if group.mean_gain < -LEVEL][-2:]
    if len(group_views(views)) > 1:
        lines += [_mean_of(group, words.unit) for group in reversed(losers)]
    worst = min(views, key=lambda view: view.gain)
    if worst.gain < -LEVEL:
        lines.append(f"{worst.name} loses most: {points(worst.gain)} {words.unit}")
    return Card("Who lost", f"{share(summary.share_worse)} %", tuple(lines))


def _mean_of(group: Group, unit: str) -> str:
    size = len(group.clients)
    clients = "1 client" if size == 1 else f"{size} clients"
    return f"{group.label}: {points(group.mean_gain)} {unit} ({clients})"


def _cost(run: RunFolder, method: str, summary: Summary) -> Card:
    stage = "learn" if method == methods.METANETS else method
    rounds = [line for line in run.rounds if line.stage == stage]
    each = f"{seconds(summary.seconds_per_client)} s"
    lines = []
    if rounds:
        total = math.fsum(line.seconds for line in rounds)
        count = max(line.round for line in rounds) - 1
        value = f"{seconds(total)} s, once"
        lines.append(f"{count} rounds of learning; then {each} for each client")
        ways = run.report.bytes_per_client_round.get(stage, {})
        if "down" in ways and "up" in ways:
            lines.append(
                f"a client receives {bytes_of(ways['down'])} and sends {bytes_of(ways['up'])} in a "
                "round"
            )
    else:
        value = f"{each} per client"
        lines.append("no rounds of its own")
    for words, baseline in findings.baselines(run, method, summary.pool):
        lines.append(f"{words}: {seconds(baseline.seconds_per_client)} s for each client")
    return Card("What it cost", value.replace(f"{NO_NUMBER} s", "not known"), tuple(lines))
