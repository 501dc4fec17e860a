"""The command ``fedl2p``: run, table, personalize, explain, compare, report, recipes, data.

What a user gets wrong ends in one line on stderr and exit status 2; an interrupted run in one line
that says how to go on, and exit status 130.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import inspect
import io
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_type_hints

from fedl2p import user_code
from fedl2p.cli.parsing import UsageError, missing_package, parse, user_errors
from fedl2p.runs import layout

if TYPE_CHECKING:
    from fedl2p.study.settings import Study


@dataclass(frozen=True, kw_only=True)
class Personalize:
    """Personalize the global model of a run for one new client.

    Writes model.safetensors (the state_dict of the personalized plain model), hyperparams.json (its
    mix per norm layer and rate per parameter tensor, and the profile that led to them) and, if the
    client has test examples, outcome.json (accuracy before and after).

    Parameters
    ----------
    run
        Folder of a finished run that learned the meta-nets (method fedl2p).
    data
        The client's .npz file: arrays x_train, y_train and, if it has them, x_test, y_test.
    out
        Folder to write into; made if there is none.
    seed
        Seed of the order of its batches.
    device
        Where to compute: auto is cuda if there is a GPU, else cpu.
    model
        The run's model as package.module:callable, to be named only if it is code of your own: a
        run folder from elsewhere must not say what code is run.
    """

    run: Path
    data: Path
    out: Path
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model: str | None = None


@dataclass(frozen=True, kw_only=True)
class Explain:
    """Say which entries of a client's data profile moved its hyperparameters, and by how much.

    The client is compared with a typical one: the median profile of the run's seen clients. Writes
    NAME.html, a picture, and NAME.json, the part of every entry in every hyperparameter.

    Parameters
    ----------
    run
        Folder of a finished run that learned the meta-nets (method fedl2p).
    client
        Name of one of the run's clients, as in its clients.csv.
    data
        Instead of a client of the run: a new client's .npz file, arrays x_train and y_train.
    out
        Folder to write into; by default the folder explain of the run, or explain/new for a new
        client.
    device
        Where to compute profiles that the run did not record: auto is cuda if there is a GPU, else
        cpu.
    model
        The run's model as package.module:callable, to be named only if it is code of your own.
    """

    run: Path
    client: str | None = None
    data: Path | None = None
    out: Path | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model: str | None = None


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Show runs of one recipe under several seeds in one table, with 95 % confidence intervals.

    Parameters
    ----------
    folders
        Folders of finished runs that differ in their seeds only.
    """

    folders: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class Show:
    """Make report.html of a finished run again, from the files in its folder alone.

    Parameters
    ----------
    folder
        Folder of a finished run.
    """

    folder: Path


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; always leaves by SystemExit."""
    args = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # The name of a file may hold bytes that no text has; to show it must not fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(_dispatch(args))
    except UsageError as problem:
        _fail(str(problem))
    except ModuleNotFoundError as problem:
        _fail(missing_package(problem))
    except KeyboardInterrupt:
        sys.stderr.write("\nfedl2p: interrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone (e.g. `| head`); nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as problem:
        if problem.errno in _WRONG_PATH:
            _fail(str(problem))
        sys.stderr.write(f"fedl2p: error: {problem}\n")  # the system refuses, e.g. a full disk
        sys.exit(1)


_WRONG_PATH = {
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EACCES, errno.EPERM),
    *(errno.ELOOP, errno.EINVAL, errno.EEXIST),
}
"""Errors of the system that say that what was named is wrong, not that it cannot go on."""


def _dispatch(args: list[str]) -> int:
    if not args:
        raise UsageError(f"a command is missing: one of {', '.join(_COMMANDS)}; see fedl2p --help")
    command, rest = args[0], args[1:]
    if command in ("-h", "--help"):
        print(_overview())
        return 0
    if command == "--version":
        from fedl2p.version import __version__

        print(f"fedl2p {__version__}")
        return 0
    if command not in _COMMANDS:
        raise UsageError(f"unknown command {command!r}; there are {', '.join(_COMMANDS)}")
    return _COMMANDS[command](rest)


def _overview() -> str:
    """Return the help of the command as a whole."""
    lines = ["usage: fedl2p COMMAND ...", "", "Federated learning to personalize.", ""]
    lines += [f"  {name:<13}{_SUMMARIES[name]}" for name in _COMMANDS]
    return "\n".join([*lines, "", "fedl2p COMMAND --help explains every field."])


# --- run --------------------------------------------------------------------------------------


def _run(args: list[str]) -> int:
    from fedl2p import recipes

    if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
        raise UsageError(
            "the recipe comes first: fedl2p run RECIPE --out DIR; recipes are "
            + ", ".join(recipes.names())
        )
    name = args.pop(0) if not args[0].startswith("-") else "digits"
    with user_errors():
        user_code.import_user_module(name, what="recipe")
        default = recipes.get(name)
    chosen = _parse_run(name, args, default)
    if chosen.resume and (chosen.out / layout.CONFIG).exists():
        # What the folder holds is the default, so that going on needs no other field.
        from fedl2p.study.settings import Study

        with user_errors():
            default = Study.load(chosen.out)
        if default.recipe != name:
            raise UsageError(f"{chosen.out} holds a run of {default.recipe!r}, not of {name!r}")
        _refuse_unnamed_code(chosen, default)
        chosen = _parse_run(name, args, default)
    return _run_study(chosen)


def _refuse_unnamed_code(chosen: _Run, stored: Study) -> None:
    """Raise if a folder alone says which code outside this package builds the model."""
    from fedl2p import models

    if not models.is_ours(stored.model) and chosen.study.model != stored.model:
        raise UsageError(
            f"the run in {chosen.out} has the model {stored.model!r}, code outside this package; "
            f"if you trust it, name it: --model {stored.model}"
        )


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What ``fedl2p run`` was asked for."""

    out: Path
    resume: bool
    tensorboard: bool
    study: Study


