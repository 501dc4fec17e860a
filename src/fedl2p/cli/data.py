"""The command ``fedl2p data``: get, check or make the files of a data set."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from fedl2p.cli.parsing import parse
from fedl2p.data.files.folders import ProgressCallback, module_of, names, no_progress, root_of


def command(args: list[str]) -> Callable[[], int]:
    """Parse ``fedl2p data ARGS``."""
    app, makers = SubcommandApp(), SubcommandApp()
    for name in names("make"):
        makers.command(name=name)(_maker(name))
    app.command(name="get", help=f"{Get.__doc__} There are: {', '.join(names('get'))}.")(Get)
    app.command(name="check", help=f"{Check.__doc__} There are: {', '.join(names('check'))}.")(
        Check
    )
    app.command(
        makers, name="make", help=f"Make the data on this machine: {', '.join(names('make'))}."
    )
    parsed: Callable[[], int] = parse(app.cli, args, prog="fedl2p data", description=_ABOUT)
    return parsed


_ABOUT = "Get, check or make the files of a data set: fedl2p data get|check|make NAME [--root DIR]"


@dataclass(frozen=True, kw_only=True)
class _Folder:
    """The folder of a data set.

    Parameters
    ----------
    name
        Name of the data set.
    root
        Its folder; by default $FEDL2P_DATA/NAME or data/NAME.
    """

    name: Positional[str]
    root: Path | None = None


class Get(_Folder):
    """Download the files of a data set, or say what to place where."""

    def __call__(self) -> int:
        """Download, and return the exit status: 2 if something is left to do by hand."""
        root = root_of(self.name, self.root)
        with _progress() as report:
            missing = module_of(self.name, "get").get(root, report)
        return _finish(self.name, root, missing)


class Check(_Folder):
    """Verify the files of a data set; name what is missing or damaged."""

    def __call__(self) -> int:
        """Verify, and return the exit status: 2 if something is missing or damaged."""
        root = root_of(self.name, self.root)
        return _finish(self.name, root, module_of(self.name, "check").check(root))


@dataclass(frozen=True, kw_only=True)
class Make:
    """Make the data on this machine.

    Parameters
    ----------
    root
        Folder of the data set; by default $FEDL2P_DATA/NAME or data/NAME.
    options
        Settings of how the data set is made, an instance of its module's Make.
    """

    name: ClassVar[str]
    root: Path | None = None
    options: Any

    def __call__(self) -> int:
        """Make the data and return the exit status."""
        root = root_of(self.name, self.root)
        with _progress() as report:
            self.options.run(root, report)
        return _finish(self.name, root, [])


def _maker(name: str) -> type[Make]:
    """Return the command that makes a data set, with the options of its module's ``Make``."""
    options = module_of(name, "make").Make
    return dataclasses.make_dataclass(
        "Make",
        [("options", Annotated[options, arg(name="")])],
        bases=(Make,),
        namespace={"__doc__": options.__doc__, "name": name},
        kw_only=True,
        frozen=True,
    )


def _finish(name: str, root: Path, missing: list[str]) -> int:
    """Print a line for each problem, or that the data set is complete; return the exit status."""
    for line in missing:
        sys.stderr.write(f"fedl2p: error: {' '.join(line.split())}\n")
    if missing:
        return 2
    print(f"{name}: complete in {root}")
    return 0


@contextlib.contextmanager
def _progress() -> Iterator[ProgressCallback]:
    """Yield a callback that draws progress bars on a terminal, and does nothing elsewhere."""
    if not sys.stderr.isatty():
        yield no_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report
