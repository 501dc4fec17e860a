"""A study on other losses: command line, .npz files, tables and report without accuracy."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from fedl2p.reporting.paper_table import paper_table
from support.command import call, refused

SMALL = ["--pretrain.rounds", "1", "--learn.rounds", "1", "--settings.finetune.epochs", "1"]
METHODS = ("--methods", "fedavg", "bestfixed", "fedl2p")


def mlp(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(shape[0], 6), nn.BatchNorm1d(6), nn.Linear(6, classes))


class Tagger(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, classes)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"tags": self.head(self.embed(ids)), "mean": self.embed(ids).mean()}


def tagger(shape: tuple[int, ...], classes: int) -> nn.Module:
    return Tagger(classes)


def tags(returned: dict[str, Tensor]) -> Tensor:
    return returned["tags"]


def huber(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.smooth_l1_loss(outputs, targets, reduction="none").mean(1)


def near(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets).abs() < 1).float().mean(1)


HERE = "own_losses"


@pytest.fixture(autouse=True)
def own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this module be found by name, as code of a user's own."""
    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])


def write_clients(folder: Path, *, tokens: bool) -> Path:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(4, 2))
    for pool, count in (("seen", 3), ("unseen", 1)):
        (folder / pool).mkdir(parents=True)
        for i in range(count):
            arrays = {}
            for part, n in (("train", 9), ("validation", 6), ("test", 5)):
                if tokens:
                    x = rng.integers(11, size=(n, 5))
                    y = x % 3
                    y[:, -1] = -100
                else:
                    x = rng.normal(size=(n, 4))
                    y = x @ weights
                arrays |= {f"x_{part}": x, f"y_{part}": y}
            np.savez(folder / pool / f"{pool}{i}.npz", **arrays)
    return folder


@pytest.mark.slow
def test_a_study_of_regression_ends_in_losses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_clients(tmp_path / "data", tokens=False), tmp_path / "out"
    run = ("run", "npz", "--data.path", data, "--model", f"{HERE}:mlp", "--loss", "mse")
    assert call(*run, *SMALL, *METHODS, "--out", out) == 0
    shown = capsys.readouterr().out
    assert "accuracy" not in shown
    assert "after %" not in shown
    assert "worse %" in shown  # whose loss rose

    results = json.loads((out / "results.json").read_text())
    assert results["failures"] == []
    for summary in results["methods"]:
        assert summary["accuracy"] is summary["accuracy_before"] is None
        assert summary["accuracy_worst_decile"] is None
        assert summary["loss"] > 0
    with (out / "clients.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 4
    assert all(math.isnan(float(row["accuracy"])) for row in rows)
    assert all(float(row["loss"]) > 0 for row in rows)

    page = (out / "report.html").read_text()
    assert "FedL2P reaches a loss of" in page
    assert "percent of the starting loss" in page
    assert "points" not in page
    assert "nats." not in page

    assert call("compare", out) == 0
    assert "fedl2p minus it" in capsys.readouterr().out
    table = paper_table("npz", {"": [out]}, published=None)
    assert "loss on test samples" in str(table)
    assert call("report", out) == 0

    client, new = data / "unseen" / "unseen0.npz", tmp_path / "new"
    personalize = ("personalize", "--run", out, "--data", client, "--model", f"{HERE}:mlp")
    assert call(*personalize, "--out", new) == 0
    outcome = json.loads((new / "outcome.json").read_text())
    assert outcome["accuracy"] is None
    assert outcome["loss"] > 0


@pytest.mark.slow
def test_a_study_of_tokens_with_code_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_clients(tmp_path / "data", tokens=True)
    run = ("run", "npz", "--data.path", data, "--model", f"{HERE}:tagger", *SMALL)
    own = ("--outputs", f"{HERE}:tags")
    line = refused(capsys, *run, *own, "--out", tmp_path / "without")
    assert line.startswith("client 'seen0', train: there is the label -100")
    assert not (tmp_path / "without").exists()
    line = refused(capsys, *run, "--ignore-index", -100, "--out", tmp_path / "without")
    assert "returns a dict with tags, mean" in line

    out = tmp_path / "out"
    assert call(*run, *own, "--ignore-index", -100, *METHODS, "--out", out) == 0
    results = json.loads((out / "results.json").read_text())
    assert all(0 <= summary["accuracy"] <= 1 for summary in results["methods"])
    assert results["failures"] == []


@pytest.mark.slow
def test_a_folder_does_not_choose_the_code_of_a_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_clients(tmp_path / "data", tokens=False), tmp_path / "out"
    own = ("--loss", f"{HERE}:huber", "--metric", f"{HERE}:near")
    run = ("run", "npz", "--data.path", data, "--model", f"{HERE}:mlp", *SMALL)
    assert call(*run, *own, "--methods", "fedl2p", "--out", out) == 0
    results = json.loads((out / "results.json").read_text())
    assert all(0 <= summary["accuracy"] <= 1 for summary in results["methods"])
    capsys.readouterr()

    again = ("run", "npz", "--out", out, "--resume", "--model", f"{HERE}:mlp")
    assert f"name it: --loss {HERE}:huber" in refused(capsys, *again)
    assert f"name it: --metric {HERE}:near" in refused(capsys, *again, *own[:2])
    assert call(*again, *own) == 0
    capsys.readouterr()

    client = data / "unseen" / "unseen0.npz"
    personalize = ("personalize", "--run", out, "--data", client, "--model", f"{HERE}:mlp")
    line = refused(capsys, *personalize, "--out", tmp_path / "new")
    assert f"name it: --code {HERE}:huber" in line
    code = ("--code", f"{HERE}:huber", f"{HERE}:near")
    assert call(*personalize, *code, "--out", tmp_path / "new") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--loss", "hinge"), "loss is 'hinge', but must be one of cross-entropy, bce, mse"),
        (("--loss", "mse", "--ignore-index", 0), "ignore_index belongs to cross-entropy"),
        (("--loss", "nowhere:loss"), "cannot import 'nowhere'"),
        (("--metric", "accuracy"), "metric is 'accuracy', but must be package.module:callable"),
        (
            ("--loss", "mse", "--settings.grid.criterion", "accuracy"),
            "criterion is accuracy, which the loss 'mse' does not have",
        ),
        (("--loss", "mse"), "targets of shape"),
    ],
)
def test_losses_that_cannot_be_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    data = write_clients(tmp_path / "data", tokens=True)
    run = ("run", "npz", "--data.path", data, "--model", f"{HERE}:tagger")
    own = ("--outputs", f"{HERE}:tags")
    assert message in refused(capsys, *run, *own, *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
