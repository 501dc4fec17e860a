"""The pages of docs/: their Python runs as printed, their commands and files exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fedl2p.cli import entry as cli

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
RUN = ("guide/quickstart", "guide/models", "guide/data", "guide/files", "api/index")
"""Pages whose blocks of Python run as they stand, one after the other; that of guide/methods is run
by test_benchmark.py, those of flower by tests/flower."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize(
    "page",
    # the quickstart has the README's lines, which run in every `make test`
    [pytest.param(p, marks=pytest.mark.slow if p == "guide/quickstart" else ()) for p in RUN],
)
def test_the_python_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    code = blocks(ROOT / "docs" / f"{page}.md", "python")
    assert code
    names: dict[str, Any] = {}
    for block in code:
        exec(compile(block, page, "exec"), names)
    if page in ("guide/quickstart", "guide/models"):
        mine = names["mine"]
        assert {k for k, v in mine.hyperparams.by_name().items() if v} >= {"rate"}


def test_every_other_block_of_python_is_run_elsewhere() -> None:
    having = {
        str(p.relative_to(ROOT / "docs").with_suffix("")) for p in PAGES if blocks(p, "python")
    }
    assert having - set(RUN) == {"flower", "guide/methods"}


def shell_lines() -> list[tuple[str, str]]:
    """Return every command of fedl2p and make in the README and the pages, with its page."""
    found = []
    for page in (ROOT / "README.md", *PAGES):
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.strip()
                if line.startswith(("fedl2p ", "make ", "python ")):
                    found.append((page.name, line.partition("  #")[0].strip()))
    return found


def test_commands_of_the_pages_exist(capsys: pytest.CaptureFixture[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    seen = shell_lines()
    assert len(seen) > 20
    for page, line in seen:
        words = line.split()
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile, f"{page}: {line}"
        elif words[0] == "fedl2p":
            with pytest.raises(SystemExit) as stop:
                cli.main([words[1], "--help"])
            assert stop.value.code == 0, f"{page}: {line}"
            assert words[1] in capsys.readouterr().out
        elif words[1].endswith(".py") and "/" in words[1]:
            assert (ROOT / words[1]).is_file(), f"{page}: {line}"


NAMED = re.compile(
    r"`((?:tests|benchmarks|examples|apps|src|docs)/[\w./-]+|(?:core|methods|federation|data)/[\w/]+\.py)`"
)
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def test_files_that_documents_name_exist() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    documents += [*PAGES, *(ROOT / "docs").glob("*.ipynb"), *SOURCES]
    missing = [
        f"{page.name}: {name}"
        for page in documents
        for name in NAMED.findall(page.read_text(encoding="utf-8"))
        if not (ROOT / name).exists() and not (ROOT / "src/fedl2p" / name).exists()
    ]
    assert not missing
