"""Short ways to the same numbers: one model judged by many, a mix of 0 or 1 for a client alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedl2p.core.clientdata import Examples
from fedl2p.core.finetuning.batches import StackBatch
from fedl2p.core.finetuning.evaluation import evaluate
from fedl2p.core.finetuning.in_place_sgd import InPlaceSGD, batch_gradient, sgd
from fedl2p.core.finetuning.inner_loop import all_finite
from fedl2p.core.functional.model import FunctionalModel, ModelState
from fedl2p.core.functional.named_tensors import norms_within
from fedl2p.core.functional.workspace import pure_mixes
from support.core_nets import ConvNet, examples, settled

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


class Counting(nn.Module):
    """Adds what a buffer holds, which it writes in evaluation too, from its own inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.copy_(x.mean(0))
        return self.head(self.norm(x) + self.seen)


def repeated(state: ModelState) -> ModelState:
    """The same values, with memory of their own for every client."""
    return ModelState(
        {k: v.clone() for k, v in state.params.items()},
        {k: v.clone() for k, v in state.stats.items()},
    )


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_one_model_is_judged_as_every_client_s_own(mix: float) -> None:
    net = FunctionalModel(settled(ConvNet(2)))
    sizes = (7, 7, 4, 7, 0)
    parts = [Examples(*examples(n, 2, 5, 5, seed=i, classes=3)) for i, n in enumerate(sizes)]
    start = net.start(len(sizes), "global")
    mixes = torch.full((len(sizes), len(net.sites.norms)), mix, dtype=torch.float64)
    shared = evaluate(net, start, mixes, parts, examples_per_pass=4)
    own = evaluate(net, repeated(start), mixes, parts)
    torch.testing.assert_close(torch.tensor(shared), torch.tensor(own), equal_nan=True, **CLOSE)


def test_a_model_that_writes_its_buffers_writes_each_client_s() -> None:
    model = settled(Counting())
    net = FunctionalModel(model)
    parts = [
        Examples(torch.randn(5, 3, dtype=torch.float64) + i, torch.arange(5) % 2) for i in range(3)
    ]
    mixes = torch.zeros(3, 1, dtype=torch.float64)
    together = evaluate(net, net.start(3, "global"), mixes, parts)
    for part, score in zip(parts, together, strict=True):
        with torch.no_grad():
            loss = nn.functional.cross_entropy(model.eval()(part.x), part.y)
        assert score[0] == pytest.approx(float(loss), rel=1e-10)


