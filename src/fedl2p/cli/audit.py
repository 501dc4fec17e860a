"""The command ``fedl2p audit``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fedl2p import methods, recipes, user_code
from fedl2p.cli.parsing import HELP
from fedl2p.cli.resumable import resumable
from fedl2p.cli.run import import_code, parse_options
from fedl2p.study.settings import Study


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Tell whether settings per client pay on these clients, by cross-validation over clients.

    The seen clients are cut into folds; meta-nets learned on the others personalize the clients of
    each. One good setting for all, a search on every client and the global model stand beside them.
    The same command goes on with an interrupted audit.

    Parameters
    ----------
    out
        Folder for audit.md and a run's folder per fold; made if there is none.
    folds
        Parts that the clients are cut into, and so the number of runs.
    study
        Whose clients, which model, how it is learned; the options of fedl2p run.
    """

    out: Path
    folds: int = 3
    study: Annotated[Study, tyro.conf.arg(name="")]

    def __call__(self) -> int:
        """Run what is missing, print the verdict, and return the exit status."""
        import_code(self.study)
        return resumable(self._run, again="the same command")

    def _run(self) -> None:
        from fedl2p.study.audit import PAGE, run_audit

        print(run_audit(self.study, self.out, folds=self.folds))
        print(f"\nwritten: {self.out / PAGE}")


def command(args: list[str]) -> Callable[[], int]:
    """Parse ``fedl2p audit RECIPE ...``.

    Raises
    ------
    ValueError
        If there is no such recipe, or the options do not fit.
    SystemExit
        After help was printed.
    """
    if not args or args[0].startswith("-"):
        usage = "fedl2p audit RECIPE --out DIR; fedl2p audit npz --data.path DIR for your clients"
        if not HELP.isdisjoint(args):
            print(f"usage: {usage}")
            sys.exit(0)
        raise ValueError(f"the recipe comes first: {usage}")
    name, *options = args
    user_code.import_user_module(name, what="recipe")
    study = dataclasses.replace(recipes.get(name), methods=methods.AUDITED)
    default = Audit(out=tyro.MISSING, study=study)
    about = "Tell whether settings per client pay on these clients."
    return parse_options(default, options, prog=f"fedl2p audit {name}", about=about)
