"""What the numbers of a run say, in words; the same words whether they flatter or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedl2p.reporting.client_views import ClientView, Group, group_views, kind_key, label, main_pool
from fedl2p.reporting.intervals import mean_interval
from fedl2p.reporting.method_names import method_name
from fedl2p.reporting.number_formats import LEVEL, percent, points, seconds, signed
from fedl2p.runs.reading import RunFolder
from fedl2p.runs.results import Pool, Row, Summary


@dataclass(frozen=True)
class Card:
    """One number with what it is and what it rests on."""

    title: str
    value: str
    detail: str


def rivals(run: RunFolder, method: str, pool: Pool) -> list[tuple[str, Summary]]:
    """Return what a method is measured against: the best fixed strategy, then the search."""
    table = [s for s in run.report.methods if s.pool == pool and s.method != method]
    table = [s for s in table if math.isfinite(s.accuracy)]
    found = []
    other = "other " if method_name(method).role == "fixed" else ""
    for role, words in (
        ("fixed", f"the best {other}fixed strategy"),
        ("search", "grid search per client"),
    ):
        best = max(
            (s for s in table if method_name(s.method).role == role),
            key=lambda s: s.accuracy,
            default=None,
        )
        if best is not None:
            found.append((words, best))
    return found


def headline(run: RunFolder, method: str) -> str:
    """Return the main result as one sentence."""
    pool = main_pool(run)
    own = _summary(run, method, pool)
    if own is None or not math.isfinite(own.accuracy):
        return f"{label(method)} has no tested client, so there is no accuracy to report."
    start = f"{label(method)} reaches {percent(own.accuracy)} % on {pool} clients"
    parts = []
    for words, rival in rivals(run, method, pool):
        if method_name(rival.method).role == "fixed":
            words += f" ({_short(rival.method)})"
        parts.append(f"{_distance(own.accuracy - rival.accuracy)} {words}")
    return f"{start}: {' and '.join(parts)}." if parts else f"{start}."


def cards(run: RunFolder, method: str) -> list[Card]:
    """Return the numbers behind the headline."""
    out: list[Card] = []
    for pool in (main_pool(run), "seen"):
        own = _summary(run, method, pool)
        if own is not None and not any(pool in card.title.lower().split() for card in out):
            out.append(
                Card(
                    f"{pool.capitalize()} clients, before → after",
                    f"{percent(own.accuracy_before)} → {percent(own.accuracy)} %",
                    f"{own.clients} clients; worst tenth {percent(own.accuracy_worst_decile)} %",
                )
            )
    pool = main_pool(run)
    for words, rival in rivals(run, method, pool):
        out.append(_rival_card(run, method, rival, pool, words))
    return out


def statements(run: RunFolder, method: str, views: Sequence[ClientView]) -> list[str]:
    """Return who gained and why, one sentence each."""
    if not views:
        return []
    out = [_who_gained(method, views)]
    groups = group_views(views)
    key = kind_key(run)
    if key is not None and len(groups) > 1:
        out.append(_kinds(key, groups))
    out += _why(views)
    return out


def against_sentence(method: str, rival: str, views: Sequence[ClientView]) -> str:
    """Return on how many clients a method is above, level with and below a rival."""
    gaps = [view.against for view in views if view.against is not None]
    above = sum(gap > LEVEL for gap in gaps)
    below = sum(gap < -LEVEL for gap in gaps)
    return (
        f"{label(method)} is above {_short(rival)} on {above} of {len(gaps)} clients, "
        f"below on {below}, level on {len(gaps) - above - below}."
    )


def _rival_card(run: RunFolder, method: str, rival: Summary, pool: Pool, words: str) -> Card:
    own = _summary(run, method, pool)
    assert own is not None
    theirs = {r.client: r for r in run.report.rows if r.method == rival.method and _counts(r, pool)}
    gaps = [
        row.accuracy - theirs[row.client].accuracy
        for row in run.report.rows
        if row.method == method and _counts(row, pool) and row.client in theirs
    ]
    detail = f"{label(rival.method)}: {percent(rival.accuracy)} %"
    if gaps:
        ahead = sum(gap > LEVEL for gap in gaps)
        behind = sum(gap < -LEVEL for gap in gaps)
        detail += f"; above on {ahead}, below on {behind} of {len(gaps)} clients"
        interval = mean_interval(gaps)
        if interval.bounds:
            low, high = interval.bounds
            detail += (
                f"; mean difference per client {points(interval.mean)}, "
                f"95 % interval {points(low)} to {points(high)}"
            )
    if method_name(rival.method).role == "search":
        detail += (
            f"; {seconds(own.seconds_per_client)} s against "
            f"{seconds(rival.seconds_per_client)} s per client"
        )
    gap = points(own.accuracy - rival.accuracy)
    return Card(f"Against {words}, {pool} clients", f"{gap} points", detail)


def _who_gained(method: str, views: Sequence[ClientView]) -> str:
    up = sum(view.gain > LEVEL for view in views)
    down = [view for view in views if view.gain < -LEVEL]
    if up == len(views):
        return f"{label(method)} makes all {up} clients more accurate than the starting model does."
    text = (
        f"{label(method)} makes {up} of {len(views)} clients more accurate than the starting model "
        f"does, leaves {len(views) - up - len(down)} as they were and makes {len(down)} worse"
    )
    if down:
        worst = min(down, key=lambda view: view.gain)
        most = ", " if len(down) == 1 else ", most of all "
        text += f"{most}{worst.name} ({points(worst.gain)} points)"
    return text + "."


def _kinds(key: str, groups: Sequence[Group]) -> str:
    def name(group: Group) -> str:
        size = len(group.clients)
        unit = "client" if size == 1 else "clients"
        unseen = (", unseen" if size == 1 else ", all unseen") if group.only_unseen else ""
        return f"{group.label} ({points(group.mean_gain)} points, {size} {unit}{unseen})"

    top = groups[: 2 if len(groups) > 3 else 1]
    return (
        f"By {key}, the largest gains are those of {' and '.join(map(name, top))}; "
        f"the smallest those of {name(groups[-1])}."
    )


def _why(views: Sequence[ClientView]) -> list[str]:
    known = [(view, view.distance) for view in views]
    pairs = [(view, distance) for view, distance in known if distance is not None]
    if len(pairs) < 6:
        return []
    rho = _rank_correlation([d for _, d in pairs], [view.gain for view, _ in pairs])
    out = [] if rho is None else [_distance_and_gain(rho, len(pairs))]
    pairs.sort(key=lambda pair: pair[1])
    third = len(pairs) // 3
    near, far = [v for v, _ in pairs[:third]], [v for v, _ in pairs[-third:]]
    mixes = _mean_mix(near), _mean_mix(far)
    if mixes[0] is not None and mixes[1] is not None:
        out.append(
            f"The nearest third of clients mixes in {100 * mixes[0]:.0f} % of its own statistics "
            f"on average, the farthest third {100 * mixes[1]:.0f} %; their rates are "
            f"{_mean_rate(near):.2g} and {_mean_rate(far):.2g} (geometric means)."
        )
    return out


def _rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation; None if one of the two is constant."""
    if min(len(set(first)), len(set(second))) < 2:
        return None
    from scipy import stats

    return float(stats.spearmanr(first, second).statistic)


