"""A table as papers print it: methods down, settings across, means and intervals over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedl2p.reporting.comparison import Comparison, compare, percent_interval, plain_interval
from fedl2p.reporting.intervals import mean_interval
from fedl2p.reporting.method_names import method_name
from fedl2p.reporting.published import SOURCE, published_accuracies
from fedl2p.runs.files import write_atomically
from fedl2p.runs.results import POOLS, Pool, Report
from fedl2p.text_table import columns


@dataclass(frozen=True, kw_only=True)
class Column:
    """One setting and pool of clients.

    Parameters
    ----------
    cell
        Label of the setting; empty if the table has one only.
    pool
        Whose accuracies these are.
    accuracies
        By method, one per seed, in the table's order of seeds: fractions of test samples. Losses
        where these have no accuracy.
    published
        By method, in percent.
    """

    cell: str
    pool: Pool
    accuracies: Mapping[str, tuple[float, ...]]
    published: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """A table over seeds. ``str()`` gives it for a terminal, :meth:`save` writes its files.

    Parameters
    ----------
    recipe
        Of which recipe, variant included.
    seeds
        The studies' seeds.
    columns
        From left to right.
    comparisons
        By label of the cell: its runs compared, with intervals and paired differences.
    folders
        By label of the cell: the folders of its runs, in the order of the seeds.
    measure
        What the numbers are: ``accuracy``, or ``loss`` where it has no accuracy.
    """

    recipe: str
    seeds: tuple[int, ...]
    columns: tuple[Column, ...]
    comparisons: Mapping[str, Comparison]
    folders: Mapping[str, tuple[str, ...]]
    measure: Literal["accuracy", "loss"] = "accuracy"

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the rows: what ran, then what is published only."""
        measured = (method for column in self.columns for method in column.accuracies)
        published = (method for column in self.columns for method in column.published)
        return tuple(dict.fromkeys([*measured, *published]))

    @property
    def title(self) -> str:
        """What the numbers are, in one line."""
        seeds = ", ".join(map(str, self.seeds))
        what = "accuracy in percent of" if self.measure == "accuracy" else "loss on"
        if len(self.seeds) == 1:
            return f"{self.recipe}: {what} test samples, seed {seeds}"
        return (
            f"{self.recipe}: {what} test samples, mean ± half of its 95 % t-interval "
            f"over {len(self.seeds)} seeds ({seeds})"
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """The source of published numbers, and the notes of the comparisons."""
        notes = [note for comparison in self.comparisons.values() for note in comparison.notes]
        if any(column.published for column in self.columns):
            notes.insert(0, f"published: {SOURCE}")
        return tuple(dict.fromkeys(notes))

    def cells(self) -> list[tuple[str, ...]]:
        """Return all rows as text, the head first."""
        rows = [("method", *(head for column in self.columns for head in self._heads(column)))]
        for method in self.methods:
            texts = [method_name(method).label]
            for column in self.columns:
                values = column.accuracies.get(method)
                write = percent_interval if self.measure == "accuracy" else plain_interval
                texts.append("" if values is None else write(mean_interval(values)))
                if column.published:
                    percent = column.published.get(method)
                    texts.append("" if percent is None else f"{percent:.2f}")
            rows.append(tuple(texts))
        return rows

    def _heads(self, column: Column) -> list[str]:
        pools = {c.pool for c in self.columns}
        words = [column.cell, column.pool if len(pools) > 1 or not column.cell else ""]
        return [" ".join(filter(None, words)), *(["published"] if column.published else [])]

    def __str__(self) -> str:
        """Return the table for a terminal."""
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([self.title, "", *columns(self.cells()), *([""] if notes else []), *notes])

    def markdown(self) -> str:
        """Return the table in Markdown."""
        head, *rows = self.cells()
        lines = [_piped(head), "|---|" + "---:|" * (len(head) - 1), *map(_piped, rows)]
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([self.title, "", *lines, *([""] if notes else []), *notes]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers: measured accuracies as fractions, published ones in percent."""
        return {
            "recipe": self.recipe,
            "seeds": list(self.seeds),
            "confidence": 0.95,
            "measure": self.measure,
            "columns": [
                {
                    "cell": column.cell,
                    "pool": column.pool,
                    "methods": [
                        {
                            "method": method,
                            **_summary(column.accuracies.get(method)),
                            "published_percent": column.published.get(method),
                        }
                        for method in self.methods
                    ],
                }
                for column in self.columns
            ],
            "published_source": SOURCE,
            "folders": {cell: list(folders) for cell, folders in self.folders.items()},
            "comparisons": {cell: one.to_dict() for cell, one in self.comparisons.items()},
        }

    def save(self, folder: Path) -> None:
        """Write table.md and table.json into an existing folder."""
        write_atomically(folder / "table.json", json.dumps(self.to_dict(), indent=1) + "\n")
        write_atomically(folder / "table.md", self.markdown())


def paper_table(
    recipe: str, runs: Mapping[str, Sequence[Path]], *, published: str | None
) -> PaperTable:
    """Return the table of finished runs.

    Parameters
    ----------
    recipe
        Name of the table.
    runs
        By label of the cell: one folder per seed, in the same order of seeds everywhere.
    published
        The recipe whose published accuracies stand beside the measured ones; None for none.

    Raises
    ------
    ValueError
        If runs of one cell differ in more than the seed, or a file is missing or damaged.
    """
    # The global model may be a file, a different one for every seed.
    comparisons = {c: compare(folders, may_differ=("pretrained",)) for c, folders in runs.items()}
    table_columns: list[Column] = []
    by_accuracy = any(one.has_accuracy for one in comparisons.values())
    for cell, folders in runs.items():
        tables = [
            {
                (s.method, s.pool): s.accuracy if by_accuracy else s.loss
                for s in Report.load(folder).methods
            }
            for folder in folders
        ]
        for pool in POOLS:
            accuracies = {
                method: tuple(table[method, pool] for table in tables)
                for method, summary_pool in tables[0]
                if summary_pool == pool
            }
            if accuracies:
                table_columns.append(
                    Column(
                        cell=cell,
                        pool=pool,
                        accuracies=accuracies,
                        published=published_accuracies(published, cell, pool) if published else {},
                    )
                )
    return PaperTable(
        recipe=recipe,
        seeds=next(iter(comparisons.values())).seeds,
        columns=tuple(table_columns),
        comparisons=comparisons,
        folders={cell: tuple(map(str, folders)) for cell, folders in runs.items()},
        measure="accuracy" if by_accuracy else "loss",
    )


def _summary(values: Sequence[float] | None) -> dict[str, Any]:
    if values is None or not all(map(math.isfinite, values)):
        return {"accuracies": [], "mean": None, "interval": None, "standard_deviation": None}
    interval = mean_interval(values)
    return {
        "accuracies": list(values),
        "mean": interval.mean,
        "interval": None if interval.bounds is None else list(interval.bounds),
        "standard_deviation": statistics.stdev(values) if len(values) > 1 else None,
    }


def _piped(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
