"""The command ``fedl2p table``."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from fedl2p import user_code
from fedl2p.cli.resumable import resumable

if TYPE_CHECKING:
    from fedl2p.federation.listeners import Listener
    from fedl2p.study.settings import Study


@dataclass(frozen=True, kw_only=True)
class Table:
    """Run every cell of a table under several seeds, and print it beside the published figures.

    Finished runs in the folder are kept and interrupted ones resumed, so that the same command goes
    on. Writes table.md and table.json, and a run's folder per cell and seed.

    Parameters
    ----------
    recipe
        Name of a recipe; fedl2p recipes lists them.
    seeds
        Number of seeds: 0, 1, and so on.
    out
        Folder of the runs; by default tables/RECIPE.
    methods
        The rows of the table, names of methods; by default those of the recipe.
    device
        Where to compute: auto is cuda if there is a GPU, else cpu.
    """

    recipe: Positional[str]
    seeds: int = 3
    out: Path | None = None
    methods: tuple[str, ...] = ()
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __call__(self) -> int:
        """Run what is missing, print the table, and return the exit status."""
        user_code.import_user_module(self.recipe, what="recipe")
        for method in self.methods:
            user_code.import_user_module(method, what="method")
        return resumable(self._run, again=self._again())

    def _run(self) -> None:
        from fedl2p.recipes.paper.tables import run_table

        # A user's recipe has a colon in its name, which some file systems refuse.
        out = self.out or Path("tables", self.recipe.replace(":", "-"))
        table = run_table(
            self.recipe,
            out,
            seeds=self.seeds,
            methods=self.methods,
            device=self.device,
            watch=_watch,
        )
        print(table)
        print(f"\nwritten: {out / 'table.md'} and {out / 'table.json'}")

    def _again(self) -> str:
        """Return the same command."""
        words = ["fedl2p", "table", self.recipe, "--seeds", str(self.seeds)]
        words += ["--out", str(self.out)] if self.out else []
        words += ["--methods", *self.methods] if self.methods else []
        return shlex.join([*words, "--device", self.device])


@contextlib.contextmanager
def _watch(folder: str, study: Study) -> Iterator[list[Listener]]:
    if sys.stderr.isatty():
        sys.stderr.write(f"{folder}\n")
    yield []
