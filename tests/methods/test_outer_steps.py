"""The outer steps of the meta-nets are those of torch's optimizers."""

from __future__ import annotations

import subprocess
import sys
from typing import Literal

import pytest
import torch

from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.metanets import MetaNets
from fedl2p.core.settings import InnerLoop
from fedl2p.methods.base.settings import MetaLearning
from fedl2p.methods.fedl2p import MetaLearner
from support.core_nets import mlp


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("rate", [None, 0.05])
def test_outer_steps_are_those_of_torch(
    optimizer: Literal["sgd", "adam"], rate: float | None
) -> None:
    net = FunctionalModel(mlp())
    meta = MetaLearning(rate=0.01, base_rate=0.002)
    learner = MetaLearner(
        net, MetaNets(net.sites), meta, InnerLoop(), optimizer=optimizer, rate=rate
    )
    rng = torch.Generator().manual_seed(0)
    start = {name: torch.randn(2, 3, 4, generator=rng) for name in ("mix.0.weight", "base", "last")}
    ours = {k: v.clone().requires_grad_() for k, v in start.items()}
    theirs = {k: v.clone().requires_grad_() for k, v in start.items()}
    groups = [
        {"params": [v], "lr": rate or (meta.base_rate if k == "base" else meta.rate)}
        for k, v in theirs.items()
    ]
    torchs: torch.optim.Optimizer = (
        torch.optim.SGD(groups)
        if optimizer == "sgd"
        else torch.optim.Adam(groups, betas=(0.9, 0.99))
    )
    take_step = learner._outer_steps(ours)
    for _ in range(4):
        grads = [torch.randn(2, 3, 4, generator=rng) for _ in start]
        take_step(grads)
        for v, grad in zip(theirs.values(), grads, strict=True):
            v.grad = grad
        torchs.step()
        for name in start:
            assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.slow
def test_learning_does_not_import_torchs_compiler() -> None:
    """Two seconds of every process, of each worker too."""
    code = """
import sys, torch
from torch import nn
from fedl2p import ClientData, Rounds, learn, personalize
model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
data = lambda: (torch.randn(8, 4), torch.arange(8) % 2)
clients = {str(i): ClientData(data(), data()) for i in range(3)}
learned = learn(model, clients, rounds=Rounds(rounds=1, clients_per_round=3))
personalize(model, learned, data())
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
