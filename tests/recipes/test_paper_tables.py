"""Tables over seeds: what they run, what they leave alone, what they print."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedl2p.cli import entry as cli
from fedl2p.recipes.paper import tables
from fedl2p.recipes.paper.tables import cells, run_table
from fedl2p.reporting.paper_table import paper_table
from fedl2p.reporting.published import PUBLISHED, published_accuracies
from fedl2p.study.settings import Study
from support import smoke_data
from support.synthetic_run import make_run

METHODS = ("finetuning-client", "fedl2p")


def accuracy(folder: Path, method: str, pool: str) -> float:
    told = json.loads((folder / "results.json").read_text())
    (found,) = [m for m in told["methods"] if (m["method"], m["pool"]) == (method, pool)]
    return float(found["accuracy"])


class Watched:
    """Notes what runs; interrupts the run of one folder."""

    def __init__(self, stop: Path | None = None) -> None:
        self.stop, self.ran = stop, list[str]()

    @contextlib.contextmanager
    def __call__(self, what: str, study: Study) -> Iterator[tuple[()]]:
        if what == str(self.stop):
            raise KeyboardInterrupt
        self.ran.append(what)
        yield ()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of the recipe smoke under two seeds, interrupted between them."""
    out = tmp_path_factory.mktemp("table") / "smoke"
    first = Watched(stop=out / "seed-1")
    with pytest.raises(KeyboardInterrupt):
        run_table("smoke", out, seeds=2, methods=METHODS, watch=first)
    assert not (out / "table.json").exists()
    second = Watched()
    run_table("smoke", out, seeds=2, methods=METHODS, watch=second)
    assert (first.ran, second.ran) == ([str(out / "seed-0")], [str(out / "seed-1")])
    return out


@pytest.mark.slow
def test_the_numbers_are_those_of_the_runs(table: Path) -> None:
    told = json.loads((table / "table.json").read_text())
    assert (told["recipe"], told["seeds"]) == ("smoke", [0, 1])
    assert [column["pool"] for column in told["columns"]] == ["seen", "unseen"]
    page = (table / "table.md").read_text()
    for column in told["columns"]:
        assert [m["method"] for m in column["methods"]] == list(METHODS)
        for line in column["methods"]:
            own = [accuracy(table / f"seed-{s}", line["method"], column["pool"]) for s in (0, 1)]
            assert line["accuracies"] == own
            assert line["mean"] == pytest.approx(sum(own) / 2)
            assert line["standard_deviation"] == pytest.approx(statistics.stdev(own))
            # Student's t for two values: tan(0.95 pi / 2) times half their distance
            half = math.tan(0.95 * math.pi / 2) * abs(own[0] - own[1]) / 2
            mean = line["mean"]
            assert line["interval"] == pytest.approx([mean - half, mean + half])
            assert f"{100 * mean:.2f} ± {100 * half:.2f}" in page
            assert line["published_percent"] is None
    assert "mean ± half of its 95 % t-interval over 2 seeds (0, 1)" in page.splitlines()[0]


def test_what_is_finished_is_not_run_again(table: Path) -> None:
    before = {p: p.read_bytes() for p in table.rglob("*") if p.is_file()}
    watch = Watched()
    run_table("smoke", table, seeds=2, methods=METHODS, watch=watch)
    assert watch.ran == []
    assert {p: p.read_bytes() for p in table.rglob("*") if p.is_file()} == before


def test_another_study_in_the_folder_is_refused(table: Path) -> None:
    with pytest.raises(ValueError, match="holds a run of other settings"):
        run_table("smoke", table, seeds=2, methods=("fedl2p",))


def test_the_command_prints_the_table(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["table", "smoke", "--seeds", "1", "--out", str(table), "--methods", *METHODS])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("smoke: accuracy in percent of test samples, seed 0\n")
    assert "FedL2P" in said
    assert f"written: {table / 'table.md'}" in said


