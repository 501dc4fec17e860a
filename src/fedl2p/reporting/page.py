"""The page ``report.html``: one file that opens offline, made from a run folder alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedl2p.core.settings import WITH_ACCURACY
from fedl2p.reporting import findings, number_formats
from fedl2p.reporting.client_views import (
    ClientView,
    baseline_of,
    best_method,
    client_views,
    describe_about,
    focus_of,
    gain_unit,
    group_views,
    kind_key,
    label,
    main_pool,
    merit,
)
from fedl2p.reporting.comparison import flatten
from fedl2p.reporting.figures import gain_strips, learning_curve, strategy_maps
from fedl2p.reporting.first_screen import cards
from fedl2p.reporting.method_names import method_name
from fedl2p.runs import layout
from fedl2p.runs.columns import RoundLine
from fedl2p.runs.files import damaged, write_atomically
from fedl2p.runs.privacy_spent import epsilon_words
from fedl2p.runs.reading import RunFolder, read_run
from fedl2p.runs.results import POOLS, KindSummary, Pool, Summary


def write_page(folder: str | Path) -> Path:
    """Write ``report.html`` into a run folder, from the files in it.

    Parameters
    ----------
    folder
        A finished run, of this machine or another, made now or earlier.

    Returns
    -------
    Path
        The page. It loads nothing from outside itself.

    Raises
    ------
    ValueError
        In one line that names the file and what to do, if a file is missing or damaged.
    ModuleNotFoundError
        If Jinja2, Matplotlib or SciPy is not installed; the line says how to install it.
    """
    run = read_run(folder)
    if not run.report.methods:
        raise damaged(run.path / layout.CLIENTS, "it has no client with a result")
    path = run.path / layout.PAGE
    try:
        page = render(layout.PAGE, page_content(run))
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} needs {error.name}, which is not installed; run pip install 'fedl2p[report]'",
            name=error.name,
        ) from None
    write_atomically(path, page)
    return path


def page_content(run: RunFolder) -> dict[str, Any]:
    """Return what the template shows."""
    learned = focus_of(run)
    method = learned or best_method(run)
    baseline = baseline_of(run, method)
    views = client_views(run, method, baseline=baseline)
    groups = group_views(views)
    pools = [pool for pool in POOLS if any(s.pool == pool for s in run.report.methods)]
    return {
        "report": run.report,
        "headline": findings.headline(run, method),
        "cards": cards(run, method, views),
        "statements": findings.statements(run, method, views),
        "method": method,
        "learned": learned is not None,
        "pools": pools,
        "main_pool": main_pool(run),
        "comparison": _comparison(run, pools),
        "by_kind": _by_kind(run, method),
        "best": {pool: _best_score(run, pool) for pool in pools},
        "accuracy": run.report.has_accuracy,
        "unit": gain_unit(run),
        "nats": " (nats)" if _in_nats(run) else "",
        "failures": _failures(run),
        "kind": kind_key(run),
        "gains": gain_strips(
            groups,
            lambda view: view.gain,
            name="gains",
            unit=gain_unit(run),
            label=f"Gain of each client under {label(method)}, one row per group",
        ),
        "baseline": findings.lower(label(baseline)) if baseline else None,
        "compared": findings.compared(run, method, baseline, views) if baseline else "",
        "over_baseline": gain_strips(
            groups,
            lambda view: view.over_baseline,
            name="over-baseline",
            unit=gain_unit(run),
            label=f"{label(method)} minus {label(baseline)} for each client, one row per group",
        )
        if baseline
        else None,
        "strategies": strategy_maps(groups, unit=gain_unit(run)) if learned else [],
        "with_strategy": sum(view.strategy is not None for view in views),
        "profile_parts": _profile_parts(views),
        "with_mix": any(view.strategy and view.strategy.mix for view in views),
        "stages": _curves(run.rounds, " nats" if _in_nats(run) else ""),
        "single_rounds": [
            stage for stage, lines in _by_stage(run.rounds).items() if _num_rounds(lines) < 2
        ],
        "cost": sorted(
            dict.fromkeys([*run.report.bytes_per_client_round, *run.report.seconds]),
            key=lambda stage: stage == "total",
        ),
        "clients": sorted(views, key=lambda view: (-view.gain, view.name)),
        "settings": flatten(run.config),
    }


def render(template: str, content: Mapping[str, Any]) -> str:
    """Return a page made of one of the templates."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedl2p.reporting", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Figures are escaped where they are made; everything else is escaped here.
    environment.filters["markup"] = Markup
    environment.filters |= {
        "about": describe_about,
        "bytes": number_formats.bytes_of,
        "epsilon": epsilon_words,
        "label": label,
        "loss": number_formats.loss,
        "percent": number_formats.percent,
        "share": number_formats.share,
        "points": number_formats.points,
        "seconds": number_formats.seconds,
        "short": number_formats.short_number,
        "stage": _stage_name,
        "what": lambda method: method_name(method).line,
    }
    return environment.get_template(template).render(content) + "\n"


