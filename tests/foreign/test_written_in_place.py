"""What a model, a loss or a metric changes in place is its own copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fedl2p
from fedl2p import ClientData, Hyperparams, InnerLoop, Rounds, Settings, find_sites
from foreign.nets.case import seeded
from foreign.nets.structure import Base

SETTINGS = Settings(finetune=InnerLoop(epochs=1, batch_size=4))


class InPlace(Base):
    """Standardises its input in place, as users write it."""

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.1
        x *= 2
        return super().forward(torch.relu_(x))


class Copying(Base):
    """Computes the same without writing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.relu((x - 0.1) * 2))


def data(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 5, generator=generator, dtype=torch.float64), torch.arange(n) % 3


def in_place_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    targets[targets == 2] = 0
    outputs *= 2
    return F.cross_entropy(outputs, targets, reduction="none")


def copying_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs * 2, targets.where(targets != 2, 0), reduction="none")


def profiled(model: nn.Module, loss: Any, *parts: Any) -> Any:
    return fedl2p.profile(model, [parts[0]]).moments


def finetuned(model: nn.Module, loss: Any, *parts: Any) -> Any:
    hyper = Hyperparams.constant(find_sites(model), mix=0.5, rate=0.05)
    return fedl2p.finetune(model, hyper, parts[0], epochs=2, batch_size=9, loss=loss).state_dict()


def hypergradients(model: nn.Module, loss: Any, *parts: Any) -> Any:
    hyper = Hyperparams.constant(find_sites(model), mix=0.5, rate=0.05)
    answer = fedl2p.hypergradient(model, hyper, [parts[0]] * 3, parts[1], loss=loss)
    return torch.tensor(list(answer["rate"].values()))


def learned(model: nn.Module, loss: Any, *parts: Any) -> Any:
    clients = {f"c{i}": ClientData(*parts) for i in range(3)}
    rounds = Rounds(rounds=1)
    return fedl2p.learn(model, clients, rounds=rounds, settings=SETTINGS, loss=loss).state_dict()


CALLS = [profiled, finetuned, hypergradients, learned]


@pytest.mark.parametrize("call", CALLS)
def test_a_model_that_writes_its_inputs(call: Callable[..., Any]) -> None:
    parts = data(9), data(6)
    mine = call(seeded(InPlace)(), "cross-entropy", *parts)
    for (x, y), n in zip(parts, (9, 6), strict=True):
        assert torch.equal(x, data(n)[0])
        assert torch.equal(y, data(n)[1])
    torch.testing.assert_close(mine, call(seeded(Copying)(), "cross-entropy", *parts))


@pytest.mark.parametrize("call", CALLS[1:])
def test_a_loss_that_writes_what_it_gets(call: Callable[..., Any]) -> None:
    parts = data(9), data(6)
    mine = call(seeded(Base)(), in_place_loss, *parts)
    for (_, y), n in zip(parts, (9, 6), strict=True):
        assert torch.equal(y, data(n)[1])
    torch.testing.assert_close(mine, call(seeded(Base)(), copying_loss, *parts))


class Bounded(Base):
    """Holds its weights within bounds."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.a.weight.clamp_(-0.2, 0.2)
        return super().forward(x)


@pytest.mark.parametrize("call", CALLS)
def test_a_model_that_bounds_its_weights_leaves_the_global_ones(call: Callable[..., Any]) -> None:
    model, parts = seeded(Bounded)(), (data(9), data(6))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    once = call(model, "cross-entropy", *parts)
    torch.testing.assert_close(once, call(model, "cross-entropy", *parts), rtol=0, atol=0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


class ExtraState(Base):
    """Keeps something that is no tensor in its state_dict."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 3}


def old_weight_norm() -> nn.Module:
    net = Base()
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(net.a)
    return net


@pytest.mark.parametrize("build", [ExtraState, old_weight_norm])
@pytest.mark.parametrize("method", ["fedl2p", "fedavg", "ditto"])
def test_extra_state_and_tensors_left_by_a_forward_do_not_stop_rounds(
    build: Callable[[], nn.Module], method: str
) -> None:
    from fedl2p.data.pools.in_memory import InMemory
    from fedl2p.federation.rounds import federate
    from fedl2p.methods import build as build_method

    model = seeded(build)()
    population = InMemory({f"c{i}": ClientData(data(9), data(6)) for i in range(3)})
    learner = build_method(method, SETTINGS)
    done = federate(
        learner,
        model,
        population,
        rounds=Rounds(rounds=1),
        seed=0,
        stage=method,
    )
    assert done.state
    assert all(isinstance(v, Tensor) for v in done.state.values())
