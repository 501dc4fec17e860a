"""The command ``fedl2p run``."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import tyro
from tyro.conf import FlagCreatePairsOff

from fedl2p import recipes, user_code
from fedl2p.cli.parsing import HELP, parse
from fedl2p.cli.recipes import Recipes
from fedl2p.cli.resumable import resumable
from fedl2p.cli.run_options import REGISTRY, shown_options
from fedl2p.runs import layout
from fedl2p.study.settings import Study

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run a recipe: pre-train, learn, personalize every client, report.

    Parameters
    ----------
    out
        Folder for the results; made if there is none, refused if it already holds a run.
    resume
        Go on with the run in the folder, or start it if there is none. Options that are not given
        are those of that run.
    tensorboard
        Write the rounds for TensorBoard too, into the folder tensorboard/ of the results; needs the
        package tensorboard.
    study
        What to run.
    """

    out: Path
    resume: FlagCreatePairsOff[bool] = False
    tensorboard: FlagCreatePairsOff[bool] = False
    study: Annotated[Study, tyro.conf.arg(name="")]

    def __call__(self) -> int:
        """Run or resume the study, print the report, and return the exit status."""
        import_code(self.study)
        return resumable(self._run, again=self._again())

    def _run(self) -> None:
        from fedl2p.federation.listeners import TensorBoardListener
        from fedl2p.reporting.page import write_page
        from fedl2p.study.run import run_study

        listeners = []
        if self.tensorboard:
            listeners.append(TensorBoardListener(self.out / layout.TENSORBOARD))
        report = run_study(self.study, self.out, resume=self.resume, listeners=listeners)
        page = write_page(self.out)
        print(f"{report}\n\nreport: {page}")

    def _again(self) -> str:
        """Return the command that resumes the run; code outside this package is named again."""
        from fedl2p import models

        words = ["fedl2p", "run", self.study.recipe, "--out", str(self.out), "--resume"]
        if not models.is_ours(self.study.model):
            words += ["--model", self.study.model]
        for field in ("loss", "metric", "outputs"):
            if getattr(self.study, field) in self.study.objective_code:
                words += [f"--{field}", getattr(self.study, field)]
        if any(map(user_code.is_user_code, self.study.methods)):
            words += ["--methods", *self.study.methods]
        return shlex.join(words)


def import_code(study: Study) -> None:
    """Import the modules of a user's that a study names."""
    user_code.import_user_module(study.model, what="model")
    for method in study.methods:
        user_code.import_user_module(method, what="method")
    for name in study.objective_code:
        user_code.import_user_module(name, what="objective")


def command(args: list[str]) -> Callable[[], int]:
    """Parse ``fedl2p run RECIPE ...``; without a recipe, ``--help`` lists the recipes.

    Raises
    ------
    ValueError
        If there is no such recipe, or the options do not fit.
    SystemExit
        After help was printed.
    """
    if not args or args[0].startswith("-"):
        if not HELP.isdisjoint(args):
            print("usage: fedl2p run RECIPE --out DIR; fedl2p run RECIPE --help for its options\n")
            return Recipes()
        raise ValueError(
            "the recipe comes first: fedl2p run RECIPE --out DIR; recipes are "
            + ", ".join(recipes.names())
        )
    name, *options = args
    user_code.import_user_module(name, what="recipe")
    run = _parse(name, options, recipes.get(name))
    if run.resume and (run.out / layout.CONFIG).exists():
        run = _parse(name, options, _stored(run))
    return run


def _parse(name: str, args: list[str], study: Study) -> Run:
    """Return the command with the given options, others as in the study; or print help."""
    default = Run(out=tyro.MISSING, study=study)
    return parse_options(default, args, prog=f"fedl2p run {name}", about="Run a recipe.")


def parse_options(default: T, args: list[str], *, prog: str, about: str) -> T:
    """Return a command that has a study, with the given options; or print help."""
    if "--help-all" in args:
        args = ["--help"]
    elif not HELP.isdisjoint(args):
        about = f"{about} All options: {prog} --help-all"
        parse(tyro.cli, ["--help"], prog=prog, f=shown_options(default), description=about)
    parsed: T = parse(
        tyro.cli, args, prog=prog, f=type(default), default=default, registry=REGISTRY
    )
    return parsed


def _stored(run: Run) -> Study:
    """Return the study of the run in the folder, whose fields are the defaults of a resumption."""
    from fedl2p import models

    for method in run.study.methods:
        user_code.import_user_module(method, what="method")
    stored = Study.load(run.out)
    if stored.recipe != run.study.recipe:
        raise ValueError(f"{run.out} holds a run of {stored.recipe!r}, not of {run.study.recipe!r}")
    # A folder from elsewhere must not choose code to run.
    if not models.is_ours(stored.model) and run.study.model != stored.model:
        raise ValueError(
            f"the run in {run.out} has the model {stored.model!r}, code outside this package; "
            f"if you trust it, name it: --model {stored.model}"
        )
    for field in ("loss", "metric", "outputs"):
        name = getattr(stored, field)
        if name in stored.objective_code and name != getattr(run.study, field):
            raise ValueError(
                f"the run in {run.out} has the {field} {name!r}, code outside this package; if you "
                f"trust it, name it: --{field} {name}"
            )
    return stored
