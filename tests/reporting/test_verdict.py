"""The verdict of an audit: closed forms, and each of its sentences where it must stand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fedl2p.reporting.verdict import Verdict, verdict
from fedl2p.runs.results import Report, Row

METHODS = ("fedavg", "bestfixed", "fedl2p-constant", "gridsearch", "fedl2p")
NOISE = (0.0, 0.01, -0.01)
"""Of three clients, so that intervals have a width."""


def run(folder: Path, number: int, gains: dict[str, float], *, loss: bool = False) -> Path:
    """Write a run that held three clients out; ``gains`` are over the starting model's 0.5."""
    rows = [
        Row(
            method=method,
            client=f"{pool}-{number}-{i}",
            pool=pool,
            num_train=10,
            num_test=100,
            accuracy_before=math.nan if loss else 0.5,
            accuracy=math.nan
            if loss
            else 0.5 + gains.get(method, 0.0) + noise * (method != "fedavg"),
            loss_before=1.0,
            loss=1.0 - gains.get(method, 0.0) - noise,
            seconds=2.0 if method == "gridsearch" else 0.1,
            failure=None,
        )
        for method in METHODS
        for pool in ("seen", "unseen")
        for i, noise in enumerate(NOISE)
    ]
    report = Report(
        recipe="npz", seed=0, engine="in-process", device="cpu", versions={}, seconds={},
        bytes_per_client_round={}, rows=tuple(rows),
    )  # fmt: skip
    folder.mkdir(parents=True)
    report.save(folder)
    return folder


def audit(tmp_path: Path, *, loss: bool = False, **gains: float) -> Verdict:
    named = {name.replace("_", "-"): gain for name, gain in gains.items()}
    folders = [run(tmp_path / str(i), i, named, loss=loss) for i in range(2)]
    return verdict(folders)


def test_held_out_clients_of_all_runs_count_once_and_the_same(tmp_path: Path) -> None:
    found = audit(tmp_path, fedl2p=0.2, bestfixed=0.1, gridsearch=-0.05)
    assert (found.clients, found.folds) == (6, 2)
    lines = {line.method: line for line in found.lines}
    assert [*lines] == list(METHODS)
    assert lines["fedl2p"].score == pytest.approx(70.0)
    assert lines["fedl2p"].difference is None
    gap = lines["fedavg"].difference
    assert gap is not None
    assert gap.mean == pytest.approx(20.0)
    # six values: 20, 21 and 19, twice; t(0.975, 5) = 2.570582
    assert gap.half == pytest.approx(2.570582 * math.sqrt(4 / 5) / math.sqrt(6), rel=1e-5)
    assert (lines["fedavg"].above, lines["fedavg"].below) == (6, 0)
    assert lines["gridsearch"].share_worse == 1.0
    assert lines["bestfixed"].share_worse == 0.0
    assert lines["gridsearch"].seconds == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ({"fedl2p": 0.2, "bestfixed": 0.1}, "It pays here: FedL2P is 10.0 points (± 0.0) above"),
        (
            {"fedl2p": 0.2, "bestfixed": 0.1, "fedl2p_constant": 0.25},
            "Learning pays here, the profile does not",
        ),
        ({"fedl2p": 0.1, "bestfixed": 0.1}, "One good setting is enough here"),
        ({"fedl2p": 0.1, "bestfixed": 0.2}, "It does not pay here: FedL2P is 10.0 points"),
    ],
)
def test_each_verdict(tmp_path: Path, gains: dict[str, float], words: str) -> None:
    found = audit(tmp_path, **gains)
    assert found.sentences()[0].startswith(words)
    assert words in found.markdown()
    assert str(found).startswith(words)


def test_a_loss_without_accuracy(tmp_path: Path) -> None:
    found = audit(tmp_path, loss=True, fedl2p=0.2, bestfixed=0.1)
    assert not found.has_accuracy
    first = found.sentences()[0]
    assert first.startswith("It pays here: FedL2P is by 0.1 (± ")
    assert "in the loss below the best single setting for all" in first
    lines = {line.method: line for line in found.lines}
    assert lines["fedl2p"].score == pytest.approx(0.8)


def test_clients_without_a_result_count_nowhere(tmp_path: Path) -> None:
    folder = run(tmp_path / "0", 0, {"fedl2p": 0.2})
    report = Report.load(folder)
    rows = list(report.rows)
    i = next(i for i, r in enumerate(rows) if (r.method, r.pool) == ("fedl2p", "unseen"))
    values = {**vars(rows[i]), "failure": "fine-tuning diverged", "accuracy": 0.0}
    rows[i] = Row(**values)
    Report(
        recipe="npz", seed=0, engine="in-process", device="cpu", versions={}, seconds={},
        bytes_per_client_round={}, rows=tuple(rows),
    ).save(folder)  # fmt: skip
    lines = {line.method: line for line in verdict([folder]).lines}
    assert lines["fedl2p"].failed == 1
    assert lines["fedl2p"].score == pytest.approx(70.0)
    gap = lines["bestfixed"].difference
    assert gap is not None
    assert gap.mean == pytest.approx(20.0)
    assert lines["bestfixed"].above == 2
    assert "FedL2P (1 clients without a result)" in verdict([folder]).markdown()
