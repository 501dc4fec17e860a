"""What users bring of their own, by name: ``package.module:callable``.

To import a module is to run its code. So a name is only looked up here, in what the program has
imported: a file, or a message from another machine, that names code cannot make it run. Who may
decide so imports: a program by ``import``, the command line by :func:`bring`.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

OURS = __name__.partition(".")[0]


def is_own(name: str) -> bool:
    """Tell whether a name is that of a user's own code."""
    return ":" in name and name.partition(":")[0].partition(".")[0] != OURS


def bring(name: str, *, what: str) -> None:
    """Import the module of a name that a user has typed; others are left alone.

    Modules of the working directory are found too, after all that is installed.

    Raises
    ------
    ValueError
        If there is no such module. What else the module raises is passed on.
    """
    if not is_own(name):
        return
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    module = name.partition(":")[0]
    try:
        importlib.import_module(module)
    except (ImportError, TypeError, ValueError) as error:  # the latter: '.models', ''
        raise ValueError(
            f"{what} {name!r}: cannot import {module!r} ({error}); check the spelling, and that it "
            "is installed, on PYTHONPATH or in the working directory"
        ) from error


def find(name: str, *, what: str, wanted: str, takes: tuple[object, ...] = ()) -> Any:
    """Return the callable of a name.

    Parameters
    ----------
    name
        ``package.module:callable``.
    what
        What it is wanted for, e.g. ``method``; for messages, as is the next.
    wanted
        What to name, e.g. ``a function of the settings``.
    takes
        Arguments as it will be called with; only their number matters.

    Raises
    ------
    ValueError
        If the module is not imported, or has nothing of that name that can be called so.
    """
    module_name, _, attribute = name.partition(":")
    module = sys.modules.get(module_name)
    if module is None:
        raise ValueError(
            f"{what} {name!r}: {module_name!r} is not imported; if it is yours, import it first, "
            "or name it on the command line"
        )
    found = getattr(module, attribute, None)
    if not callable(found):
        problem = "is not callable" if hasattr(module, attribute) else "does not exist"
        raise ValueError(
            f"{what} {name!r}: {attribute!r} {problem} in {module_name!r}; name {wanted}"
        )
    _check_takes(found, takes, name=name, what=what, wanted=wanted)
    return found


def _check_takes(
    found: Callable[..., object], takes: tuple[object, ...], *, name: str, what: str, wanted: str
) -> None:
    try:
        signature = inspect.signature(found)
    except ValueError:  # some callables written in C do not tell
        return
    try:
        signature.bind(*takes)
    except TypeError as error:
        raise ValueError(f"{what} {name!r} cannot be used ({error}); name {wanted}") from error
