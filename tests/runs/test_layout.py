"""Only runs/ spells the names of a run's files and the columns of its tables."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import fedl2p
from fedl2p.runs import layout
from fedl2p.runs.columns import (
    CLIENT_COLUMNS,
    FAILURE_COLUMNS,
    ROUND_COLUMNS,
    SCORES,
    names_of,
)
from fedl2p.runs.results import ResultsFile, Summary

ROOT = Path(fedl2p.__file__).parent

FILES = {
    value
    for value in vars(layout).values()
    if isinstance(value, str) and re.fullmatch(r"[a-z.]*\.[a-z]+", value)
}

COLUMNS = {
    name
    for names in (
        *(CLIENT_COLUMNS, ROUND_COLUMNS, FAILURE_COLUMNS, SCORES),
        *(names_of(ResultsFile), names_of(Summary)),
    )
    for name in names
    if "_" in name  # the others, e.g. loss, are words of many things
}


def literals(source: str) -> list[str]:
    """All texts of a file but docstrings, also those within f-strings."""
    tree = ast.parse(source)
    documentation = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in documentation
    ]


def spelled(source: str) -> set[str]:
    texts = literals(source)
    columns = {name for name in COLUMNS for text in texts if re.search(rf"\b{name}\b", text)}
    return columns | {name for name in FILES for text in texts if name in text}


def test_what_is_looked_for() -> None:
    assert {"config.json", "rounds.csv", "log.txt", "model.safetensors", ".run.lock"} <= FILES
    assert {"num_train", "accuracy_before", "bytes_down", "seconds_per_client"} <= COLUMNS
    assert spelled("'a docstring on clients.csv'\nx = f'see {y} in clients.csv'") == {"clients.csv"}
    assert spelled("def f(x):\n    'clients.csv'\n    return x['num_test']") == {"num_test"}


@pytest.mark.parametrize(
    "file",
    [path for path in sorted(ROOT.rglob("*.py")) if path.parent != ROOT / "runs"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_nobody_else_spells_a_file_or_a_column(file: Path) -> None:
    assert spelled(file.read_text(encoding="utf-8")) == set()


def test_a_name_stays_within_its_folder() -> None:
    run = Path("run")
    for name in ("../../etc", "a/b", "a b", "é", ".."):
        path = layout.client_file(run, "fedl2p", name)
        assert path.parent == run / "clients" / "fedl2p"
        assert path.name.endswith(".json")
