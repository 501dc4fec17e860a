"""docs/benchmark.md, docs/guide/methods.md: a user's file runs as printed, commands exist."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedl2p import recipes
from fedl2p.cli import entry as cli
from fedl2p.data.files import folders
from fedl2p.methods import build
from fedl2p.methods.base.settings import Settings
from fedl2p.recipes.paper.tables import run_table
from fedl2p.reporting.published import PUBLISHED
from fedl2p.runs.results import Report
from fedl2p.runs.validation import from_plain
from fedl2p.study.preparation import build_methods
from fedl2p.study.settings import Study

PAGE = (Path(__file__).parents[2] / "docs" / "benchmark.md").read_text(encoding="utf-8")
OWN = (Path(__file__).parents[2] / "docs" / "guide" / "methods.md").read_text(encoding="utf-8")
METHODS = ("fedavg", "finetuning-client", "bias-tuning", "fedl2p")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory of somebody who has saved the page's file as mine.py."""
    (code,) = re.findall(r"```python\n(.*?)```", OWN, re.DOTALL)
    assert code.startswith('"""mine.py: ')
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    sys.modules.pop("mine", None)


def call(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    return int(stop.value.code or 0)


def test_the_file_is_a_data_set_a_method_and_a_recipe(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ("run", "mine:recipe", "--out", "runs/mine", "--data.hospitals", "8")
    assert call(*run) == 0, capsys.readouterr().err
    report = Report.load(here / "runs" / "mine")
    assert report.recipe == "mine:recipe"
    assert not report.failures
    for pool, clients in (("seen", 6), ("unseen", 2)):
        rows = [row for row in report.rows if row.pool == pool]
        assert [row.method for row in rows] == [m for m in METHODS for _ in range(clients)]
    found = {(s.method, s.pool): s for s in report.methods}
    # Only biases move, yet they do move, from the very model that FedAvg made.
    assert found["bias-tuning", "seen"].loss != found["fedavg", "seen"].loss
    assert found["bias-tuning", "seen"].loss != found["finetuning-client", "seen"].loss

    # A finished run goes on where the user's code is named again, and not by its folder alone.
    assert call(*run[:4], "--resume") == 0
    del sys.modules["mine"]
    with pytest.raises(ValueError, match="outside this package"):
        Study.load("runs/mine")


def test_the_method_serves_any_recipe(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ("run", "smoke", "--methods", "fedavg", "mine:bias_tuning", "--out", "own")
    assert call(*run, "--pretrain.rounds", "2", "--data.seen", "4") == 0, capsys.readouterr().err
    report = Report.load(here / "own")
    assert list(dict.fromkeys(row.method for row in report.rows)) == ["fedavg", "bias-tuning"]
    assert json.loads((here / "own/config.json").read_text())["methods"][1] == "mine:bias_tuning"


def test_the_recipe_has_a_table(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("table", "mine:recipe", "--seeds", "1", "--methods", "mine:bias_tuning") == 0
    out = capsys.readouterr().out
    assert out.startswith("mine:recipe: accuracy in percent")
    assert "bias-tuning" in out
    assert (here / "tables/mine-recipe/table.md").exists()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("", "'own_method' does not exist in 'theirs'"),
        ("own_method = 3", "'own_method' is not callable"),
        ("def own_method(): ...", "cannot be used .too many positional arguments"),
        ("def own_method(s): return 3", "returned int; name a function of the settings"),
        ("import fedl2p.no_such", "cannot import 'theirs'.*fedl2p.no_such"),
        (
            "from fedl2p.methods.fedavg import METHODS\nown_method = METHODS['fedavg']",
            "called 'fedavg', which is taken",
        ),
        (
            "from fedl2p.methods.fedavg import FedAvg\n"
            "def own_method(s): return FedAvg(name='a/b', local=s.local)",
            "called 'a/b'; its name serves for files",
        ),
    ],
    ids=["missing", "number", "arguments", "no method", "import", "taken", "slash"],
)
def test_what_is_no_method_is_refused_in_one_line(
    code: str,
    said: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (here / "theirs.py").write_text(code + "\n")
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    assert call("run", "smoke", "--methods", "theirs:own_method", "--out", "x") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line), line
    assert not (here / "x").exists()
    sys.modules.pop("theirs", None)


def test_a_file_or_message_that_names_code_does_not_import_it(here: Path) -> None:
    (here / "mine.py").write_text("raise RuntimeError('imported')")
    sys.path.append(str(here))
    with pytest.raises(ValueError, match="'mine' is not imported"):
        build("mine:bias_tuning", Settings())
    with pytest.raises(ValueError, match="'mine' is not imported"):
        recipes.get("mine:recipe")
    plain = {"data": {"kind": "fedl2p.data.digits:Digits"}, "methods": ["mine:bias_tuning"]}
    with pytest.raises(ValueError, match="'mine' is not imported"):
        build_methods(from_plain(Study, plain))
    (here / "config.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=r"config\.json .* 'mine' is not imported"):
        Study.load(here)
    with pytest.raises(ValueError, match="'mine' is not imported"):
        run_table("mine:recipe", here / "x", seeds=1)


def test_a_recipe_that_is_none_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "mine:Tumours", "--out", "x") == 2
    assert "returned Tumours; name a function" in capsys.readouterr().err
    assert call("run", "mine:nothing", "--out", "x") == 2
    assert "'nothing' does not exist in 'mine'" in capsys.readouterr().err
    assert call("table", "elsewhere:recipe") == 2
    assert "cannot import 'elsewhere'" in capsys.readouterr().err


def test_the_page_names_what_there_is() -> None:
    tables = re.findall(r"^fedl2p table (\w+) ", PAGE, re.MULTILINE)
    assert tables == ["cifar10", "cifar10c", "office10", "domainnet", "speech"]
    for name in tables:
        assert list(recipes.variants(name))[1:] == [
            *(f"{name}_published", f"{name}_smoke", f"{name}_published_smoke")
        ]
    listed = set(
        re.findall(r"^\| `([\w-]+)` \|", PAGE.partition("## One command")[0], re.MULTILINE)
    )
    assert listed - {"NAME"} == {*folders.names("get"), *folders.names("make")}
    published = PAGE.partition("## Published figures")[2].partition("##")[0]
    assert sorted(map(float, re.findall(r"\d\d\.\d\d\b", published))) == sorted(
        figure.percent for figure in PUBLISHED
    )
