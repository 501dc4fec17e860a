"""The table of names, which is known without importing a method, fits the files."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from fedl2p import methods


def test_the_table_lists_every_method_of_every_file() -> None:
    files = [m.name for m in pkgutil.iter_modules(methods.__path__) if not m.ispkg]
    defined = [name for f in files for name in import_module(f"fedl2p.methods.{f}").METHODS]
    assert sorted(defined) == list(methods.names())