def _parse_run(name: str, args: list[str], default: Study) -> _Run:
    """Parse the command's own options and the fields of the recipe's study."""
    import tyro

    from fedl2p.study.settings import Study

    hints = get_type_hints(Study)
    # The recipe has been named already; every other field of the study is one of the command.
    overridable = [f.name for f in dataclasses.fields(Study) if f.name != "recipe"]
    options = dataclasses.make_dataclass(
        "Run",
        [
            ("out", Path),
            *(
                (flag, tyro.conf.FlagCreatePairsOff[bool], dataclasses.field(default=False))
                for flag in ("resume", "tensorboard")
            ),
            *(
                (field, hints[field], dataclasses.field(default_factory=_always(default, field)))
                for field in overridable
            ),
        ],
        kw_only=True,
        namespace={"__doc__": _RUN_HELP + _fields_help(Study)},
    )
    chosen: Any = parse(options, args, prog=f"fedl2p run {name}")
    with user_errors():
        fields = {field: getattr(chosen, field) for field in overridable}
        for method in chosen.methods:
            user_code.import_user_module(method, what="method")
        user_code.import_user_module(chosen.model, what="model")
        return _Run(
            out=chosen.out,
            resume=chosen.resume,
            tensorboard=chosen.tensorboard,
            study=dataclasses.replace(default, **fields),
        )


_RUN_HELP = """Run a recipe: pre-train, learn, personalize every client, report.

Parameters
----------
out
    Folder for the results; made if there is none, refused if it already holds a run.
resume
    Go on with the run in the folder, or start it if there is none. Fields that are not given are
    those of that run.
tensorboard
    Write the rounds for TensorBoard too, into the folder tensorboard/ of the results; needs the
    package tensorboard.
"""


def _always(study: Study, field: str) -> Callable[[], Any]:
    return lambda: getattr(study, field)


def _fields_help(kind: type) -> str:
    """Return the descriptions of a class's fields, as they stand in its docstring."""
    return inspect.cleandoc(kind.__doc__ or "").partition("----------\n")[2]


def _run_study(run: _Run) -> int:
    from fedl2p import models
    from fedl2p.federation.messages import FederationError
    from fedl2p.reporting.page import write_page
    from fedl2p.study.run import run_study

    again = f"fedl2p run {run.study.recipe} --out {shlex.quote(str(run.out))} --resume"
    if not models.is_ours(run.study.model):
        again += f" --model {shlex.quote(run.study.model)}"
    if any(map(user_code.is_user_code, run.study.methods)):
        again += f" --methods {shlex.join(run.study.methods)}"
    try:
        with user_errors(), _listeners(run) as listeners:
            report = run_study(run.study, run.out, resume=run.resume, listeners=listeners)
            page = write_page(run.out)
    except KeyboardInterrupt:
        sys.stderr.write(f"\nfedl2p: interrupted; go on with: {again}\n")
        return 130
    except (FederationError, OSError) as problem:
        if isinstance(problem, OSError) and problem.errno in _WRONG_PATH:
            raise
        sys.stderr.write(f"fedl2p: error: {problem}; go on with: {again}\n")
        return 1
    print(report)
    print(f"\nreport: {page}")
    return 0


