"""Find and import a user's code by name: ``package.module:callable``.

To import a module is to run its code. So :func:`find_callable` only looks a name up in what the
program has imported: a file, or a message from another machine, that names code cannot make it run.
Whoever may decide so imports: a program by ``import``, the command line by
:func:`import_user_module`.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE = __name__.partition(".")[0]


def is_user_code(name: str) -> bool:
    """Tell whether a name is that of code outside this package."""
    return ":" in name and name.partition(":")[0].partition(".")[0] != PACKAGE


def import_user_module(name: str, *, what: str, from_working_directory: bool = True) -> None:
    """Import the module of a user's code by its name; other names are left alone.

    Parameters
    ----------
    name
        ``package.module:callable``, typed by the user.
    what
        The kind of the code, e.g. ``method``; for messages.
    from_working_directory
        Whether modules of the working directory are found too, after all that is installed.

    Raises
    ------
    ValueError
        If there is no such module. What else the module raises is passed on.
    """
    if not is_user_code(name):
        return
    directory = str(Path.cwd())
    if from_working_directory and directory not in sys.path:
        sys.path.append(directory)
    module = name.partition(":")[0]
    try:
        importlib.import_module(module)
    except (ImportError, TypeError, ValueError) as error:  # the latter: '.models', ''
        raise ValueError(
            f"{what} {name!r}: cannot import {module!r} ({error}); check the spelling, and that it "
            "is installed, on PYTHONPATH or in the working directory"
        ) from error


def find_callable(name: str, *, what: str, wanted: str, takes: tuple[object, ...] = ()) -> Any:
    """Return the callable of a name.

    Parameters
    ----------
    name
        ``package.module:callable``.
    what
        The kind of the code, e.g. ``method``; for messages, as is the next.
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
    value = getattr(module, attribute, None)
    if not callable(value):
        problem = "is not callable" if hasattr(module, attribute) else "does not exist"
        raise ValueError(
            f"{what} {name!r}: {attribute!r} {problem} in {module_name!r}; name {wanted}"
        )
    _check_takes(value, takes, name=name, what=what, wanted=wanted)
    return value


def _check_takes(
    function: Callable[..., object],
    takes: tuple[object, ...],
    *,
    name: str,
    what: str,
    wanted: str,
) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some callables written in C have none
        return
    try:
        signature.bind(*takes)
    except TypeError as error:
        raise ValueError(f"{what} {name!r} cannot be used ({error}); name {wanted}") from error
