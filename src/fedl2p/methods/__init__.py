"""Every published method is one file, found by its file's name.

A file holds one subclass of :class:`fedl2p.method.Method` and a dictionary ``METHODS`` from the
names that a study may use to functions ``settings -> method``. To add a method, add a file; or
write it outside this package and name such a function as ``package.module:callable``.
``base/`` holds what methods share.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Collection

from fedl2p import user_code
from fedl2p.method import Method
from fedl2p.methods.base.settings import Settings

PRETRAINING = "fedavg"
"""The method that trains the global model."""

METANETS = "fedl2p"
"""The method whose meta-nets a run keeps for later clients."""


def _found() -> dict[str, Callable[[Settings], Method]]:
    found: dict[str, Callable[[Settings], Method]] = {}
    for module in pkgutil.iter_modules(__path__):
        if not module.ispkg:
            found.update(importlib.import_module(f"{__name__}.{module.name}").METHODS)
    return found


def names() -> tuple[str, ...]:
    """Return the names of all methods, sorted."""
    return tuple(sorted(_found()))


def title(name: str, settings: Settings) -> str:
    """Return what a method that a study may name is called in reports: its own ``name``.

    Raises
    ------
    ValueError
        If there is no such method, or it is not one that can be used.
    """
    if user_code.is_user_code(name):
        return build(name, settings).name
    if name not in names():
        raise _unknown(name)
    return name


def build(name: str, settings: Settings) -> Method:
    """Build a method by name, or by ``package.module:callable``, where that is imported.

    Raises
    ------
    ValueError
        If there is no such method, or it is not one that can be used.
    """
    known = _found()
    if user_code.is_user_code(name):
        return _own(name, settings, taken=known.keys())
    if name not in known:
        raise _unknown(name)
    return known[name](settings)


_WANTED = "a function of the settings that returns a fedl2p.Method"


def _own(name: str, settings: Settings, *, taken: Collection[str]) -> Method:
    """Build a user's method, whose own name must not be one of ours and must serve for files."""
    built = user_code.find_callable(name, what="method", wanted=_WANTED, takes=(settings,))(
        settings
    )
    if not isinstance(built, Method):
        raise ValueError(f"method {name!r} returned {type(built).__name__}; name {_WANTED}")
    if built.name in (*taken, "pretrain", "learn", "outcomes"):
        raise ValueError(f"method {name!r} is called {built.name!r}, which is taken; rename it")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", built.name):
        raise ValueError(
            f"method {name!r} is called {built.name!r}; its name serves for files too, so use "
            "letters, digits, '.', '_' and '-' only"
        )
    return built


def _unknown(name: str) -> ValueError:
    return ValueError(
        f"there is no method {name!r}; there are {', '.join(names())}, and your own as "
        "package.module:callable"
    )
