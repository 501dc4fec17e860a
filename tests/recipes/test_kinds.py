"""The recipes whose clients differ in kind, and those of Fashion-MNIST and the smartwatch."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from fedl2p import recipes
from fedl2p.core.settings import InnerLoop
from fedl2p.data import watch
from fedl2p.data.kinds import KINDS
from fedl2p.runs.population import PopulationInfo
from fedl2p.study.run import run_study
from fedl2p.study.settings import METHODS
from support import data_archives

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    data_archives.write_folder(folder / "fashion", data_archives.fashion_files(train=1500))
    return folder


@pytest.fixture
def data(archives: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDL2P_DATA", str(archives))
    return archives


@pytest.mark.parametrize("name", ["kinds", "digits"])
def test_fine_tuning_reads_all_labelled_images_unless_it_stops_early(name: str) -> None:
    usual, stopping = recipes.get(name), recipes.get(f"{name}_early_stopping")
    assert usual.settings.finetune == InnerLoop(epochs=5, final="train+validation")
    assert stopping.settings.finetune == InnerLoop(epochs=5, early_stopping=True)
    assert stopping.recipe == f"{name}_early_stopping"
    for field in ("data", "model", "pretrain", "learn", "methods"):
        assert getattr(usual, field) == getattr(stopping, field)
    source: Any = usual.data
    assert source.kinds == KINDS


def test_kinds_has_clients_enough() -> None:
    source: Any = recipes.get("kinds").data
    assert source.seen >= 120
    assert source.unseen >= 90


def test_fashion_follows_the_papers_cifar10() -> None:
    fashion, cifar = recipes.get("fashion_published"), recipes.get("cifar10_published")
    assert fashion.settings.meta == cifar.settings.meta
    assert fashion.settings.finetune == cifar.settings.finetune
    assert fashion.settings.local == cifar.settings.local
    assert fashion.pretrain == cifar.pretrain
    for field in ("seen", "unseen", "train", "validation", "test"):
        assert getattr(fashion.data, field) == getattr(cifar.data, field)


def test_fashionc_follows_the_papers_cifar10c() -> None:
    fashion, cifar = recipes.get("fashionc_published"), recipes.get("cifar10c_published")
    assert fashion.settings.finetune == cifar.settings.finetune
    ours: Any = fashion.data
    theirs: Any = cifar.data
    assert (ours.seen, len(ours.corruptions)) == (theirs.seen, len(theirs.corruptions))
    assert fashion.pretrain == recipes.get("fashion").pretrain


@pytest.mark.parametrize(
    ("name", "seen", "unseen"),
    [
        pytest.param("digits_smoke", 6, 6, marks=pytest.mark.slow),
        pytest.param("digits_early_stopping_smoke", 6, 6, marks=pytest.mark.slow),
        pytest.param("kinds_smoke", 6, 6, marks=pytest.mark.slow),
        pytest.param("fashion_smoke", 6, 0, marks=pytest.mark.slow),
        pytest.param("fashion_published_smoke", 6, 0, marks=pytest.mark.slow),
        pytest.param("fashionc_smoke", 4, 0, marks=pytest.mark.slow),
        pytest.param("watch_smoke", 14, 6, marks=pytest.mark.slow),
    ],
)
def test_the_whole_recipe_in_miniature(
    name: str, seen: int, unseen: int, data: Path, tmp_path: Path
) -> None:
    if name == "watch_smoke" and watch.find_spec("seglearn") is None:
        pytest.skip("seglearn is not installed")
    study = recipes.get(name)
    report = run_study(study, tmp_path)
    assert not report.failures
    pools = [row.pool for row in report.rows if row.method == "fedl2p"]
    assert (pools.count("seen"), pools.count("unseen")) == (seen, unseen)
    assert all(math.isfinite(row.loss) and row.num_test > 0 for row in report.rows)
    if name.startswith(("kinds", "digits")):
        clients = PopulationInfo.read(tmp_path).clients.values()
        assert sorted(str(c.about["kind"]) for c in clients) == sorted(KINDS * 2)


def test_digits_leaves_the_slow_baselines_to_all_methods() -> None:
    study = recipes.get("digits")
    left_out = [name for name in METHODS if name not in study.methods]
    assert left_out == ["local", "gridsearch", "l2p"]
    assert dataclasses.replace(study, methods=("all",)).methods == METHODS
    several = dataclasses.replace(study, methods=("mine:method", "all"))
    assert several.methods == ("mine:method", *METHODS)
