"""Four pictures: each client's mixes, its rates, its accuracy before and after, who is made worse.

Each function draws into the axes that it is given, or into new ones, and returns them. Matplotlib
is imported on use; the extra ``notebook`` brings it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias

from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.personalization import Personalized
from fedl2p.reporting.client_views import label
from fedl2p.reporting.heat_maps import BLUE_TO_ORANGE, PURPLES
from fedl2p.reporting.svg import COLOURS
from fedl2p.runs.results import TOLERANCE, Report, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

ByClient: TypeAlias = Mapping[str, Hyperparams | Personalized]
"""What clients were fine-tuned with, by client."""

Scores: TypeAlias = Mapping[str, tuple[float, float]]
"""Accuracy before and after personalization, fractions in [0, 1], by client."""


def mixes(clients: ByClient, *, ax: Axes | None = None) -> Axes:
    """Draw the mix of every norm layer (column) of every client (row).

    Parameters
    ----------
    clients
        ``{name: hyperparams}``, or what :func:`fedl2p.personalize` returned.
    ax
        Where to draw; None for a new figure.

    Raises
    ------
    ValueError
        If there is no client, they are of several models, or the model has no norm layer.
    ModuleNotFoundError
        If Matplotlib is not installed; the message names the extra that brings it.
    """
    _check_installed()
    from matplotlib.colors import Normalize

    table = _hyperparams(clients)
    if not table[0].sites.norms:
        raise ValueError("the model has no batch-norm layer, so there is no mix; draw the rates")
    values = [one.mix.tolist() for one in table]
    title = "Mix: share of own statistics"
    colours = (BLUE_TO_ORANGE, Normalize(0.0, 1.0))
    return _heat_map(values, list(clients), table[0].sites.norms, title, colours, ax)


def rates(clients: ByClient, *, ax: Axes | None = None) -> Axes:
    """Draw the learning rate of every parameter tensor (column) of every client (row).

    Parameters
    ----------
    clients
        ``{name: hyperparams}``, or what :func:`fedl2p.personalize` returned.
    ax
        Where to draw; None for a new figure.

    Raises
    ------
    ValueError
        If there is no client, or they are of several models.
    ModuleNotFoundError
        If Matplotlib is not installed; the message names the extra that brings it.
    """
    _check_installed()
    from matplotlib.colors import LogNorm

    table = _hyperparams(clients)
    # A rate of 0 has no logarithm: it is drawn as the lowest of the others.
    positive = [v for one in table for v in one.rate.tolist() if v > 0] or [1.0]
    low, high = min(positive), max(positive)
    values = [[max(v, low) for v in one.rate.tolist()] for one in table]
    colours = (PURPLES, LogNorm(low, high if high > low else 1.1 * low))
    title = "Learning rate (logarithmic)"
    return _heat_map(values, list(clients), table[0].sites.params, title, colours, ax)


def accuracies(
    scores: Scores | Report,
    *,
    method: str = "fedl2p",
    pool: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw every client's accuracy before and after as an arrow, the largest gain first.

    Parameters
    ----------
    scores
        ``{client: (before, after)}``, fractions in [0, 1], or a report.
    method, pool
        Whose rows of a report; pool None for unseen clients, or seen ones if there are no others.
    ax
        Where to draw; None for a new figure.

    Raises
    ------
    ValueError
        If there is no client with an accuracy.
    ModuleNotFoundError
        If Matplotlib is not installed; the message names the extra that brings it.
    """
    _check_installed()
    if isinstance(scores, Report):
        scores = _scores(scores, method, pool)
    known = [(k, *pair) for k, pair in scores.items() if all(map(math.isfinite, pair))]
    if not known:
        raise ValueError("there is no client with an accuracy before and after; give one at least")
    known.sort(key=lambda one: one[1] - one[2])
    ax = ax or _new_axes(5.5, 0.6 + 0.24 * len(known))
    for row, (_, before, after) in enumerate(known):
        worse = after < before - TOLERANCE
        colour = COLOURS["loss" if worse else "gain"]
        ax.plot([100 * before, 100 * after], [row, row], color=colour, linewidth=2)
        ax.plot([100 * before], [row], "o", color=colour, markerfacecolor="white", markersize=5)
        ax.plot([100 * after], [row], "o", color=colour, markersize=7)
    ax.set_yticks(range(len(known)), [name for name, _, _ in known])
    ax.set_ylim(len(known) - 0.5, -0.5)
    ax.set_xlabel("accuracy in %: ring before, dot after")
    gain = sum(after - before for _, before, after in known) / len(known)
    ax.set_title(f"{100 * gain:+.1f} points, mean of {len(known)} clients", loc="left")
    _tidy(ax)
    return ax


