"""Tables of the paper: one run per cell and seed, each in its folder.

Any recipe is a table, with one cell unless it is listed here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedl2p import recipes
from fedl2p.federation.listeners import Listener
from fedl2p.recipes.paper import settings as paper
from fedl2p.recipes.paper.cifar10c import global_model
from fedl2p.reporting.paper_table import PaperTable, paper_table
from fedl2p.runs import layout
from fedl2p.runs.folder import RunWriter
from fedl2p.study.preparation import build_methods, check_pretrained
from fedl2p.study.run import run_study
from fedl2p.study.settings import Study

CELLS: dict[str, dict[str, dict[str, Any]]] = {
    name: {f"alpha {alpha:g}": {"alpha": alpha} for alpha in paper.ALPHAS}
    for name in ("cifar10", "cifar10c", "domainnet", "fashion", "fashionc")
}
"""The cells of a recipe's table by label, from left to right, with the arguments of each."""

GLOBAL_MODELS: dict[str, Callable[..., Study]] = {"cifar10c": global_model}
"""Functions like the recipe's, of the study whose global model it starts from. That runs first."""

Watch = Callable[[str, Study], AbstractContextManager[Sequence[Listener]]]
"""``watch(folder, study)`` is entered while a study runs and yields its listeners."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One setting of a table.

    Parameters
    ----------
    label
        Name in the table; empty if it is the only one.
    study
        The study, seed 0.
    before
        The study that trains the global model; None if the study does so itself.
    """

    label: str
    study: Study
    before: Study | None = None


def cells(name: str) -> tuple[Cell, ...]:
    """Return the cells of a table, from left to right.

    Raises
    ------
    ValueError
        If there is no such recipe.
    """
    recipe = recipes.find(name)
    before = GLOBAL_MODELS.get(recipe.base)
    return tuple(
        Cell(
            label=label,
            study=recipe(**takes),
            before=None if before is None else before(**takes, **recipe.sets),
        )
        for label, takes in CELLS.get(recipe.base, {"": {}}).items()
    )


def run_table(
    name: str,
    out: str | Path,
    *,
    seeds: int,
    methods: tuple[str, ...] = (),
    device: Literal["auto", "cpu", "cuda"] = "auto",
    watch: Watch = lambda what, study: nullcontext(()),
) -> PaperTable:
    """Run the unfinished runs of a table, write table.md and table.json, and return it.

    Parameters
    ----------
    name
        A recipe, or a variant of one.
    out
        Folder of the runs. Finished runs are kept, interrupted ones are resumed.
    seeds
        Number of seeds; they are 0, 1, ...
    methods
        The rows; empty for the recipe's own.
    device
        Where to compute.
    watch
        Gives the listeners of each run.

    Raises
    ------
    ValueError
        If there is no such recipe, a study cannot be run, or a folder holds another run.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}, but must be 1 or more")
    folder = Path(out)
    planned = [
        run
        for cell in cells(name)
        for run in _planned(cell, folder, seeds=seeds, methods=methods, device=device)
    ]
    # Missing data is an error now, not after the hours that the earlier runs take.
    _check(planned)
    runs: dict[str, list[Path]] = {}
    for run in planned:
        _finish(run, watch)
        if run.reported:
            runs.setdefault(run.label, []).append(run.folder)
    recipe = recipes.find(name)
    published = None if recipe.sets.get("smoke") else recipe.base
    table = paper_table(name, runs, published=published)
    table.save(folder)
    return table


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One run of a table; ``reported`` is False if it only makes the model of another."""

    label: str
    study: Study
    folder: Path
    reported: bool = True


def _planned(
    cell: Cell,
    folder: Path,
    *,
    seeds: int,
    methods: tuple[str, ...],
    device: Literal["auto", "cpu", "cuda"],
) -> Iterator[_Run]:
    """Yield the runs of a cell in the order in which they need one another."""
    place = folder / cell.label.replace(" ", "-") if cell.label else folder
    for seed in range(seeds):
        study = dataclasses.replace(
            cell.study, seed=seed, device=device, methods=methods or cell.study.methods
        )
        if cell.before is not None:
            first = dataclasses.replace(cell.before, seed=seed, device=device)
            made = place / f"model-seed-{seed}"
            yield _Run(label=cell.label, study=first, folder=made, reported=False)
            study = dataclasses.replace(study, pretrained=made / layout.GLOBAL_MODEL)
        yield _Run(label=cell.label, study=study, folder=place / f"seed-{seed}")


def _check(planned: Sequence[_Run]) -> None:
    """Raise if data or a model is missing, or if a folder holds a run of other settings."""
    made = {run.folder / layout.GLOBAL_MODEL for run in planned if not run.reported}
    for run in planned:
        build_methods(run.study)
        folder = RunWriter(run.folder)
        folder.check(run.study, resume=True)
        if not folder.holds_run() and run.study.seed == 0:  # the same files under every seed
            run.study.data.open(0)
            if run.study.pretrained not in made:
                check_pretrained(run.study)


def _finish(run: _Run, watch: Watch) -> None:
    """Start or resume a run, unless it is finished."""
    if (run.folder / layout.RESULTS).exists():
        return
    with watch(str(run.folder), run.study) as listeners:
        run_study(run.study, run.folder, resume=True, listeners=tuple(listeners))
