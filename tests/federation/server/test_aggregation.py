"""Aggregation agrees with formulas worked out here, and keeps dtypes and shapes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from fedl2p.federation.server.aggregation import ServerOptimizer, WeightedMean
from fedl2p.federation.settings import Rounds, Strategy
from fedl2p.method import Update
from support.combining import combine
from support.federation_toys import same

STATE = {
    "w": torch.tensor([1.0, -2.0, 0.5]),
    "scalar": torch.tensor(0.25),
    "variance": torch.tensor([0.01]),
    "batches": torch.tensor(10),
    "brain": torch.tensor([1.0], dtype=torch.bfloat16),
}


def reply(client: str, weight: float, shift: float, **more: Tensor) -> Update:
    shared = {k: v + int(shift) if k == "batches" else v + shift for k, v in STATE.items()}
    return Update(client, {**shared, **more}, weight=weight)


def test_fedavg_is_the_weighted_mean_and_keeps_dtypes_and_shapes() -> None:
    state = combine(STATE, [reply("a", 1, 1.0), reply("b", 3, 5.0)])
    assert state is not None
    assert {k: (v.dtype, v.shape) for k, v in state.items()} == {
        k: (v.dtype, v.shape) for k, v in STATE.items()
    }
    torch.testing.assert_close(state["w"], STATE["w"] + 4)
    assert state["batches"] == 14
    assert state["scalar"].item() == pytest.approx(4.25)


def test_integer_means_are_rounded_not_cut() -> None:
    state = combine(STATE, [reply("a", 1, 0.0, batches=torch.tensor(1)), reply("b", 2, 0.0)])
    assert state is not None
    assert state["batches"].item() == 7  # (1 + 2 * 10) / 3
    assert state["batches"].dtype == torch.int64


def test_the_mean_is_a_sum_that_does_not_grow() -> None:
    """In float64, so that the mean of float32 tensors is the nearest float32 to the true one."""
    g = torch.Generator().manual_seed(1)
    tensors = [torch.randn(1000, generator=g) for _ in range(50)]
    mean = WeightedMean({"w": torch.zeros(1000)})
    for i, tensor in enumerate(tensors):
        mean.add(Update(f"c{i}", {"w": tensor}, weight=i + 1.0))
    weights = torch.arange(1, 51, dtype=torch.float64)
    true = (torch.stack(tensors).double() * weights[:, None]).sum(0) / weights.sum()
    made = mean.result()
    assert made is not None
    assert torch.equal(made["w"], true.float())
    assert WeightedMean(STATE).result() is None


def test_fedadam_is_adam_on_the_mean_difference() -> None:
    rate, b1, b2, tau = 0.05, 0.9, 0.99, 1e-8
    rounds = Rounds(
        strategy="fedadam", server_rate=rate, server_beta1=b1, server_beta2=b2, server_tau=tau
    )
    optimizer = ServerOptimizer(rounds)
    state = dict(STATE)
    w, m, v = STATE["w"].double(), torch.zeros(3).double(), torch.zeros(3).double()
    for t, shift in enumerate([0.3, -0.1, 0.7], start=1):
        moved = [
            Update(name, {**state, "w": state["w"] + shift * scale}, weight=1.0)
            for name, scale in (("a", 1.0), ("b", 3.0))
        ]
        gradient = torch.full((3,), 2 * shift).double()
        m = b1 * m + (1 - b1) * gradient
        v = b2 * v + (1 - b2) * gradient**2
        corrected = rate * (1 - b2**t) ** 0.5 / (1 - b1**t)
        w = w + corrected * m / (v.sqrt() + tau)
        combined = combine(state, moved, rounds, optimizer=optimizer)
        assert combined is not None
        state = combined
        torch.testing.assert_close(state["w"].double(), w, rtol=1e-5, atol=1e-6)
        assert state["w"].dtype == torch.float32
    # The first step of Adam is the rate, whatever the gradient's size.
    first = combine(STATE, [Update("a", {**STATE, "w": STATE["w"] + 9}, weight=1)], rounds)
    assert first is not None
    torch.testing.assert_close(first["w"], STATE["w"] + rate)


def test_a_cosine_schedule_scales_adams_steps() -> None:
    """Against torch's Adam and its cosine schedule."""
    total, rate, tau = 4, 0.1, 1e-8
    rounds = Rounds(
        rounds=total,
        strategy="fedadam",
        server_rate=rate,
        server_schedule="cosine",
        server_tau=tau,
    )
    optimizer, state = ServerOptimizer(rounds), dict(STATE)
    w = STATE["w"].double().clone().requires_grad_()
    adam = torch.optim.Adam([w], lr=rate, betas=(0.9, 0.99), eps=tau)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=total)
    for shift in (0.3, -0.1, 0.7, 0.2):
        w.grad = torch.full_like(w, -shift)
        adam.step()
        schedule.step()
        moved = {**state, "w": state["w"] + shift}
        combined = combine(state, [Update("a", moved, weight=1)], rounds, optimizer=optimizer)
        assert combined is not None
        state = combined
        torch.testing.assert_close(state["w"].double(), w.detach(), rtol=1e-5, atol=1e-6)
    again = ServerOptimizer(rounds)
    again.memory = dict(optimizer.memory)
    one = [Update("a", {**state, "w": state["w"] + 1.0}, weight=1)]
    after = combine(state, one, rounds, optimizer=again)
    assert after is not None
    torch.testing.assert_close(after["w"], state["w"])  # the schedule has come to its end


