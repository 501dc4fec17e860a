"""Several runs that differ in their seed only, in one table with 95 % intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedl2p.reporting.intervals import Interval, mean_interval
from fedl2p.runs import layout
from fedl2p.runs.config import read_config
from fedl2p.runs.files import without_infinities
from fedl2p.runs.kinds import geometric_mean, mean_of, or_nan
from fedl2p.runs.results import POOLS, SHARE_WORSE, WORST_DECILE, KindSummary, Pool, Report, Summary
from fedl2p.text_table import columns


@dataclass(frozen=True, kw_only=True)
class Line:
    """One method on one pool of clients, over the seeds.

    Parameters
    ----------
    method, pool
        As in a report.
    accuracy, worst_decile, share_worse, loss
        Mean over seeds and half-width of its 95 % t-interval; fractions, and the loss's unit.
    difference
        Accuracy of the reference method minus this one's, paired by seed; None for the reference
        itself, or if it did not run. Where the loss has no accuracy, the same of losses.
    above
        Number of seeds in which the reference is strictly better than this method; None likewise.
    """

    method: str
    pool: Pool
    accuracy: Interval
    worst_decile: Interval
    share_worse: Interval
    loss: Interval
    difference: Interval | None
    above: int | None


@dataclass(frozen=True, kw_only=True)
class KindLine:
    """One method on the clients of one kind in one pool, over the seeds that have any.

    Parameters
    ----------
    method, pool, kind
        As in a report.
    accuracy, share_worse, loss
        As in :class:`Line`.
    mix, rate
        What the clients were fine-tuned with: means over seeds, of rates the geometric one; NaN if
        that is not known.
    """

    method: str
    pool: Pool
    kind: str
    accuracy: Interval
    share_worse: Interval
    loss: Interval
    mix: float
    rate: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The table over seeds. ``str()`` gives it for a terminal, :meth:`to_dict` for JSON."""

    recipe: str
    reference: str
    seeds: tuple[int, ...]
    lines: tuple[Line, ...]
    kinds: tuple[KindLine, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def has_accuracy(self) -> bool:
        """Whether methods are compared by accuracy; if not, by loss."""
        return not all(math.isnan(line.accuracy.mean) for line in self.lines) or all(
            math.isnan(line.loss.mean) for line in self.lines
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, fractions in [0, 1]; an interval of one seed is null."""
        return {
            "recipe": self.recipe,
            "reference": self.reference,
            "seeds": list(self.seeds),
            "confidence": 0.95,
            "methods": [
                {
                    "method": line.method,
                    "pool": line.pool,
                    **_plain("accuracy", line.accuracy),
                    **_plain(WORST_DECILE, line.worst_decile),
                    **_plain(SHARE_WORSE, line.share_worse),
                    **_plain("loss", line.loss),
                    **_plain("difference", line.difference),
                    "seeds_above": line.above,
                }
                for line in self.lines
            ],
            "kinds": [
                {
                    "method": line.method,
                    "pool": line.pool,
                    "kind": line.kind,
                    **_plain("accuracy", line.accuracy),
                    **_plain(SHARE_WORSE, line.share_worse),
                    **_plain("loss", line.loss),
                    **without_infinities({"mix": line.mix, "rate": line.rate}),
                }
                for line in self.kinds
            ],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        """Return the table, accuracies in percent, one block per pool of clients."""
        seeds = ", ".join(map(str, self.seeds))
        out = [f"{self.recipe}: mean over {_count(len(self.seeds), 'seed')} ({seeds})"]
        scores = ("accuracy %", "worst tenth %") if self.has_accuracy else ("loss",)
        scores = (*scores, "made worse %")
        side = "above in" if self.has_accuracy else "below in"
        heads = ("method", *scores, f"{self.reference} minus it", side)
        for pool in POOLS:
            cells = [self._cells(line) for line in self.lines if line.pool == pool]
            if cells:
                out += ["", f"{pool} clients", *columns([heads, *cells])]
            if lines := [line for line in self.kinds if line.pool == pool]:
                score = "accuracy %" if self.has_accuracy else "loss"
                out += ["", f"{pool} clients by kind, {score}", *columns(self._by_kind(lines))]
        if len(self.seeds) > 1:
            out += [
                "",
                "± is the 95 % t-interval over seeds; differences"
                f"{' in points' if self.has_accuracy else ''}, paired by seed",
            ]
        else:
            out += ["", "one seed: no intervals; compare several runs that differ in --seed"]
        return "\n".join([*out, *(f"note: {note}" for note in self.notes)])

    def _by_kind(self, lines: Sequence[KindLine]) -> list[tuple[str, ...]]:
        """Return rows of methods and columns of kinds, and what the reference chose."""
        write = percent_interval if self.has_accuracy else plain_interval
        kinds = tuple(dict.fromkeys(line.kind for line in lines))
        table = {(line.method, line.kind): line for line in lines}
        scored = {k: one.accuracy if self.has_accuracy else one.loss for k, one in table.items()}
        rows = [("method", *kinds)]
        for method in dict.fromkeys(line.method for line in lines):
            keys = [(method, kind) for kind in kinds]
            rows.append((method, *(write(scored[k]) if k in scored else "" for k in keys)))
        for name, form in (("mix", ".2f"), ("rate", ".2g")):
            chosen = [table.get((self.reference, kind)) for kind in kinds]
            values = [math.nan if one is None else getattr(one, name) for one in chosen]
            if any(map(math.isfinite, values)):
                cells = (format(v, form) if math.isfinite(v) else "" for v in values)
                rows.append((f"{self.reference}, mean {name}", *cells))
        return rows

    def _cells(self, line: Line) -> tuple[str, ...]:
        above = "" if line.above is None else f"{line.above} of {len(self.seeds)}"
        write = percent_interval if self.has_accuracy else plain_interval
        scores = (line.accuracy, line.worst_decile) if self.has_accuracy else (line.loss,)
        difference = "" if line.difference is None else write(line.difference, sign=True)
        worse = percent_interval(line.share_worse, digits=1)
        return (line.method, *map(write, scores), worse, difference, above)


def compare(
    folders: Sequence[str | Path],
    *,
    reference: str = "fedl2p",
    may_differ: Collection[str] = (),
) -> Comparison:
    """Compare runs of one study under several seeds.

    Parameters
    ----------
    folders
        Run folders; everything in their ``config.json`` but seeds must be the same.
    reference
        The method from which each other one is subtracted. Where it did not run, the comparison
        has no differences and says so in its notes.
    may_differ
        Settings of the study in which runs may differ as well.

    Raises
    ------
    ValueError
        If there is no folder, if settings or methods differ (the first differences are named), if
        two folders have the same seed, or if a file is missing or damaged.
    """
    if not folders:
        raise ValueError("no run folder to compare; name at least one")
    paths = [Path(folder) for folder in folders]
    configs = [read_config(path / layout.CONFIG)[0] for path in paths]
    reports = [Report.load(path) for path in paths]
    for path, config, report in zip(paths[1:], configs[1:], reports[1:], strict=True):
        _check_same_study(
            paths[0],
            _settings(configs[0], reports[0], may_differ),
            path,
            _settings(config, report, may_differ),
        )
    _check_seeds(paths, reports)
    order = sorted(range(len(reports)), key=lambda i: reports[i].seed)
    tables = [{(s.method, s.pool): s for s in reports[i].methods} for i in order]
    _check_methods([paths[i] for i in order], tables)
    return Comparison(
        recipe=reports[0].recipe,
        reference=reference,
        seeds=tuple(reports[i].seed for i in order),
        lines=tuple(_line(method, pool, reference, tables) for method, pool in tables[0]),
        kinds=_kind_lines([reports[i].kinds for i in order]),
        notes=_notes(reference, paths, reports),
    )


def _line(
    method: str,
    pool: Pool,
    reference: str,
    tables: Sequence[dict[tuple[str, Pool], Summary]],
) -> Line:
    accuracies = [table[method, pool].accuracy for table in tables]
    losses = [table[method, pool].loss for table in tables]
    difference, above = None, None
    if method != reference and (reference, pool) in tables[0]:
        others = [table[reference, pool] for table in tables]
        gaps = [other.accuracy - one for other, one in zip(others, accuracies, strict=True)]
        better = sum(gap > 0 for gap in gaps)
        if all(map(math.isnan, gaps)):  # a loss without accuracy
            gaps = [other.loss - one for other, one in zip(others, losses, strict=True)]
            better = sum(gap < 0 for gap in gaps)
        difference, above = mean_interval(gaps), better
    return Line(
        method=method,
        pool=pool,
        accuracy=mean_interval(accuracies),
        worst_decile=mean_interval([table[method, pool].accuracy_worst_decile for table in tables]),
        share_worse=mean_interval([table[method, pool].share_worse for table in tables]),
        loss=mean_interval(losses),
        difference=difference,
        above=above,
    )


def _kind_lines(tables: Sequence[Sequence[KindSummary]]) -> tuple[KindLine, ...]:
    groups: dict[tuple[str, Pool, str], list[KindSummary]] = {}
    for table in tables:
        for one in table:
            groups.setdefault((one.method, one.pool, one.kind), []).append(one)
    return tuple(
        KindLine(
            method=method,
            pool=pool,
            kind=kind,
            accuracy=mean_interval([one.accuracy for one in group]),
            share_worse=mean_interval([one.share_worse for one in group]),
            loss=mean_interval([one.loss for one in group]),
            mix=or_nan(mean_of(one.mix for one in group)),
            rate=or_nan(geometric_mean(one.rate for one in group)),
        )
        for (method, pool, kind), group in groups.items()
    )


def _settings(
    config: dict[str, Any], report: Report, may_differ: Collection[str]
) -> dict[str, str]:
    # A seed may stand at any depth (a data source may have its own): it is what may differ.
    flat = {
        key: value
        for key, value in flatten(config).items()
        if key.rsplit(".", 1)[-1] != "seed" and key not in may_differ
    }
    return {"recipe": "", **flat} | {"recipe": report.recipe}


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Return nested settings as ``{"learn.rounds": "25", ...}``; plain lists stay whole."""
    if isinstance(value, dict) and value:
        out: dict[str, str] = {}
        for key, inner in value.items():
            out |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
        return out
    if isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        return flatten({str(i): inner for i, inner in enumerate(value)}, prefix)
    return {prefix: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}


def _check_same_study(
    first: Path, first_settings: dict[str, str], other: Path, other_settings: dict[str, str]
) -> None:
    keys = dict.fromkeys([*first_settings, *other_settings])
    different = [
        f"{key} is {first_settings.get(key, 'absent')} in {first} "
        f"but {other_settings.get(key, 'absent')} in {other}"
        for key in keys
        if first_settings.get(key) != other_settings.get(key)
    ]
    if different:
        more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
        raise ValueError(
            f"these runs differ in more than the seed: {'; '.join(different[:3])}{more}; "
            f"compare runs of the same settings only"
        )


def _check_seeds(paths: Sequence[Path], reports: Sequence[Report]) -> None:
    by_seed: dict[int, Path] = {}
    for path, report in zip(paths, reports, strict=True):
        if report.seed in by_seed:
            raise ValueError(
                f"{by_seed[report.seed]} and {path} both have seed {report.seed}; "
                f"give one run folder per seed"
            )
        by_seed[report.seed] = path


def _check_methods(
    paths: Sequence[Path], tables: Sequence[dict[tuple[str, Pool], Summary]]
) -> None:
    for path, table in zip(paths[1:], tables[1:], strict=True):
        for key in dict.fromkeys([*tables[0], *table]):
            if key not in table or key not in tables[0]:
                without = path if key not in table else paths[0]
                raise ValueError(
                    f"{without} has no result of {key[0]} on {key[1]} clients, but others have; "
                    f"run it again, or leave that folder out"
                )


def _notes(reference: str, paths: Sequence[Path], reports: Sequence[Report]) -> tuple[str, ...]:
    notes = []
    if all(summary.method != reference for summary in reports[0].methods):
        notes.append(f"{reference} did not run here, so there are no differences")
    for path, report in zip(paths, reports, strict=True):
        if report.failures:
            notes.append(f"{_count(len(report.failures), 'client')} without a result in {path}")
        for package, version in report.versions.items():
            first = reports[0].versions.get(package, "absent")
            if version != first:
                notes.append(f"{package} is {first} in {paths[0]} but {version} in {path}")
    return tuple(notes)


def _plain(name: str, interval: Interval | None) -> dict[str, Any]:
    if interval is None or not math.isfinite(interval.mean):
        return {name: None, f"{name}_interval": None}
    bounds = interval.bounds
    return {name: interval.mean, f"{name}_interval": list(bounds) if bounds else None}


def percent_interval(interval: Interval, *, sign: bool = False, digits: int = 2) -> str:
    """Return a mean of fractions and the half-width of its interval in percent."""
    mean = f"{100 * interval.mean:{'+' if sign else ''}.{digits}f}"
    return mean if interval.half is None else f"{mean} ± {100 * interval.half:.{digits}f}"


def plain_interval(interval: Interval, *, sign: bool = False) -> str:
    """Return a mean of losses and the half-width of its interval."""
    mean = f"{interval.mean:+.4g}" if sign else f"{interval.mean:.4g}"
    return mean if interval.half is None else f"{mean} ± {interval.half:.2g}"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
