"""The command ``fedl2p``: its subcommands, and how it ends.

A user's mistake ends in one line on stderr and exit status 2; an interruption in one line and exit
status 130.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from fedl2p.cli.delayed_imports import delayed_imports
from fedl2p.cli.parsing import HELP, parse
from fedl2p.cli.resumable import WRONG_PATH
from fedl2p.process_environment import prepare_process
from fedl2p.version import __version__

_EXTRAS = {
    "flwr": "flower",
    "ray": "ray",
    "sklearn": "data",
    "soundfile": "audio",
    "scipy": "report",
    "jinja2": "report",
    "captum": "explain",
    "matplotlib": "report",
    "tyro": "cli",
    "docstring_parser": "cli",
    "rich": "cli",
}
"""Packages that not every installation has, and the extra of this package that brings each."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; always ends in SystemExit."""
    args = list(sys.argv[1:] if argv is None else argv)
    prepare_process()
    for stream in (sys.stdout, sys.stderr):
        # A file's name may hold bytes that cannot be decoded; printing it must not fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(_command(args)())
    except ValueError as problem:
        _fail(str(problem))
    except ModuleNotFoundError as problem:
        _fail(_missing_package(problem))
    except KeyboardInterrupt:
        sys.stderr.write("\nfedl2p: interrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone (e.g. `| head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as problem:
        _fail(str(problem), status=2 if problem.errno in WRONG_PATH else 1)


def _command(args: list[str]) -> Callable[[], int]:
    """Parse the command line into a command; calling it runs it and returns the exit status."""
    if args == ["--version"]:
        return _print_version
    from tyro.extras import SubcommandApp

    # torch alone takes more than a second, and help needs settings only.
    prints_text = not HELP.isdisjoint(args) or args[:1] == ["recipes"]
    with delayed_imports("torch", "numpy") if prints_text else contextlib.nullcontext():
        from fedl2p.cli import audit, data, run
        from fedl2p.cli.compare import Compare
        from fedl2p.cli.explain import Explain
        from fedl2p.cli.personalize import Personalize
        from fedl2p.cli.recipes import Recipes
        from fedl2p.cli.report import Report
        from fedl2p.cli.table import Table

    # The options of run and audit depend on the recipe, those of data on the data set.
    if args[:1] == ["run"]:
        return run.command(args[1:])
    if args[:1] == ["audit"]:
        return audit.command(args[1:])
    if args[:1] == ["data"]:
        return data.command(args[1:])
    app = SubcommandApp()
    for name, (kind, summary) in {
        "run": (_ParsedElsewhere, "run a recipe: fedl2p run RECIPE --out DIR"),
        "audit": (_ParsedElsewhere, "does it pay on these clients?: fedl2p audit RECIPE --out DIR"),
        "table": (Table, "run a recipe under several seeds: fedl2p table RECIPE"),
        "personalize": (Personalize, "a new client: --run DIR --data FILE.npz --out DIR"),
        "explain": (Explain, "a client's hyperparameters: --run DIR --client NAME"),
        "compare": (Compare, "one table of runs under several seeds: fedl2p compare DIR DIR ..."),
        "report": (Report, "make the report of a run again: fedl2p report DIR"),
        "recipes": (Recipes, "list the recipes with one line each"),
        "data": (_ParsedElsewhere, "files of data sets: fedl2p data get|check|make NAME"),
    }.items():
        # None: its docstring, which is longer
        app.command(name=name, help=None if args[:1] == [name] else summary)(kind)
    command: Callable[[], int] = parse(app.cli, args, prog="fedl2p", description=_ABOUT)
    return command


@dataclass(frozen=True)
class _ParsedElsewhere:
    """Stands for a command that parses its options itself, so that the overview lists it."""


_ABOUT = "Federated learning to personalize. fedl2p COMMAND --help explains a command's options."


def _print_version() -> int:
    print(f"fedl2p {__version__}")
    return 0


def _missing_package(problem: ModuleNotFoundError) -> str:
    """Return a message that names the extra that brings a package."""
    package = (problem.name or "").partition(".")[0]
    if package not in _EXTRAS:
        return str(problem)
    return f"{package} is not installed; install it with: pip install 'fedl2p[{_EXTRAS[package]}]'"


def _fail(message: str, *, status: int = 2) -> NoReturn:
    sys.stderr.write(f"fedl2p: error: {' '.join(message.split())}\n")
    sys.exit(status)