def made_worse(
    scores: Mapping[str, Scores] | Report, *, pool: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draw for every method the share of clients that it makes worse.

    Parameters
    ----------
    scores
        ``{method: {client: (before, after)}}``, where a client is worse if its accuracy falls by
        more than half a point; or a report, which has its own count
        (:func:`fedl2p.runs.results.made_worse`).
    pool
        Of a report; None for unseen clients, or seen ones if there are no others.
    ax
        Where to draw; None for a new figure.

    Raises
    ------
    ValueError
        If there is no method with a tested client.
    ModuleNotFoundError
        If Matplotlib is not installed; the message names the extra that brings it.
    """
    _check_installed()
    if isinstance(scores, Report):
        shares = {label(one.method): one.share_worse for one in _summaries(scores, pool)}
    else:
        shares = {method: _share_worse(of_method) for method, of_method in scores.items()}
    shares = {method: share for method, share in shares.items() if math.isfinite(share)}
    if not shares:
        raise ValueError("there is no method with a tested client; give one at least")
    ax = ax or _new_axes(5.5, 0.7 + 0.34 * len(shares))
    bars = ax.barh(list(shares), [100 * share for share in shares.values()], color=COLOURS["loss"])
    ax.bar_label(bars, [f"{100 * share:.0f} %" for share in shares.values()], padding=4)
    ax.invert_yaxis()
    ax.set_xlim(0, max(10.0, 115 * max(shares.values())))
    ax.set_title("Clients made worse, %", loc="left")
    _tidy(ax)
    return ax


def _share_worse(scores: Scores) -> float:
    worse = [after < before - TOLERANCE for before, after in scores.values()]
    return sum(worse) / len(worse) if worse else math.nan


def _summaries(report: Report, pool: str | None) -> list[Summary]:
    """Return the summaries of a pool; without a name, of the last one that there is."""
    pools = [summary.pool for summary in report.methods]
    if pool is None:
        pool = "unseen" if "unseen" in pools else "seen"
    return [summary for summary in report.methods if summary.pool == pool]


def _scores(report: Report, method: str, pool: str | None) -> dict[str, tuple[float, float]]:
    found = [one for one in _summaries(report, pool) if one.method == method]
    if not found:
        there = ", ".join(dict.fromkeys(one.method for one in report.methods)) or "none"
        raise ValueError(f"the report has no method {method!r} in that pool; there is {there}")
    return {
        row.client: (row.accuracy_before, row.accuracy)
        for row in report.rows
        if (row.method, row.pool, row.failure) == (method, found[0].pool, None)
    }


def _hyperparams(clients: ByClient) -> list[Hyperparams]:
    table = [v.hyperparams if isinstance(v, Personalized) else v for v in clients.values()]
    if not table:
        raise ValueError("there is no client to draw; give one at least")
    for name, one in zip(clients, table, strict=True):
        if one.mix.dim() != 1:
            raise ValueError(f"{name!r} has hyperparameters of many clients; give hyperparams[i]")
        if one.sites != table[0].sites:
            raise ValueError(f"{name!r} is of another model than the others; draw it by itself")
    return table


def _heat_map(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    colours: tuple[Sequence[str], Normalize],
    ax: Axes | None,
) -> Axes:
    from matplotlib.colors import LinearSegmentedColormap

    colour_map, norm = LinearSegmentedColormap.from_list("", list(colours[0])), colours[1]
    ax = ax or _new_axes(max(4.0, 2.6 + 0.34 * len(columns)), 1.4 + 0.24 * len(rows))
    image = ax.imshow(values, cmap=colour_map, norm=norm, aspect="auto")
    ax.set_xticks(range(len(columns)), columns, rotation=90)
    ax.set_yticks(range(len(rows)), rows)
    ax.set_title(title, loc="left")
    bar = ax.figure.colorbar(image, ax=ax)
    bar.minorticks_off()
    bar.set_ticks([norm.inverse(share) for share in (0.0, 0.5, 1.0)])
    bar.ax.set_yticklabels([f"{tick:.2g}" for tick in bar.get_ticks()])
    _tidy(ax)
    return ax


def _tidy(ax: Any) -> None:
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _new_axes(width: float, height: float) -> Axes:
    from matplotlib import pyplot

    _, ax = pyplot.subplots(figsize=(width, height), layout="constrained")
    return ax


def _check_installed() -> None:
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "plots need Matplotlib, which is not installed; run pip install 'fedl2p[notebook]'",
            name="matplotlib",
        )
