"""A package whose import is delayed: loaded by the first use, the same package afterwards."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedl2p.cli.delayed_imports import delayed_imports


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package ``counted`` and modules that import it."""
    (tmp_path / "counted.py").write_text("value = 3\n")
    (tmp_path / "reader.py").write_text("import counted\ndef read(): return counted.value\n")
    (tmp_path / "eager.py").write_text("from counted import value\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("counted", "reader", "eager"):
        sys.modules.pop(name, None)


def test_the_first_use_imports_it(counted: None) -> None:
    with delayed_imports("counted"):
        reader = importlib.import_module("reader")
    assert "counted" not in sys.modules
    assert reader.read() == 3
    package = importlib.import_module("counted")
    package.value = 4  # type: ignore[attr-defined]
    assert reader.read() == 4


def test_a_name_imported_from_it_imports_it_at_once(counted: None) -> None:
    with delayed_imports("counted"):
        eager = importlib.import_module("eager")
        assert eager.value == 3
        package = sys.modules["counted"]
    assert importlib.import_module("counted") is package


def test_what_is_loaded_already_is_left_alone(counted: None) -> None:
    package = importlib.import_module("counted")
    with delayed_imports("counted"):
        reader = importlib.import_module("reader")
    assert reader.counted is package


def test_a_package_that_is_not_installed_is_missed_at_its_use(tmp_path: Path) -> None:
    with delayed_imports("not_installed"):
        import not_installed  # type: ignore[import-not-found]
    with pytest.raises(ModuleNotFoundError, match="not_installed"):
        _ = not_installed.value
    assert "not_installed" not in sys.modules
