"""Data that lies in a folder: where, and what can be fetched, checked or made there.

``fedl2p data get|check|make NAME`` finds a data set by its module in this room (``-`` in a name
stands for ``_``). A module takes part by having some of these at its top level:

``get(root, tell) -> list[str]``
    Download into the folder ``root`` what can be downloaded; what is there already and in order is
    left alone. Return what the user still has to do, one line each ("place X as Y"); empty if the
    folder is complete.
``check(root) -> list[str]``
    Return what is missing or damaged in the folder, one line each that names the file and the
    remedy; empty if all is in order. Nothing is written.
``Make``
    A frozen dataclass of options with a method ``run(root, tell) -> None`` that makes the data.

All three raise ValueError, in one line, where they cannot do their work.
"""

from __future__ import annotations

import contextlib
import os
import pkgutil
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal

Tell = Callable[[str, int, int | None], None]
"""``tell(what, done, total)``: progress of one thing, in its own unit; ``total`` None if unknown.

Called with growing ``done``, last with ``done == total``; a change of ``what`` begins another bar.
"""

EXTRAS = {
    "PIL": "data",
    "requests": "data",
    "datasets": "huggingface",
    "flwr_datasets": "huggingface",
}
"""Packages that only some data sets need, and the extra of this package that brings each."""

Verb = Literal["get", "check", "make"]

ROOT_VARIABLE = "FEDL2P_DATA"
"""Environment variable that names the folder of all data sets; ``data`` if it is not set."""


def silent(what: str, done: int, total: int | None) -> None:
    """Tell nobody."""


def root_of(name: str, given: Path | None = None) -> Path:
    """Return the folder of a data set: the given one, else ``$FEDL2P_DATA/NAME`` or ``data/NAME``.

    Parameters
    ----------
    name
        The data set's name, as on the command line.
    given
        What the user named; None for the default.
    """
    return Path(given) if given is not None else Path(os.environ.get(ROOT_VARIABLE, "data")) / name


def names(verb: Verb) -> tuple[str, ...]:
    """Return the names of the data sets that can be got, checked or made, sorted."""
    attribute = "Make" if verb == "make" else verb
    package = import_module("fedl2p.data").__path__
    found = (module.name for module in pkgutil.iter_modules(package))
    return tuple(
        sorted(
            name.replace("_", "-")
            for name in found
            if hasattr(import_module(f"fedl2p.data.{name}"), attribute)
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
    """Return the error for a file or folder that a data set needs and that is not there."""
    return ValueError(
        f"{path} is missing; get it with `fedl2p data get {name} --root {path.parent}`, which says "
        "what to place where if it cannot be downloaded"
    )


@contextlib.contextmanager
def needs(package: str) -> Iterator[None]:
    """Say which extra brings a package that is imported in the block, if it is not installed."""
    try:
        yield
    except ModuleNotFoundError as problem:
        if (problem.name or "").partition(".")[0] != package:
            raise
        raise ValueError(
            f"{package} is not installed; install it with: pip install 'fedl2p[{EXTRAS[package]}]'"
        ) from None