@contextlib.contextmanager
def _listeners(run: _Run) -> Iterator[list[Any]]:
    """Yield who is told of the rounds: TensorBoard if asked for, and a bar if a person looks."""
    from fedl2p.federation.listeners import ProgressListener, TensorBoardListener
    from fedl2p.study.preparation import count_stages

    asked = [TensorBoardListener(run.out / layout.TENSORBOARD)] if run.tensorboard else []
    if not sys.stderr.isatty():
        yield [*asked]
        return
    with ProgressListener(stages=count_stages(run.study)) as progress:
        yield [*asked, progress]


# --- the other commands -----------------------------------------------------------------------


def _personalize(args: list[str]) -> int:
    options = parse(Personalize, args, prog="fedl2p personalize")
    from fedl2p.study.new_client import personalize_new_client

    with user_errors():
        user_code.import_user_module(options.model or "", what="model")
        result = personalize_new_client(
            options.run,
            options.data,
            options.out,
            seed=options.seed,
            device=options.device,
            model=options.model,
        )
    print(result)
    return 0


def _explain(args: list[str]) -> int:
    options = parse(Explain, args, prog="fedl2p explain")
    from fedl2p.study.explain_client import explain_client

    with user_errors():
        explained = explain_client(
            options.run,
            client=options.client,
            data=options.data,
            out=options.out,
            device=options.device,
            model=options.model,
        )
    print(explained)
    return 0


def _compare(args: list[str]) -> int:
    import tyro

    options = parse(
        Compare, args, prog="fedl2p compare", config=(tyro.conf.PositionalRequiredArgs,)
    )
    from fedl2p.reporting.comparison import compare

    with user_errors():
        print(compare(options.folders))
    return 0


def _report(args: list[str]) -> int:
    import tyro

    options = parse(Show, args, prog="fedl2p report", config=(tyro.conf.PositionalRequiredArgs,))
    from fedl2p.reporting.page import write_page

    with user_errors():
        print(f"report: {write_page(options.folder)}")
    return 0


def _recipes(args: list[str]) -> int:
    if args and args[0] in ("-h", "--help"):
        print(f"usage: fedl2p recipes\n\n{_SUMMARIES['recipes']}")
        return 0
    if args:
        raise UsageError(f"fedl2p recipes takes nothing, but was given {args[0]!r}")
    from fedl2p import recipes

    width = max(map(len, recipes.names()))
    for name in recipes.names():
        _, *variants = recipes.variants(name)
        also = f" (also {', '.join(variants)})" if variants else ""
        print(f"{name:<{width}}  {recipes.describe(name)}{also}")
    return 0


def _data(args: list[str]) -> int:
    from fedl2p.cli import data as datacommand

    return datacommand.main(args)


def _table(args: list[str]) -> int:
    from fedl2p.cli import table as tablecommand

    return tablecommand.main(args)


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": _run,
    "table": _table,
    "personalize": _personalize,
    "explain": _explain,
    "compare": _compare,
    "report": _report,
    "recipes": _recipes,
    "data": _data,
}
_SUMMARIES = {
    "run": "run a recipe: fedl2p run RECIPE --out DIR [--FIELD VALUE ...]",
    "table": "a table of the paper over several seeds: fedl2p table RECIPE --seeds 3",
    "personalize": "a new client: fedl2p personalize --run DIR --data FILE.npz --out DIR",
    "explain": "why a client got its settings: fedl2p explain --run DIR --client NAME",
    "compare": "one table over several seeds: fedl2p compare DIR DIR ...",
    "report": "make the report of a run again: fedl2p report DIR",
    "recipes": "list the recipes with one line each",
    "data": "files of data sets: fedl2p data get|check|make NAME [--root DIR]",
}


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"fedl2p: error: {' '.join(message.split())}\n")
    sys.exit(2)
