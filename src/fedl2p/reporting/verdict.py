"""The verdict of an audit: what settings per client are worth, and whether the profile carries it.

Every client is held out in one run; the runs' held-out clients are taken together, each counts the
same. Intervals are Student's over clients: they take the learned states as given.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedl2p.reporting.intervals import Interval, mean_interval
from fedl2p.reporting.method_names import method_name
from fedl2p.reporting.number_formats import seconds, share, signed
from fedl2p.runs.results import Report, Row, made_worse, starting_accuracies
from fedl2p.text_table import columns

REFERENCE = "fedl2p"


@dataclass(frozen=True, kw_only=True)
class VerdictLine:
    """One method.

    Parameters
    ----------
    method
        Its name.
    score
        Mean over clients: accuracy in percent, or the loss where there is no accuracy.
    difference
        By how much FedL2P is better, over the clients that both have tested, in points, or in the
        loss's unit; None of FedL2P itself.
    above, below
        On how many clients it is better, and worse.
    share_worse
        Share of clients that are worse than with the starting model.
    seconds
        Per client.
    failed
        Clients without a result; they count nowhere.
    """

    method: str
    score: float
    difference: Interval | None
    above: int
    below: int
    share_worse: float
    seconds: float
    failed: int


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All methods, in the order of the runs.

    Parameters
    ----------
    clients
        Number of clients that were held out.
    folds
        Number of runs.
    has_accuracy
        Whether scores are accuracies.
    lines
        One per method.
    """

    clients: int
    folds: int
    has_accuracy: bool
    lines: tuple[VerdictLine, ...]

    def __str__(self) -> str:
        """Return the sentences and the table in plain text."""
        return "\n".join([*self.sentences(), "", *columns(self._cells())])

    def markdown(self) -> str:
        """Return the same as a page of Markdown."""
        head, *rows = self._cells()
        lines = [head, ["---"] * len(head), *rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return (
            f"# Does FedL2P pay on these clients?\n\n{' '.join(self.sentences())}\n\n{table}\n\n"
            f"{self.clients} clients, each held out in one of {self.folds} runs that learned from "
            "the others. Every client counts the same; differences are taken client by client, "
            "intervals are 95 % over clients. Worse than the global model: by more than half a "
            "point and more than one test example.\n"
        )

    def sentences(self) -> list[str]:
        """Return the verdict: what it is worth, what carries it, who loses, what it costs."""
        lines = {line.method: line for line in self.lines}
        own, single, constant, search = (
            lines[name] for name in (REFERENCE, "bestfixed", "fedl2p-constant", "gridsearch")
        )
        return [
            self._worth(single, constant),
            f"FedL2P is {self._gap(search)} a search on every client.",
            f"It makes {share(own.share_worse)} % of the clients worse than the global model, the "
            f"best single setting {share(single.share_worse)} %, a search "
            f"{share(search.share_worse)} %.",
            f"A client's personalization takes {seconds(own.seconds)} s; with a search it takes "
            f"{seconds(search.seconds)} s.",
        ]

    def _worth(self, single: VerdictLine, constant: VerdictLine) -> str:
        over_single = f"FedL2P is {self._gap(single)} the best single setting for all"
        learned = f"{self._gap(constant)} one setting that is learned for all, without profiles"
        match _side(single), _side(constant):
            case -1, _:
                return f"It does not pay here: {over_single}. Take that setting (bestfixed)."
            case 0, _:
                return (
                    f"One good setting is enough here: {over_single}, which the interval does not "
                    "tell from none. Take that setting (bestfixed)."
                )
            case _, 1:
                return f"It pays here: {over_single}. The profile carries it: it is {learned}."
            case _:
                return (
                    f"Learning pays here, the profile does not: {over_single}, but {learned}. Take "
                    "that one (fedl2p-constant)."
                )

    def _gap(self, line: VerdictLine) -> str:
        difference = line.difference
        assert difference is not None
        half = difference.half
        if self.has_accuracy:
            within = "" if half is None else f" (± {half:.1f})"
            side = "above" if difference.mean >= 0 else "below"
            return f"{abs(difference.mean):.1f} points{within} {side}"
        within = "" if half is None else f" (± {half:.3g})"
        side = "below" if difference.mean >= 0 else "above"
        return f"by {abs(difference.mean):.3g}{within} in the loss {side}"

    def _cells(self) -> list[list[str]]:
        score = "accuracy %" if self.has_accuracy else "loss"
        rows = [
            ["method", score, "FedL2P better by", "on", "worse on", "made worse %", "s per client"]
        ]
        for line in self.lines:
            form = ".1f" if self.has_accuracy else ".4g"
            difference = ""
            if line.difference is not None:
                half = line.difference.half
                difference = signed(line.difference.mean, form)
                difference += "" if half is None else f" ± {half:{form}}"
            label = method_name(line.method).label
            label += f" ({line.failed} clients without a result)" if line.failed else ""
            rows.append(
                [
                    label,
                    f"{line.score:{form}}",
                    difference,
                    "" if line.difference is None else str(line.above),
                    "" if line.difference is None else str(line.below),
                    share(line.share_worse),
                    seconds(line.seconds),
                ]
            )
        return rows


def verdict(folders: Sequence[Path]) -> Verdict:
    """Return the verdict of the runs in folders, each of which held other clients out.

    Raises
    ------
    ValueError
        If a file is missing or damaged, or a method has no client with a result.
    """
    reports = [Report.load(folder) for folder in folders]
    rows = [row for report in reports for row in report.rows if row.pool == "unseen"]
    has_accuracy = all(report.has_accuracy for report in reports)
    starts = starting_accuracies(rows)
    by: dict[str, dict[str, Row]] = {}
    for row in rows:
        by.setdefault(row.method, {})[row.client] = row
    good = {
        method: {name: row for name, row in clients.items() if _counts(row)}
        for method, clients in by.items()
    }
    for method, clients in good.items():
        if not clients:
            raise ValueError(
                f"{method} has no held-out client with a result; every client needs a test part, "
                "and fine-tuning must not diverge (the runs' reports name why)"
            )
    return Verdict(
        clients=len({row.client for row in rows}),
        folds=len(folders),
        has_accuracy=has_accuracy,
        lines=tuple(
            _line(method, good, starts, len(by[method]), has_accuracy=has_accuracy) for method in by
        ),
    )


def _line(
    method: str,
    good: Mapping[str, Mapping[str, Row]],
    starts: Mapping[str, float],
    clients: int,
    *,
    has_accuracy: bool,
) -> VerdictLine:
    own, reference = good[method], good[REFERENCE]

    def score(row: Row) -> float:
        return 100 * row.accuracy if has_accuracy else row.loss

    gaps = [
        (score(reference[name]) - score(own[name])) * (1 if has_accuracy else -1)
        for name in own.keys() & reference.keys()
    ]
    compared = method != REFERENCE and bool(gaps)
    return VerdictLine(
        method=method,
        score=statistics.fmean(map(score, own.values())),
        difference=mean_interval(sorted(gaps)) if compared else None,
        above=sum(gap > 0 for gap in gaps),
        below=sum(gap < 0 for gap in gaps),
        share_worse=statistics.fmean(
            made_worse(row, starts.get(row.client, row.accuracy_before)) for row in own.values()
        ),
        seconds=statistics.fmean(row.seconds for row in own.values()),
        failed=clients - len(own),
    )


def _counts(row: Row) -> bool:
    return row.failure is None and row.num_test > 0 and math.isfinite(row.loss)


def _side(line: VerdictLine) -> int:
    """Return 1 if the interval lies above 0, -1 if below, else 0."""
    assert line.difference is not None
    low, high = line.difference.bounds or (-math.inf, math.inf)
    return int(low > 0) - int(high < 0)