class Centring(nn.Module):
    """Centres its outputs over the batch, in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.norm(x))
        return y - y.mean(0)


def test_a_model_that_mixes_examples_sees_one_client_s_at_a_time() -> None:
    model = settled(Centring())
    net = FunctionalModel(model)
    parts = [
        Examples(torch.randn(5, 3, dtype=torch.float64) + i, torch.arange(5) % 2) for i in range(3)
    ]
    assert not net.examine(parts[0].x).rowwise
    mixes = torch.zeros(3, 1, dtype=torch.float64)
    for part, score in zip(parts, evaluate(net, net.start(3, "global"), mixes, parts), strict=True):
        with torch.no_grad():
            loss = nn.functional.cross_entropy(model.eval()(part.x), part.y)
        assert score[0] == pytest.approx(float(loss), rel=1e-10)


@pytest.mark.parametrize("mixes", [(1.0, 1.0), (0.0, 0.0), (1.0, 0.0), (1.0, 0.4)])
def test_a_stack_that_knows_its_mixes_steps_as_one_that_does_not(
    mixes: tuple[float, float],
) -> None:
    net = FunctionalModel(settled(ConvNet(2)))
    x, y = examples(12, 2, 5, 5, seed=3, classes=3)
    batch = StackBatch(x.view(3, 4, 2, 5, 5), y.view(3, 4))
    mix = torch.tensor([mixes] * 3, dtype=torch.float64)
    rate = torch.full((3, len(net.sites.params)), 0.1, dtype=torch.float64)
    assert pure_mixes(mix) == [m if m in (0, 1) else None for m in mixes]
    states = []
    for known in (True, False):
        with InPlaceSGD(net, net.start(3, "corrected"), mix, rate) as steps:
            if not known:
                steps._pure = None
            for _ in range(2):
                steps.step(batch)
        states.append(steps.state)
    for a, b in zip(*(s.params.values() for s in states), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    for a, b in zip(*(s.stats.values() for s in states), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_clients_whose_mixes_differ_are_not_taken_for_one() -> None:
    mix = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 0.5]])
    assert pure_mixes(mix) == [None, 0.0, None]


@pytest.mark.parametrize("dim", [(5, 5), ()])
@pytest.mark.parametrize("mixes", [(1.0, 1.0), (0.0, 0.0), (0.0, 1.0), (1.0, 0.4)])
@pytest.mark.parametrize("statistics", ["corrected", "published", "global"])
def test_a_mix_of_0_or_1_equals_the_mixed_norm(
    dim: tuple[int, ...], mixes: tuple[float, float], statistics: str
) -> None:
    if dim:
        model: nn.Module = ConvNet(2)
        x, y = examples(6, 2, *dim, classes=3)
    else:
        layers = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.BatchNorm1d(5, affine=False)
        model = nn.Sequential(*layers, nn.Linear(5, 3))
        x, y = examples(6, 4, classes=3)
    net = FunctionalModel(settled(model))
    mix = torch.tensor([mixes[: len(net.sites.norms)]], dtype=torch.float64)
    rate = torch.full((1, len(net.sites.params)), 0.1, dtype=torch.float64)
    start = net.start(1, statistics)
    before = {k: v.clone() for k, v in start.stats.items()}
    batches = [(x[None, ::2], y[None, ::2]), (x[None], y[None]), (x[None, :1], y[None, :1])]
    with InPlaceSGD(net, start, mix, rate) as steps:
        for batch in batches:
            steps.step(StackBatch(*batch))
    wanted = sgd(start, rate, batch_gradient(net, mix, batches), range(len(batches)))
    for name, tensor in (wanted.params | wanted.stats).items():
        torch.testing.assert_close((steps.state.params | steps.state.stats)[name], tensor, **CLOSE)
    for name, tensor in before.items():  # what the caller gave stays
        assert torch.equal(start.stats[name], tensor)


def test_a_finite_number_whose_square_overflows_is_finite() -> None:
    large = torch.tensor([[1e30, 1.0], [1.0, 1.0]])
    half = torch.full((2, 3), 6e4, dtype=torch.float16)
    assert all_finite(ModelState({"a": large, "b": half}, {})).tolist() == [True, True]
    large[1, 0] = float("inf")
    assert all_finite(ModelState({"a": large, "b": half}, {})).tolist() == [True, False]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64])
def test_norms_within_a_limit_have_no_larger_entry(bad: float, dtype: torch.dtype) -> None:
    tensors = [torch.ones(4, dtype=dtype), torch.zeros(0), torch.ones(2, dtype=torch.int64)]
    tensors.append(torch.zeros(()))
    assert norms_within(tensors, 2.0)  # the first has a norm of 2
    tensors[0][2] = bad
    assert not norms_within(tensors, 2.0)
    assert norms_within([], 0.0)


@pytest.mark.parametrize("where", ["params", "stats"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_who_is_not_finite_is_found(where: str, bad: float) -> None:
    state = ModelState({"a": torch.ones(3, 2), "b": torch.ones(3)}, {"c": torch.ones(3, 1)})
    assert all_finite(state).tolist() == [True, True, True]
    tensors = state.params["b"] if where == "params" else state.stats["c"]
    tensors[1] = bad
    assert all_finite(state).tolist() == [True, False, True]
    complex_state = ModelState({"a": torch.ones(2, 2, dtype=torch.complex64)}, {})
    complex_state.params["a"][0, 1] = complex(1, bad)
    assert all_finite(complex_state).tolist() == [False, True]
