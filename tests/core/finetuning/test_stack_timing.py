"""From how many clients on a stack pays: by seconds, once per machine and model, kept in a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.core.finetuning import stack_timing, stacking
from fedl2p.core.finetuning.stack_timing import NEVER, fewest_clients, from_times
from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.functional.precision import with_compute
from fedl2p.core.settings import Compute
from support.core_nets import ConvNet, settled

X = torch.randn(5, 2, 5, 5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("alone", "few", "many", "size", "fewest"),
    [
        (1.0, 3.5, 10.0, 10, NEVER),  # ten cost what they cost alone
        (1.0, 4.4, 7.9, 10, 6),  # 2.9 + 0.5 C: from 6 on
        (1.0, 2.4, 5.9, 10, 2),  # 0.9 + 0.5 C: from 2 on
        (1.0, 0.5, 0.6, 10, 2),
        (1.0, 5.0, 4.0, 10, 5),  # noise: a longer stack is faster
        (1.0, 3.0, 1.5, 2, 2),
        (1.0, 3.0, 2.5, 2, NEVER),
    ],
)
def test_from_times(alone: float, few: float, many: float, size: int, fewest: int) -> None:
    assert from_times(alone, few, many, size) == fewest


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Count measurements, which say that ten take 5 where three take 4 and one takes 1."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sizes: list[int] = []

    def times(net: FunctionalModel, x: object, size: int) -> tuple[float, float, float]:
        sizes.append(size)
        return 1.0, 4.0, 5.0

    monkeypatch.setattr(stack_timing, "_times", times)
    return sizes


def test_it_is_measured_once_per_kind_of_model_and_inputs(measured: list[int]) -> None:
    first, second = (FunctionalModel(settled(ConvNet(2))) for _ in range(2))
    assert fewest_clients(first, X, 10) == 5  # 3.57 + 0.14 C
    assert fewest_clients(first, X[:1], 10) == fewest_clients(second, X, 10) == 5
    assert len(measured) == 1
    fewest_clients(first, X.repeat(1, 1, 2, 2), 10)
    fewest_clients(first, X, 4)
    fewest_clients(FunctionalModel(settled(ConvNet(2, classes=7))), X, 10)
    assert measured == [10, 10, 4, 10]


@pytest.mark.parametrize("content", ["", "1", "true", "[5]", '"5"', "5.0", "\0", "9" * 5000])
def test_a_damaged_file_is_measured_again(
    measured: list[int], tmp_path: Path, content: str
) -> None:
    assert fewest_clients(FunctionalModel(settled(ConvNet(2))), X, 10) == 5
    (file,) = tmp_path.rglob("*.json")
    file.write_text(content)
    assert fewest_clients(FunctionalModel(settled(ConvNet(2))), X, 10) == 5
    assert len(measured) == 2
    assert file.read_text() == "5\n"


def test_a_folder_that_cannot_be_written_is_said(
    measured: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fewest_clients(FunctionalModel(settled(ConvNet(2))), X, 10) == 5
    assert "set XDG_CACHE_HOME" in caplog.text


def test_clients_are_cut_accordingly(measured: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacking, "fewest_clients", fewest_clients)
    people = [ClientData(Examples(X, torch.arange(5) % 3))] * 14
    model = settled(ConvNet(2))
    by_time = stacking.cut_into_stacks(FunctionalModel(model), people)
    assert [len(s) for s in by_time] == [10, 1, 1, 1, 1]
    always = FunctionalModel(with_compute(model, Compute(stacking="always")))
    assert [len(s) for s in stacking.cut_into_stacks(always, people)] == [10, 4]
    with pytest.raises(ValueError, match="stacking is 'no'"):
        Compute(stacking="no")  # type: ignore[arg-type]


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
