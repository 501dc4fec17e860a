"""The command ``fedl2p table``: all cells of a table of the paper, over several seeds."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedl2p import user_code
from fedl2p.cli.parsing import UsageError, parse, user_errors

if TYPE_CHECKING:
    from fedl2p.federation.listeners import Listener
    from fedl2p.study.settings import Study


@dataclass(frozen=True, kw_only=True)
class Table:
    """Run every cell of a table under several seeds, and print it beside what is published.

    What is finished in the folder is not run again, what was interrupted goes on: the same command
    resumes. Writes table.md and table.json, and a run's folder per cell and seed.

    Parameters
    ----------
    seeds
        Number of seeds: 0, 1, and so on.
    out
        Folder of the runs; by default tables/RECIPE.
    methods
        The rows of the table, names of methods; by default those of the recipe.
    device
        Where to compute: auto is cuda if there is a GPU, else cpu.
    """

    seeds: int = 3
    out: Path | None = None
    methods: tuple[str, ...] = ()
    device: Literal["auto", "cpu", "cuda"] = "auto"


def main(args: list[str]) -> int:
    """Run ``fedl2p table ARGS`` and return the exit status."""
    from fedl2p import recipes

    if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
        raise UsageError(
            "the recipe comes first: fedl2p table RECIPE --seeds 3; recipes are "
            + ", ".join(recipes.names())
        )
    name = args[0] if not args[0].startswith("-") else "RECIPE"
    chosen = parse(Table, args[name != "RECIPE" :], prog=f"fedl2p table {name}")
    from fedl2p.federation.messages import FederationError
    from fedl2p.recipes._paper_tables import run_table

    # A colon, which stands in the names of users' own recipes, is not for names of folders.
    out = chosen.out or Path("tables", name.replace(":", "-"))
    try:
        with user_errors():
            user_code.import_user_module(name, what="recipe")
            for method in chosen.methods:
                user_code.import_user_module(method, what="method")
            table = run_table(
                name,
                out,
                seeds=chosen.seeds,
                methods=chosen.methods,
                device=chosen.device,
                watch=_watch,
            )
    except KeyboardInterrupt:
        sys.stderr.write(f"\nfedl2p: interrupted; go on with: {_again(args)}\n")
        return 130
    except (FederationError, OSError) as problem:
        sys.stderr.write(f"fedl2p: error: {problem}; go on with: {_again(args)}\n")
        return 1
    print(table)
    print(f"\nwritten: {out / 'table.md'} and {out / 'table.json'}")
    return 0


def _again(args: list[str]) -> str:
    return shlex.join(["fedl2p", "table", *args])


@contextlib.contextmanager
def _watch(what: str, study: Study) -> Iterator[Sequence[Listener]]:
    """Say what runs, with a bar, if a person looks."""
    from fedl2p.federation.listeners import ProgressListener
    from fedl2p.study.preparation import count_stages

    if not sys.stderr.isatty():
        yield ()
        return
    sys.stderr.write(f"{what}\n")
    with ProgressListener(stages=count_stages(study)) as progress:
        yield (progress,)