def _by_kind(run: RunFolder, method: str) -> dict[str, dict[str, KindSummary]]:
    """Return summaries by kind and method on the main pool, the method in focus first."""
    table: dict[str, dict[str, KindSummary]] = {}
    for one in run.report.kinds:
        if one.pool == main_pool(run):
            table.setdefault(one.kind, {})[one.method] = one
    return {
        kind: dict(sorted(found.items(), key=lambda item: item[0] != method))
        for kind, found in table.items()
    }


_PARTS = {
    "divergence": "divergences",
    "moments": "moments",
    "gradients": "relative gradients",
    "loss": "loss and accuracy of the global model",
    "labels": "entropy, number of classes and agreement of the labels",
    "size": "number of examples",
}


def _profile_parts(views: Sequence[ClientView]) -> str:
    """Return what the clients' profiles hold, in words."""
    known = [view.strategy for view in views if view.strategy is not None]
    return ", ".join(
        words for field, words in _PARTS.items() if any(getattr(s, field) for s in known)
    )


def _failures(run: RunFolder) -> dict[tuple[str, str, tuple[str, ...]], list[str]]:
    """Return the clients by pool, reason and the methods that failed."""
    methods: dict[tuple[str, str, str], list[str]] = {}
    for row in run.report.failures:
        methods.setdefault((row.client, row.pool, row.failure or ""), []).append(label(row.method))
    clients: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for (client, pool, reason), failed in methods.items():
        clients.setdefault((pool, reason, tuple(failed)), []).append(client)
    return clients


def _best_score(run: RunFolder, pool: Pool) -> float | None:
    """Return the highest accuracy, or the lowest loss where there is none."""
    table = [s for s in run.report.methods if s.pool == pool]
    if not run.report.has_accuracy:
        return min((s.loss for s in table if math.isfinite(s.loss)), default=None)
    return max((s.accuracy for s in table if math.isfinite(s.accuracy)), default=None)


def _in_nats(run: RunFolder) -> bool:
    return run.config.get("loss", "cross-entropy") in WITH_ACCURACY


def _comparison(run: RunFolder, pools: Sequence[Pool]) -> dict[str, list[Summary | None]]:
    """Return the summaries of each method by pool, the best on the main pool first."""
    table = {(s.method, s.pool): s for s in run.report.methods}
    main = main_pool(run)

    def order(method: str) -> float:
        summary = table.get((method, main))
        return -merit(run, summary) if summary else math.inf

    methods = sorted(dict.fromkeys(method for method, _ in table), key=order)
    return {method: [table.get((method, pool)) for pool in pools] for method in methods}


def _by_stage(rounds: Sequence[RoundLine]) -> dict[str, list[RoundLine]]:
    stages: dict[str, list[RoundLine]] = {}
    for line in rounds:
        stages.setdefault(line.stage, []).append(line)
    return stages


def _num_rounds(lines: Sequence[RoundLine]) -> int:
    """Return the number of rounds: the last line only evaluates what the one before it made."""
    return max(line.round for line in lines) - 1


def _rounds(count: int) -> str:
    return "1 round" if count == 1 else f"{count} rounds"


def _stage_name(stage: str) -> str:
    names = {
        "pretrain": "Pre-training the global model",
        "learn": "Learning the meta-nets",
        "personalize": "Personalizing the clients",
        "total": "Whole run",
    }
    return names.get(stage) or label(stage)


def _curves(rounds: Sequence[RoundLine], unit: str) -> list[dict[str, Any]]:
    """Return the curves of every stage of several rounds, and a line about them."""
    out: list[dict[str, Any]] = []
    for stage, lines in _by_stage(rounds).items():
        if _num_rounds(lines) < 2:
            continue
        losses = [line.loss for line in lines]
        finite = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
        best = min(finite, key=lambda i: losses[i]) if finite else None
        out.append(
            {
                "name": _stage_name(stage),
                "note": _curve_note(lines, best, unit),
                **{
                    field: learning_curve(
                        # A round evaluates the state that it received: round 1 has none behind it.
                        [line.round - 1 for line in lines],
                        [getattr(line, field) for line in lines],
                        name=f"{field}-{len(out)}",
                        label=f"{_stage_name(stage)}: {field} by round",
                        percent=field == "accuracy",
                        unit=unit,
                        best=best,
                    )
                    for field in ("loss", "accuracy")
                },
            }
        )
    return out


def _curve_note(lines: Sequence[RoundLine], best: int | None, unit: str) -> str:
    clients = number_formats.span([line.clients for line in lines[:-1]])
    note = f"{_rounds(_num_rounds(lines))}, {clients} clients a round"
    if best is not None:
        line = lines[best]
        note += f"; lowest loss {line.loss:.3f}{unit} after {_rounds(line.round - 1)}"
        if math.isfinite(line.accuracy):
            note += f", accuracy there {number_formats.percent(line.accuracy)} %"
    if failures := sum(line.failures for line in lines):
        note += f"; {failures} answers of clients failed and were left out"
    return note