@pytest.mark.slow
def test_a_table_makes_the_model_that_it_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CIFAR-10-C, the whole recipe in miniature: CIFAR-10's model first, for each label skew."""
    pytest.importorskip("soundfile")
    monkeypatch.setenv("FEDL2P_DATA", str(smoke_data.write_all(tmp_path / "data")))
    monkeypatch.setitem(tables.CELLS, "cifar10c", {"alpha 0.5": {"alpha": 0.5}})
    out, watch = tmp_path / "table", Watched()
    made = run_table("cifar10c_smoke", out, seeds=1, watch=watch)
    place = out / "alpha-0.5"
    assert watch.ran == [str(place / "model-seed-0"), str(place / "seed-0")]
    study = Study.load(place / "seed-0")
    assert study.pretrained == place / "model-seed-0" / "global.safetensors"
    assert Study.load(place / "model-seed-0").recipe == "cifar10_smoke"
    (column,) = made.columns
    assert tuple(column.accuracies) == study.methods
    weights = [(place / n / "global.safetensors").read_bytes() for n in ("model-seed-0", "seed-0")]
    assert weights[0] == weights[1]


def test_cells_of_the_papers_tables() -> None:
    for name in ("cifar10", "cifar10_published", "domainnet"):
        labels = [cell.label for cell in cells(name)]
        assert labels == ["alpha 1000", "alpha 1", "alpha 0.5", "alpha 0.1"]
    assert [cell.label for cell in cells("office10")] == [""]
    for cell in cells("cifar10c_published"):
        assert cell.before is not None
        data: tuple[Any, Any] = (cell.study.data, cell.before.data)
        assert data[0].alpha == data[1].alpha
        assert cell.before.methods == ("fedavg",)


def test_no_seeds_and_no_such_table_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds is 0, but must be 1 or more"):
        run_table("smoke", tmp_path / "x", seeds=0)
    with pytest.raises(ValueError, match="unknown recipe 'imagenet'"):
        run_table("imagenet", tmp_path / "x", seeds=1)
    assert list(tmp_path.iterdir()) == []


# --- beside the published figures -------------------------------------------------------------


def test_published_figures_are_the_three_lines_of_the_summary() -> None:
    assert sorted(f.percent for f in PUBLISHED) == [62.76, 77.68, 79.58, 80.28, 80.97, 87.85, 88.85]
    assert published_accuracies("speech", "", "unseen") == {
        "fedl2p": 87.85,
        "finetuning-client": 62.76,
    }
    cifar = {"fedl2p": 80.28, "fedbabu": 79.58, "perfedavg": 77.68}
    assert published_accuracies("cifar10", "alpha 0.1", "seen") == cifar
    assert published_accuracies("office10", "", "seen")["fedl2p"] == 88.85
    assert published_accuracies("cifar10", "alpha 1000", "seen") == {}
    for figure in PUBLISHED:
        assert figure.cell in [cell.label for cell in cells(figure.recipe)]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / f"seed-{seed}" for seed in range(3)]
    for seed, folder in enumerate(folders):
        make_run(folder, seed=seed, methods=("finetuning-client", "fedl2p"))
    return folders


def test_published_figures_stand_beside_ours(runs: list[Path]) -> None:
    table = paper_table("speech", {"": runs}, published="speech")
    head, *rows = table.cells()
    assert head == ("method", "seen", "unseen", "published")
    assert [row[-1] for row in rows] == ["62.76", "87.85"]
    assert any("arXiv 2310.02420" in note for note in table.notes)
    without = paper_table("speech_smoke", {"": runs}, published=None)
    assert without.cells()[0] == ("method", "seen", "unseen")
    assert without.notes == ()


def test_a_published_row_that_nothing_here_is_stands_alone(runs: list[Path]) -> None:
    table = paper_table("office10", {"": runs}, published="office10")
    *_, last = table.cells()
    assert last == ("Fine-tuning, statistics not stated", "", "80.97", "")
    assert "| Fine-tuning, statistics not stated |  | 80.97 |" in table.markdown()


def test_runs_may_differ_in_the_file_of_their_model_but_in_nothing_else(runs: list[Path]) -> None:
    for seed, folder in enumerate(runs):
        config = json.loads((folder / "config.json").read_text())
        config["pretrained"] = f"model-seed-{seed}/global.safetensors"
        (folder / "config.json").write_text(json.dumps(config))
    made = paper_table("digits", {"": runs}, published=None)
    assert len(made.columns[0].accuracies["fedl2p"]) == 3
    config["learn"]["rounds"] = 1
    (runs[2] / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"differ in more than the seed: learn\.rounds"):
        paper_table("digits", {"": runs}, published=None)


def test_one_seed_has_no_deviation(runs: list[Path]) -> None:
    table = paper_table("digits", {"": runs[:1]}, published=None)
    assert "±" not in str(table)
    assert table.to_dict()["columns"][0]["methods"][0]["standard_deviation"] is None
