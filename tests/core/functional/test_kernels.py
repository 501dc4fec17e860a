"""Choices of kernels: who needs them, how long they hold."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.backends import cudnn

from fedl2p.core.functional.kernels import without_cudnn
from fedl2p.core.functional.model import FunctionalModel


class Last(nn.Module):
    """Classifies by the last output of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("more", [{}, {"num_layers": 2, "bidirectional": False}])
def test_recurrent_layers_are_found(layer: type[nn.Module], more: dict[str, int]) -> None:
    net = FunctionalModel(Last(layer(2, 3, batch_first=True, **more)))
    assert net.examine(torch.randn(4, 5, 2)).recurrent


def test_relu_as_nonlinearity_is_found_and_a_cell_is_none_of_cudnns() -> None:
    relu = FunctionalModel(Last(nn.RNN(2, 3, batch_first=True, nonlinearity="relu")))
    assert relu.examine(torch.randn(4, 5, 2)).recurrent

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.GRUCell(2, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cell(x))

    assert not FunctionalModel(Cell()).examine(torch.randn(4, 2)).recurrent


@pytest.mark.parametrize("before", [True, False])
def test_cudnn_is_as_before_when_the_last_thread_is_through(
    before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cudnn, "enabled", before)
    inside, leave = threading.Event(), threading.Event()
    seen: list[bool] = []

    def longer() -> None:
        with without_cudnn():
            inside.set()
            leave.wait(10)
            seen.append(cudnn.enabled)

    thread = threading.Thread(target=longer)
    with without_cudnn():
        thread.start()
        assert inside.wait(10)
        with without_cudnn():
            assert not cudnn.enabled
    assert not cudnn.enabled  # the other thread is inside still
    leave.set()
    thread.join()
    assert seen == [False]
    assert cudnn.enabled is before


def test_cudnn_is_as_before_after_an_error() -> None:
    before = cudnn.enabled
    with pytest.raises(RuntimeError, match="of ours"), without_cudnn():
        raise RuntimeError("of ours")
    assert cudnn.enabled is before
