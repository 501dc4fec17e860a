"""Clients and rounds that the tests of the baselines share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import nn

from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.core.settings import InnerLoop
from fedl2p.core.working_copies import working_copies
from fedl2p.method import Client, State, Update
from fedl2p.methods import build, names
from fedl2p.methods.base.local_sgd import LocalSGD
from fedl2p.methods.base.personalizing import model_with_state
from fedl2p.methods.base.settings import Baselines, LocalTraining, Settings
from fedl2p.methods.base.tensor_groups import client_tensors, tensor_names

NAMES = tuple(n for n in names() if isinstance(build(n, Settings()), LocalSGD) and n != "fedavg")
SETTINGS = Settings(
    finetune=InnerLoop(epochs=2, batch_size=8),
    local=LocalTraining(epochs=2, batch_size=8, rate=0.05),
)


def settings(**changes: float) -> Settings:
    return dataclasses.replace(SETTINGS, baselines=Baselines(**changes))


def method(name: str, **changes: float) -> LocalSGD:
    built = build(name, settings(**changes))
    assert isinstance(built, LocalSGD)
    return built


def make_client(i: int, kept: State | None = None, round: int = 1) -> Client:
    generator = torch.Generator().manual_seed(i)

    def part(count: int) -> Examples:
        x = torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64) + 0.3 * i
        return Examples(x, torch.randint(0, 10, (count,), generator=generator))

    data = ClientData(part(20), part(9), part(11))
    return Client(f"client-{i}", data, kept=kept or {}, seed=100 * round + i, round=round)


CLIENTS = [make_client(i) for i in range(3)]
STRANGER = make_client(7)


def average(updates: list[Update]) -> State:
    return {k: sum(u.shared[k] for u in updates) / len(updates) for k in updates[0].shared}


def after_a_round(chosen: LocalSGD, model: nn.Module) -> tuple[State, list[Client]]:
    """The averaged state, and the clients with what they kept, in the next round."""
    updates = chosen.train(model, chosen.start(model), CLIENTS)
    return average(updates), [make_client(i, kept=u.kept, round=2) for i, u in enumerate(updates)]


def adapted(chosen: LocalSGD, model: nn.Module, state: State, clients: list[Client]) -> list[State]:
    """All tensors of the clients' personal models."""
    net = working_copies(model_with_state(model, state)).net
    made = chosen.personalize_stack(net, state, clients)
    return [client_tensors(net, made.state, j, tensor_names(net)) for j in range(len(clients))]


def assert_same(a: State, b: State) -> None:
    """Every tensor of a is bit for bit that of b."""
    assert a
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def moved(a: State, b: State) -> set[str]:
    return {name for name in a if not torch.equal(a[name], b[name])}


def norm_tensors(model: nn.Module) -> set[str]:
    return {
        f"{name}.{tensor}"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for tensor in ("weight", "bias", "running_mean", "running_var")
    }


HEAD = {"head.weight", "head.bias"}


def without_norms(shape: Sequence[int], classes: int) -> nn.Module:
    """Return a model without batch-norm, for a study."""
    inputs = math.prod(shape)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, classes))