def _distance_and_gain(rho: float, clients: int) -> str:
    # Below this a rank correlation is weak, or may be chance (5 %) with so few clients.
    least = max(0.3, 1.96 / math.sqrt(clients - 1))
    how = f"(rank correlation {signed(rho, '.2f')})"
    if rho >= least:
        return f"The farther a client's data lie from the global model, the more it gains {how}."
    if rho <= -least:
        return f"The farther a client's data lie from the global model, the less it gains {how}."
    return f"How far a client's data lie from the global model says little about its gain {how}."


def _mean_mix(views: Sequence[ClientView]) -> float | None:
    mixes = [v for view in views if view.strategy for v in view.strategy.mix.values()]
    values = [v for v in mixes if math.isfinite(v)]
    return sum(values) / len(values) if values else None


def _mean_rate(views: Sequence[ClientView]) -> float:
    rates = [v for view in views if view.strategy for v in view.strategy.rate.values()]
    logs = [math.log(v) for v in rates if 0 < v < math.inf]
    return math.exp(sum(logs) / len(logs)) if logs else 0.0


def _distance(gap: float) -> str:
    if abs(gap) < LEVEL:
        return "level with"
    return f"{abs(100 * gap):.1f} points {'above' if gap > 0 else 'below'}"


def _short(method: str) -> str:
    text = label(method)
    return text[0].lower() + text[1:] if text[1:2].islower() else text


def _summary(run: RunFolder, method: str, pool: Pool) -> Summary | None:
    table = run.report.methods
    return next((s for s in table if (s.method, s.pool) == (method, pool)), None)


def _counts(row: Row, pool: Pool) -> bool:
    return row.pool == pool and row.failure is None and row.num_test > 0
