"""The command ``fedl2p data``: get, check or make the files of a data set."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from fedl2p.cli.parsing import UsageError, parse, user_errors
from fedl2p.data.files.folders import ProgressCallback, Verb, module_of, names, no_progress, root_of

SUMMARY = "files of data sets: fedl2p data get|check|make NAME [--root DIR]"

_VERBS = {
    "get": "download what can be downloaded, and say what to place where for the rest",
    "check": "verify the folder of a data set; name what is missing or damaged",
    "make": "make the data on this machine",
}


def main(args: list[str]) -> int:
    """Run ``fedl2p data ARGS`` and return the exit status: 2 if something is missing or damaged."""
    if args and args[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if len(args) < 2 or args[0] not in _VERBS or args[1].startswith("-"):
        raise UsageError("wanted: fedl2p data get|check|make NAME; see fedl2p data --help")
    verb, name = cast(Verb, args[0]), args[1]
    with user_errors():
        module = module_of(name, verb)
    options = _options(verb, name, module, args[2:])
    root = root_of(name, options.root)
    with user_errors(), _progress() as progress:
        if verb == "make":
            options.run(root, progress)
            left = []
        else:
            left = module.get(root, progress) if verb == "get" else module.check(root)
    for line in left:
        sys.stderr.write(f"fedl2p: error: {' '.join(line.split())}\n")
    if left:
        return 2
    print(f"{name}: complete in {root}")
    return 0


def _overview() -> str:
    lines = [f"usage: {SUMMARY.partition(': ')[2]}", ""]
    for verb, what in _VERBS.items():
        known = ", ".join(names(cast(Verb, verb))) or "none"
        lines += [f"  {verb:<7}{what}", f"         {known}"]
    lines += ["", "--root: the data set's folder; by default $FEDL2P_DATA/NAME or data/NAME."]
    return "\n".join(lines)


def _options(verb: Verb, name: str, module: Any, args: list[str]) -> Any:
    """Parse --root and, for make, the fields of the module's Make, of which this is one then."""
    text = f"{_VERBS[verb].capitalize()}.\n\nParameters\n----------\nroot\n    {_ROOT}\n"
    if verb == "make":
        text += inspect.cleandoc(module.Make.__doc__ or "").partition("----------\n")[2]
    kind = dataclasses.make_dataclass(
        "Data",
        [("root", Path | None, dataclasses.field(default=None))],
        bases=(module.Make,) if verb == "make" else (),
        kw_only=True,
        frozen=True,
        namespace={"__doc__": text},
    )
    with user_errors():
        return parse(kind, args, prog=f"fedl2p data {verb} {name}")


_ROOT = "Folder of the data set; by default $FEDL2P_DATA/NAME or data/NAME."


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