@pytest.mark.parametrize(
    ("strategy", "optimizer"),
    [
        ("fedavgm", lambda w: torch.optim.SGD([w], lr=0.7, momentum=0.9)),
        ("fedadagrad", lambda w: torch.optim.Adagrad([w], lr=0.7, eps=1e-3)),
        ("fedadam", lambda w: torch.optim.Adam([w], lr=0.7, betas=(0.9, 0.99), eps=1e-3)),
    ],
)
def test_server_optimizers_are_torchs_on_the_mean_update(strategy: str, optimizer: Any) -> None:
    rounds = Rounds(strategy=strategy, server_rate=0.7)  # type: ignore[arg-type]
    ours, state = ServerOptimizer(rounds), {"w": STATE["w"].clone()}
    w = STATE["w"].clone().requires_grad_()
    theirs = optimizer(w)
    for shift in (0.3, -0.1, 0.7, 0.2):
        mean = {"w": state["w"] + shift}
        w.grad = (w - mean["w"]).detach()
        theirs.step()
        state = ours.step(state, mean)
        assert torch.equal(state["w"], w.detach())


def test_momentum_of_nothing_is_fedavg() -> None:
    updates = [reply("a", 1, 1.0), reply("b", 3, 5.0)]
    rounds = Rounds(strategy="fedavgm", server_rate=1.0, server_beta1=0.0)
    one, two = combine(STATE, updates, rounds), combine(STATE, updates)
    assert one is not None
    assert two is not None
    for name in STATE:
        torch.testing.assert_close(one[name], two[name])


@pytest.mark.slow
def test_no_step_imports_torchs_compiler() -> None:
    """Two seconds of every process, of each worker too."""
    code = """
import sys, torch
from fedl2p.federation.server.aggregation import ServerOptimizer
from fedl2p.federation.settings import Rounds
for strategy in ("fedavgm", "fedadagrad", "fedadam"):
    optimizer = ServerOptimizer(Rounds(strategy=strategy))
    optimizer.step({"w": torch.zeros(2)}, {"w": torch.ones(2)})
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("strategy", ["fedadam", "fedadagrad"])
def test_a_server_optimizer_averages_buffers_and_integers(strategy: str) -> None:
    rounds = Rounds(strategy=strategy, server_rate=1.0)  # type: ignore[arg-type]
    replies = [reply("a", 1, 0.0, variance=torch.tensor([0.001]), batches=torch.tensor(20))]
    state = combine(STATE, replies, rounds, buffers=["variance"])
    assert state is not None
    torch.testing.assert_close(state["variance"], torch.tensor([0.001]))
    assert state["batches"] == 20
    stepped = combine(STATE, replies, rounds)
    assert stepped is not None
    assert stepped["variance"] < 0


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_a_restored_optimizer_goes_on_bit_for_bit(strategy: str) -> None:
    rounds = Rounds(strategy=strategy)  # type: ignore[arg-type]
    a, b = ServerOptimizer(rounds), ServerOptimizer(rounds)
    state = dict(STATE)
    for step in range(3):
        updates = [reply("a", 1, 0.1 * step), reply("b", 2, -0.3)]
        combined = combine(state, updates, rounds, optimizer=a)
        assert combined is not None
        state = combined
    b.memory = {k: v.clone() for k, v in a.memory.items()}
    last = [reply("a", 1, 0.77), reply("b", 5, 0.1)]
    one, two = (combine(state, last, rounds, optimizer=o) for o in (a, b))
    assert one is not None
    assert two is not None
    assert same(one, two)
    assert same(a.memory, b.memory)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rounds", -1),
        ("patience", -1),
        ("clients_per_round", -2),
        ("min_clients", 0),
        ("give_up", 0),
        ("server_rate", 0.0),
        ("server_rate", float("nan")),
        ("server_tau", -1e-8),
        ("server_beta1", 1.0),
        ("server_beta2", -0.1),
        ("trim", 0.5),
        ("clip_norm", -1.0),
        ("robust", "magic"),
        ("keep", "first"),
        ("strategy", "magic"),
        ("server_schedule", "linear"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value!r}, but must be"):
        Rounds(**{field: value})  # type: ignore[arg-type]
