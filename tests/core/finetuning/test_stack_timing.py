"""Whether stacks pay: by seconds, once per machine and model, kept in a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.core.finetuning import stack_timing, stacking
from fedl2p.core.finetuning.stack_timing import stacks_pay
from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.functional.precision import with_compute
from fedl2p.core.settings import Compute
from support.core_nets import ConvNet, settled

X = torch.randn(5, 2, 5, 5, dtype=torch.float64)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Count measurements, which say that ten take 11 where one takes 1, and four 3."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sizes: list[int] = []

    def times(net: FunctionalModel, x: object, size: int) -> tuple[float, float]:
        sizes.append(size)
        return 1.0, 11.0 if size == 10 else 3.0

    monkeypatch.setattr(stack_timing, "_times", times)
    return sizes


def test_it_is_measured_once_per_kind_of_model_and_inputs(measured: list[int]) -> None:
    first, second = (FunctionalModel(settled(ConvNet(2))) for _ in range(2))
    assert not stacks_pay(first, X, 10)
    assert not stacks_pay(first, X[:1], 10)
    assert not stacks_pay(second, X, 10)
    assert len(measured) == 1
    stacks_pay(first, X.repeat(1, 1, 2, 2), 10)
    assert stacks_pay(first, X, 4)
    stacks_pay(FunctionalModel(settled(ConvNet(2, classes=7))), X, 10)
    assert measured == [10, 10, 4, 10]


@pytest.mark.parametrize("content", ["", "1", "0", "[true]", '"true"', "True", "\0", "9" * 5000])
def test_a_damaged_file_is_measured_again(
    measured: list[int], tmp_path: Path, content: str
) -> None:
    assert not stacks_pay(FunctionalModel(settled(ConvNet(2))), X, 10)
    (file,) = tmp_path.rglob("*.json")
    file.write_text(content)
    assert not stacks_pay(FunctionalModel(settled(ConvNet(2))), X, 10)
    assert len(measured) == 2
    assert file.read_text() == "false\n"


def test_a_folder_that_cannot_be_written_is_said(
    measured: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not stacks_pay(FunctionalModel(settled(ConvNet(2))), X, 10)
    assert "set XDG_CACHE_HOME" in caplog.text


def test_clients_are_cut_accordingly(measured: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacking, "stacks_pay", stacks_pay)
    people = [ClientData(Examples(X, torch.arange(5) % 3))] * 14
    model = settled(ConvNet(2))
    by_time = stacking.cut_into_stacks(FunctionalModel(model), people)
    assert [len(s) for s in by_time] == [1] * 14
    always = FunctionalModel(with_compute(model, Compute(stacking="always")))
    assert [len(s) for s in stacking.cut_into_stacks(always, people)] == [10, 4]
    with pytest.raises(ValueError, match="stacking is 'no'"):
        Compute(stacking="no")


def test_real_times_are_taken_and_leave_nothing_changed() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    net = FunctionalModel(model.double())
    net.examine(X)
    threads, before = torch.get_num_threads(), torch.get_rng_state()
    start = {k: v.clone() for k, v in net.start(1, "global").params.items()}
    times = stack_timing._times(net, X, 4)
    assert all(0 < t < 10 for t in times)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, start[k]) for k, v in net.start(1, "global").params.items())
