"""Tables of the paper: all cells of one, under several seeds, each a run in a folder of its own.

A table is a recipe, under its name. The recipe's file may have two things besides its function:

``CELLS``
    Columns by label, and what the function takes for each; without it the table has one.
``global_model(...) -> Study``
    Takes the same; the study whose global model this one starts from. It runs first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedl2p import recipes
from fedl2p.federation import Listener
from fedl2p.reporting.papertable import PaperTable, paper_table
from fedl2p.rundir import RunDir
from fedl2p.study import Study, run_study

Watch = Callable[[str, Study], AbstractContextManager[Sequence[Listener]]]
"""``watch(what, study)`` is entered while a study runs and yields who is told of its rounds."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One setting of a table.

    Parameters
    ----------
    label
        Its name in the table; empty if it is the only one.
    study
        The study, seed 0.
    before
        The study that makes its global model; None if it needs none.
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
    recipe, sets = recipes.find(name)
    before = getattr(recipe, "global_model", None)
    return tuple(
        Cell(
            label=label,
            study=recipe(**takes, **sets),
            before=None if before is None else before(**takes, **sets),
        )
        for label, takes in getattr(recipe, "CELLS", {"": {}}).items()
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
    """Run what is still to be run of a table, write table.md and table.json, and return it.

    Parameters
    ----------
    name
        A recipe, or a variant of one.
    out
        Folder of the runs. What is finished there is not run again, what was interrupted goes on.
    seeds
        Number of seeds; they are 0, 1, ...
    methods
        The rows; empty for the recipe's own.
    device
        Where to compute.
    watch
        Who is told of what goes on.

    Raises
    ------
    ValueError
        If there is no such recipe, or a study cannot be run; or a folder holds a run of other
        settings.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}, but must be 1 or more")
    folder = Path(out)
    runs: dict[str, list[Path]] = {}
    for cell in cells(name):
        place = folder / cell.label.replace(" ", "-") if cell.label else folder
        for seed in range(seeds):
            study = dataclasses.replace(
                cell.study, seed=seed, device=device, methods=methods or cell.study.methods
            )
            if cell.before is not None:
                first = dataclasses.replace(cell.before, seed=seed, device=device)
                made = _finished(first, place / f"model-seed-{seed}", watch)
                study = dataclasses.replace(study, pretrained=made / "global.safetensors")
            runs.setdefault(cell.label, []).append(_finished(study, place / f"seed-{seed}", watch))
    recipe, sets = recipes.find(name)
    published = None if sets.get("smoke") else recipe.__name__.rpartition(".")[2]
    table = paper_table(name, runs, published=published)
    table.save(folder)
    return table


def _finished(study: Study, folder: Path, watch: Watch) -> Path:
    """Return the folder, in which the study is finished now."""
    if (folder / "results.json").exists():
        RunDir(folder).claim(study, resume=True)
        return folder
    with watch(str(folder), study) as listeners:
        run_study(study, folder, resume=True, listeners=tuple(listeners))
    return folder
