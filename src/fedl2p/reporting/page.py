"""The page ``report.html``: one file that opens offline, made from a run folder alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedl2p.reporting import findings, number_formats
from fedl2p.reporting.client_views import (
    ClientView,
    baseline_of,
    best_method,
    client_views,
    describe_about,
    focus_of,
    group_views,
    kind_key,
    label,
    main_pool,
)
from fedl2p.reporting.comparison import flatten
from fedl2p.reporting.figures import gain_strips, learning_curve, strategy_maps
from fedl2p.reporting.method_names import method_name
from fedl2p.runs.files import damaged, write_atomically
from fedl2p.runs.privacy_spent import epsilon_words
from fedl2p.runs.reading import RoundLine, RunFolder, read_run
from fedl2p.runs.results import POOLS, Pool, Summary


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
        raise damaged(run.path / "clients.csv", "it has no client with a result")
    path = run.path / "report.html"
    try:
        page = render("report.html", page_content(run))
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} needs {error.name}, which is not installed; run pip install 'fedl2p[report]'",
            name=error.name,
        ) from None
    write_atomically(path, page)
    return path


def page_content(run: RunFolder) -> dict[str, Any]:
    """Return everything that the template shows, in words, numbers and markup."""
    focus = focus_of(run)
    method = focus or best_method(run)
    baseline = baseline_of(run, method)
    views = client_views(run, method, baseline=baseline)
    groups = group_views(views)
    return {
        "report": run.report,
        "headline": findings.headline(run, method),
        "cards": findings.cards(run, method),
        "statements": findings.statements(run, method, views),
        "method": label(method),
        "learned": focus is not None,
        "pools": [_pool_head(run, pool) for pool in POOLS if _table(run, pool)],
        "comparison": _comparison(run, method),
        "failures": _failures(run),
        "kind": kind_key(run),
        "has_pools": len({view.pool for view in views}) == 2,
        "gains": gain_strips(
            groups,
            lambda view: view.gain,
            name="gains",
            label=f"Gain of each client under {label(method)}, one row per group",
        ),
        "baseline": findings.lower(label(baseline)) if baseline else None,
        "compared": findings.compared(method, baseline, views) if baseline else "",
        "over_baseline": gain_strips(
            groups,
            lambda view: view.over_baseline,
            name="over-baseline",
            label=f"{label(method)} minus {label(baseline)} for each client, one row per group",
        )
        if baseline
        else None,
        "strategies": strategy_maps(groups) if focus else [],
        "with_strategy": sum(view.strategy is not None for view in views),
        "with_mix": any(view.strategy and view.strategy.mix for view in views),
        "stages": _stages(run.rounds),
        "single_rounds": _single_rounds(run.rounds),
        "cost": _cost(run),
        "private": _private(run),
        "clients": _clients(views),
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
    # The markup of figures is escaped where it is made; everything else is escaped here.
    environment.filters["markup"] = Markup
    environment.filters["points"] = number_formats.points
    environment.filters["percent"] = number_formats.percent
    return environment.get_template(template).render(content) + "\n"


def _failures(run: RunFolder) -> list[tuple[str, str, str, str]]:
    """Return client, pool, reason and the methods for which it is so."""
    methods: dict[tuple[str, str, str], list[str]] = {}
    for row in run.report.failures:
        methods.setdefault((row.client, row.pool, row.failure or ""), []).append(label(row.method))
    return [(*key, "; ".join(names)) for key, names in methods.items()]


def _table(run: RunFolder, pool: Pool) -> list[Summary]:
    return [summary for summary in run.report.methods if summary.pool == pool]


def _pool_head(run: RunFolder, pool: Pool) -> dict[str, Any]:
    counts = [summary.clients for summary in _table(run, pool)]
    return {"pool": pool, "clients": max(counts)}


def _comparison(run: RunFolder, method: str) -> list[dict[str, Any]]:
    """Return the lines of the table, the most accurate on the main pool first."""
    tables = {pool: {s.method: s for s in _table(run, pool)} for pool in POOLS}
    methods = list(dict.fromkeys(summary.method for summary in run.report.methods))
    main = tables[main_pool(run)]

    def order(name: str) -> float:
        accuracy = main[name].accuracy if name in main else math.nan
        return -accuracy if math.isfinite(accuracy) else 1.0

    best = {
        pool: max((s.accuracy for s in table.values() if math.isfinite(s.accuracy)), default=None)
        for pool, table in tables.items()
    }
    return [
        {
            "label": label(name),
            "line": method_name(name).line,
            "focus": name == method,
            "cells": [_cells(tables[pool].get(name), best[pool]) for pool in POOLS if tables[pool]],
        }
        for name in sorted(methods, key=order)
    ]


_COLUMNS = ("before", "after", "worst", "loss", "seconds", "clients")


def _cells(summary: Summary | None, best: float | None) -> dict[str, Any]:
    if summary is None:
        empty: dict[str, Any] = dict.fromkeys(_COLUMNS, number_formats.NO_NUMBER)
        return empty | {"best": False}
    return {
        "before": number_formats.percent(summary.accuracy_before),
        "after": number_formats.percent(summary.accuracy),
        "worst": number_formats.percent(summary.accuracy_worst_decile),
        "loss": f"{summary.loss:.3f}" if math.isfinite(summary.loss) else "not finite",
        "seconds": number_formats.seconds(summary.seconds_per_client),
        "clients": str(summary.clients),
        "best": summary.accuracy == best,
    }


def _by_stage(rounds: Sequence[RoundLine]) -> dict[str, list[RoundLine]]:
    stages: dict[str, list[RoundLine]] = {}
    for line in rounds:
        stages.setdefault(line.stage, []).append(line)
    return stages


def _trained(lines: Sequence[RoundLine]) -> int:
    """Return the rounds of training: the last line only judges what the one before it made."""
    return max(line.round for line in lines) - 1


def _rounds(count: int) -> str:
    return "1 round" if count == 1 else f"{count} rounds"


_STAGE_NAMES = {
    "pretrain": "Pre-training the global model",
    "learn": "Learning the meta-nets",
}


def _stages(rounds: Sequence[RoundLine]) -> list[dict[str, Any]]:
    """Return the curves of every stage of several rounds."""
    out: list[dict[str, Any]] = []
    for stage, lines in _by_stage(rounds).items():
        if _trained(lines) < 2:
            continue
        # A round judges the state that it received, so round 1 has no training behind it.
        xs = [float(line.round - 1) for line in lines]
        losses = [line.loss for line in lines]
        finite = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
        best = min(finite, key=lambda i: losses[i]) if finite else None
        name = _STAGE_NAMES.get(stage, label(stage))
        asked = number_formats.span([line.clients for line in lines[:-1]])
        note = f"{_rounds(_trained(lines))}, {asked} clients a round"
        if best is not None:
            at = lines[best]
            note += (
                f"; lowest loss {at.loss:.3f} nats after {_rounds(at.round - 1)}, "
                f"accuracy there {number_formats.percent(at.accuracy)} %"
            )
        failed = sum(line.failures for line in lines)
        if failed:
            note += f"; {failed} answers of clients failed and were left out"
        accuracies = [line.accuracy for line in lines]
        marked = best if best is not None and math.isfinite(accuracies[best]) else None
        out.append(
            {
                "name": name,
                "note": note,
                "loss": learning_curve(
                    xs,
                    losses,
                    name=f"loss-{len(out)}",
                    label=f"{name}: loss by round",
                    percent=False,
                    best=best,
                ),
                "accuracy": learning_curve(
                    xs,
                    accuracies,
                    name=f"accuracy-{len(out)}",
                    label=f"{name}: accuracy by round",
                    percent=True,
                    best=marked,
                ),
            }
        )
    return out


def _single_rounds(rounds: Sequence[RoundLine]) -> str:
    names = [
        _STAGE_NAMES.get(stage, label(stage))
        for stage, lines in _by_stage(rounds).items()
        if _trained(lines) < 2
    ]
    return ", ".join(names)


def _private(run: RunFolder) -> dict[str, Any] | None:
    """Return what differential privacy the run gave, or None."""
    spent = run.report.privacy
    if not spent.stages:
        return None
    return {
        "seeded": any(stage.randomness == "seed" for stage in spent.stages),
        "stages": [
            {
                "stage": _STAGE_NAMES.get(stage.stage, label(stage.stage)),
                "mechanism": stage.mechanism,
                "noise": f"{stage.noise:g}",
                "clip": f"{stage.clip:g}",
                "clients": f"{stage.cohort} of {stage.population}",
                "releases": str(stage.releases),
                "epsilon": epsilon_words(stage.epsilon),
                "delta": f"{stage.delta:g}",
            }
            for stage in spent.stages
        ],
        "methods": [
            {
                "method": label(own.method),
                "epsilon": epsilon_words(own.epsilon),
                "delta": f"{own.delta:g}",
                "open": "; ".join(own.open),
            }
            for own in spent.methods
        ],
    }


def _cost(run: RunFolder) -> list[dict[str, str]]:
    """Return seconds and bytes by stage, the whole run last; what is unknown stays empty."""
    report = run.report
    stages = dict.fromkeys([*report.bytes_per_client_round, *report.seconds])
    names = {**_STAGE_NAMES, "personalize": "Personalizing the clients", "total": "Whole run"}
    last = sorted(stages, key=lambda stage: stage == "total")
    out = []
    if report.bytes_model:
        down = number_formats.bytes_of(report.bytes_model)
        out.append({"stage": "Global model, sent once", "seconds": "", "down": down, "up": ""})
    for stage in last:
        ways = report.bytes_per_client_round.get(stage, {})
        out.append(
            {
                "stage": names.get(stage, label(stage)),
                "seconds": f"{report.seconds[stage]:,.1f}" if stage in report.seconds else "",
                "down": number_formats.bytes_of(ways["down"]) if "down" in ways else "",
                "up": number_formats.bytes_of(ways["up"]) if "up" in ways else "",
            }
        )
    return out


def _clients(views: Sequence[ClientView]) -> list[dict[str, Any]]:
    return [
        {
            "name": view.name,
            "pool": view.pool,
            "about": describe_about(view.about),
            "train": view.row.num_train,
            "test": view.row.num_test,
            "before": view.row.accuracy_before,
            "after": view.row.accuracy,
            "gain": view.gain,
            "over_baseline": view.over_baseline,
            "divergence": _two_digits(view.distance),
            "mix": "" if view.mean_mix is None else f"{view.mean_mix:.2f}",
            "rate": _two_digits(view.mean_rate),
        }
        for view in sorted(views, key=lambda view: (-view.gain, view.name))
    ]


def _two_digits(value: float | None) -> str:
    return "" if value is None else number_formats.short_number(value)
