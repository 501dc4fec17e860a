"""Every published method is one file, found by its file's name.

A file holds one subclass of :class:`fedl2p.method.Method` and a dictionary ``METHODS`` from the
names that a study may use to functions ``settings -> method``. To add a method, add a file.
``settings.py``, ``common.py``, ``parts.py``, ``localsgd.py`` and ``proximal.py`` hold what methods
share.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from fedl2p.method import Method
from fedl2p.methods.settings import Settings

_SHARED = {"settings", "common", "parts", "localsgd", "proximal"}


def _found(table: str) -> dict[str, Callable[[Settings], Method]]:
    found: dict[str, Callable[[Settings], Method]] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name not in _SHARED:
            found.update(getattr(importlib.import_module(f"{__name__}.{module.name}"), table, {}))
    return found


def names() -> tuple[str, ...]:
    """Return the names of all methods, sorted."""
    return tuple(sorted(_found("METHODS")))


def build(name: str, settings: Settings) -> Method:
    """Build a method by name.

    Raises
    ------
    ValueError
        If there is no such method.
    """
    known = {**_found("METHODS"), **_found("PREPARATIONS")}
    if name not in known:
        raise ValueError(f"there is no method {name!r}; there are {', '.join(names())}")
    return known[name](settings)
