"""Imports that wait for the first use, so that help is printed without loading torch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType


class _Proxy(ModuleType):
    """Stands for a package in the modules that import it; imports it when an attribute is read."""

    def __getattr__(self, attribute: str) -> object:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), attribute)


@contextlib.contextmanager
def delayed_imports(*packages: str) -> Iterator[None]:
    """Let modules that are imported inside get a proxy for ``import package``.

    Packages that are loaded already are not affected, and neither is an import after the block.
    ``from package import name`` and ``import package.module`` load the package at once; the latter
    executes that submodule twice, so code that we do not know must not be imported inside.
    """
    proxies = {name: _Proxy(name) for name in packages if name not in sys.modules}
    sys.modules.update(proxies)
    try:
        yield
    finally:
        for name, proxy in proxies.items():
            if sys.modules.get(name) is proxy:
                del sys.modules[name]
