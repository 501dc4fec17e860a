"""Folders of data sets: their place, and how ``fedl2p data`` gets, checks and makes them.

``fedl2p data get|check|make NAME`` looks a data set up by its module in :mod:`fedl2p.data` (``-``
in a name stands for ``_``). A module takes part by having some of these at its top level:

``get(root, progress) -> list[str]``
    Download and unpack into the folder ``root`` what can be downloaded; what is there already and
    in order is left alone. Return what the user still has to do, one line each ("place X as Y").
``check(root) -> list[str]``
    Return what is missing or damaged in the folder, one line each that names the file and the
    remedy. Nothing is written.
``Make``
    A frozen dataclass of options with a method ``run(root, progress) -> None`` that makes the data.

All three raise ValueError, in one line, where they cannot do their work.
"""

from __future__ import annotations

import contextlib
import os
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal

ProgressCallback = Callable[[str, int, int | None], None]
"""``progress(what, done, total)``: ``done`` of ``total`` units of one task; None if unknown.

Called with growing ``done``, last with ``done == total``; another ``what`` is another task.
"""

EXTRAS = {
    "PIL": "data",
    "pooch": "data",
    "datasets": "huggingface",
    "flwr_datasets": "huggingface",
}
"""The extra of this package that installs each package which only some data sets need."""

INSTALLED = {"fashion": Path("/usr/share/datasets/fashion-mnist")}
"""Where a package of the system puts a data set: Debian's dataset-fashion-mnist."""

Verb = Literal["get", "check", "make"]

ROOT_VARIABLE = "FEDL2P_DATA"
"""Environment variable that names the folder of all data sets; ``data`` if it is not set."""


def no_progress(what: str, done: int, total: int | None) -> None:
    """Ignore progress."""


def root_of(name: str, given: Path | None = None) -> Path:
    """Return the folder of a data set: the given one, else ``$FEDL2P_DATA/NAME`` or ``data/NAME``.

    Where that default does not exist and a package of the system has installed the data set, it is
    the package's folder.

    Parameters
    ----------
    name
        The data set's name, as on the command line.
    given
        The user's choice; None for the default.
    """
    if given is not None:
        return Path(given)
    default = Path(os.environ.get(ROOT_VARIABLE, "data")) / name
    installed = INSTALLED.get(name)
    return installed if installed and installed.is_dir() and not default.exists() else default


def names(verb: Verb) -> tuple[str, ...]:
    """Return the names of the data sets that have a verb, sorted."""
    attribute = "Make" if verb == "make" else verb
    package = import_module("fedl2p.data").__path__
    return tuple(
        sorted(
            module.name.replace("_", "-")
            for module in pkgutil.iter_modules(package)
            if hasattr(import_module(f"fedl2p.data.{module.name}"), attribute)
        )
    )


def module_of(name: str, verb: Verb) -> ModuleType:
    """Return the module of a data set that has the verb.

    Raises
    ------
    ValueError
        If there is none.
    """
    known = names(verb)
    if name not in known:
        raise ValueError(f"no data set {name!r} to {verb}; there are {', '.join(known) or 'none'}")
    return import_module(f"fedl2p.data.{name.replace('-', '_')}")


def missing(path: Path, name: str) -> ValueError:
    """Return the error for a missing file or folder of a data set."""
    return ValueError(
        f"{path} is missing; get it with `fedl2p data get {name} --root {path.parent}`, which says "
        "what to place where if it cannot be downloaded"
    )


def unpacked_files(folder: Path, files: Sequence[str], *, name: str) -> list[Path]:
    """Return the paths of a data set's files in the folder that its archive unpacks to.

    Raises
    ------
    ValueError
        If the folder or a file is missing, with the command that gets data set ``name``.
    """
    if not folder.is_dir():
        raise missing(folder, name)
    paths = [folder / file for file in files]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is missing; {remedy(folder, name)}")
    return paths


def problems_of(
    folder: Path, files: Sequence[str], read: Callable[[Path], object], *, name: str
) -> list[str]:
    """Return what is wrong with the files of an unpacked archive, one line each.

    ``read`` opens one file and raises ValueError if it is damaged.
    """
    if not folder.is_dir():
        return [str(missing(folder, name))]
    problems = []
    for file in files:
        try:
            read(*unpacked_files(folder, [file], name=name))
        except ValueError as problem:
            problems.append(str(problem))
    return problems


def remedy(folder: Path, name: str, *, verb: Verb = "get") -> str:
    """Return what to do about a data set's folder that is incomplete or damaged."""
    return (
        f"move {folder} away, if it is there, and run `fedl2p data {verb} {name} --root "
        f"{folder.parent}`"
    )


@contextlib.contextmanager
def needs(package: str) -> Iterator[None]:
    """Turn a failed import of ``package`` in the block into a line with the pip command.

    Raises
    ------
    ValueError
        If it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as problem:
        if (problem.name or "").partition(".")[0] != package:
            raise
        raise ValueError(
            f"{package} is not installed; install it with: pip install 'fedl2p[{EXTRAS[package]}]'"
        ) from None
