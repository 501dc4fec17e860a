"""The notebook docs/tutorial.ipynb: it runs from top to bottom, and shows what it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"


def outputs(notebook: Any) -> Iterator[tuple[str, Any]]:
    """Yield the source of a cell with each of its outputs."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            yield cell.source, output


def printed(notebook: Any) -> str:
    return "".join(o.text for _, o in outputs(notebook) if o.output_type == "stream")


def score(method: str, notebook: Any) -> float:
    found = re.search(rf"^{method} +([\d.]+) %$", printed(notebook), re.MULTILINE)
    assert found, method
    return float(found.group(1))


def test_it_is_stored_with_its_figures_and_without_traces_of_a_machine() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    figures = [o for _, o in outputs(notebook) if "image/png" in o.get("data", {})]
    assert len(figures) == 5
    text = NOTEBOOK.read_text(encoding="utf-8")
    for trace in ("/work/", "/tmp/", "/home/", "/root", "Traceback", "widget-view"):
        assert trace not in text, trace
    assert len(text) < 400_000


@pytest.mark.slow
def test_it_runs_offline_and_personalizing_pays(tmp_path: Path) -> None:
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    kinds = [(o.output_type, o.get("name")) for _, o in outputs(notebook)]
    assert ("stream", "stderr") not in kinds
    assert not any(
        "pip install" in source and "SOURCE" in source for source, _ in outputs(notebook)
    )
    assert sum("image/png" in o.get("data", {}) for _, o in outputs(notebook)) == 5
    assert any("widget-view" in mime for _, o in outputs(notebook) for mime in o.get("data", {}))
    assert score("FedL2P", notebook) > score("best single setting", notebook) + 3
    assert "far outside what the meta-nets were learned on" in printed(notebook)
