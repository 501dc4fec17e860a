"""Every loss and form of inputs: exact hypergradients, and stacks that equal clients alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedl2p.core import trees
from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.core.finetuning.batches import StackBatch
from fedl2p.core.finetuning.evaluation import evaluate
from fedl2p.core.finetuning.inner_loop import inner_batches, run_inner_loop
from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.hypergradients.estimators import stack_hypergradient
from fedl2p.core.hypergradients.problem import Hypergradient, Problem
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.objective import Objective
from fedl2p.core.settings import MODES, HypergradientConfig, InnerLoop, Mode
from support.core_nets import settled

INNER = InnerLoop(epochs=2, batch_size=3)


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = (
            nn.Conv2d(1, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.Conv2d(3, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.norm(self.a(x))))


class Tokens(nn.Module):
    """Named inputs, logits with the classes last in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(7, 4), nn.BatchNorm1d(5), nn.Linear(4, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(torch.tanh(self.norm(self.embed(ids) * mask[..., None])))}


class Pair(nn.Module):
    """Two inputs by position, two outputs."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 5), nn.Linear(2, 5), nn.BatchNorm1d(5)
        self.head, self.spread = nn.Linear(5, outputs), nn.Linear(5, outputs)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.norm(self.a(x) + self.b(z)))
        return self.head(h), self.spread(h)


def likelihood(outputs: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    """Return a normal distribution's negative log-likelihood, which may be negative."""
    mean, log_sd = outputs
    return (log_sd + 0.5 * ((y - mean) / log_sd.exp()).square()).mean(1)


@dataclass(frozen=True)
class Task:
    build: Callable[[], nn.Module]
    objective: Objective
    inputs: Callable[[int, torch.Generator], Any]
    targets: Callable[[int, torch.Generator], Tensor]


def floats(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda n, g: torch.randn(n, *shape, generator=g, dtype=torch.float64)


def labels(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda n, g: torch.randint(3, (n, *shape), generator=g)


def some_ignored(n: int, g: torch.Generator) -> Tensor:
    y = torch.randint(-1, 3, (n, 5), generator=g)
    y[0] = -1  # an example that does not count at all
    return y


def words(n: int, g: torch.Generator) -> dict[str, Tensor]:
    return {"ids": torch.randint(7, (n, 5), generator=g), "mask": floats(5)(n, g)}


def two(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return floats(4)(n, g), floats(2)(n, g)


TASKS = {
    "pixels": Task(Pixels, Objective(), floats(1, 3, 2), labels(3, 2)),
    "tokens by name, some ignored": Task(Tokens, Objective(ignore_index=-1), words, some_ignored),
    "bce": Task(
        lambda: Pair(3),
        Objective(loss="bce"),
        two,
        lambda n, g: torch.rand(n, 3, generator=g, dtype=torch.float64),
    ),
    "mse": Task(lambda: Pair(2), Objective(loss="mse"), two, floats(2)),
    "likelihood of two outputs": Task(
        lambda: Pair(2), Objective(loss=likelihood, outputs=lambda o: o), two, floats(2)
    ),
}


@pytest.fixture(params=TASKS.values(), ids=TASKS.keys())
def task(request: pytest.FixtureRequest) -> Task:
    return request.param


def net_of(task: Task) -> FunctionalModel:
    torch.manual_seed(3)
    return FunctionalModel(settled(task.build()), task.objective)


def examples(task: Task, count: int, seed: int) -> Examples:
    g = torch.Generator().manual_seed(seed)
    return Examples(task.inputs(count, g), task.targets(count, g))


def hyperparams(net: FunctionalModel, clients: int) -> Hyperparams:
    g = torch.Generator().manual_seed(1)
    mix = torch.rand(clients, len(net.sites.norms), generator=g, dtype=torch.float64)
    rate = 0.1 * torch.rand(clients, len(net.sites.params), generator=g, dtype=torch.float64)
    return Hyperparams(mix, rate, net.sites)


def solved(
    net: FunctionalModel, task: Task, h: Hyperparams, seeds: list[int], mode: Mode = "unrolled"
) -> Hypergradient:
    data = [ClientData(examples(task, 7, s), examples(task, 5, 50 + s)) for s in seeds]
    validation = [d.validation for d in data if d.validation is not None]
    problem = Problem(
        net=net,
        mix=h.mix,
        rate=h.rate,
        batches=inner_batches(net, data, seeds, INNER),
        validation=[
            StackBatch(
                trees.stack([v.x for v in validation]), trees.stack([v.y for v in validation])
            )
        ],
    )
    return stack_hypergradient(problem, HypergradientConfig(mode=mode))


def test_unrolled_equals_finite_differences(task: Task) -> None:
    net = net_of(task)
    h = hyperparams(net, 1)
    got = solved(net, task, h, [0])

    def loss(mix: Tensor, rate: Tensor) -> float:
        return float(solved(net, task, Hyperparams(mix, rate, net.sites), [0]).loss)

    g = torch.Generator().manual_seed(2)
    along_mix = torch.randn(h.mix.shape, generator=g, dtype=torch.float64)
    along_rate = torch.randn(h.rate.shape, generator=g, dtype=torch.float64)
    e = 1e-6
    by_mix = (loss(h.mix + e * along_mix, h.rate) - loss(h.mix - e * along_mix, h.rate)) / (2 * e)
    by_rate = (loss(h.mix, h.rate + e * along_rate) - loss(h.mix, h.rate - e * along_rate)) / (
        2 * e
    )
    assert float((got.mix * along_mix).sum()) == pytest.approx(by_mix, rel=1e-6, abs=1e-9)
    assert float((got.rate * along_rate).sum()) == pytest.approx(by_rate, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_a_stack_equals_its_clients_alone(task: Task, mode: Mode) -> None:
    net = net_of(task)
    h = hyperparams(net, 3)
    seeds = [0, 1, 2]
    together = solved(net, task, h, seeds, mode)
    for i in seeds:
        alone = solved(net, task, Hyperparams(h.mix[[i]], h.rate[[i]], net.sites), [i], mode)
        torch.testing.assert_close(together.mix[[i]], alone.mix, rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(together.rate[[i]], alone.rate, rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(together.loss[[i]], alone.loss)
        torch.testing.assert_close(together.accuracy[[i]], alone.accuracy, equal_nan=True)


def test_training_and_evaluation_of_a_stack_equal_those_alone(task: Task) -> None:
    net = net_of(task)
    h = hyperparams(net, 3)
    data = [ClientData(examples(task, n, n)) for n in (4, 7, 9)]  # unequally many examples
    batches = inner_batches(net, data, [0, 1, 2], INNER)
    state = run_inner_loop(net, h, batches, statistics="corrected")
    tests = [examples(task, n, 90 + n) for n in (5, 6, 6)]
    scores = evaluate(net, state, h.mix, tests, examples_per_pass=4)
    for i in range(3):
        one = Hyperparams(h.mix[[i]], h.rate[[i]], net.sites)
        alone = run_inner_loop(
            net, one, inner_batches(net, data[i : i + 1], [i], INNER), statistics="corrected"
        )
        for name, value in alone.params.items():
            torch.testing.assert_close(state.params[name][[i]], value, rtol=1e-8, atol=1e-11)
        (score,) = evaluate(net, alone, one.mix, tests[i : i + 1])
        assert score == pytest.approx(scores[i], rel=1e-7, nan_ok=True)
