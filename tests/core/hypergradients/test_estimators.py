"""Every hypergradient mode against exact ones, and exact ones against finite differences."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fedl2p.core.clientdata import Examples
from fedl2p.core.finetuning.batches import EpochBatches
from fedl2p.core.finetuning.inner_loop import run_inner_loop
from fedl2p.core.functional import model as net_module
from fedl2p.core.functional.model import FunctionalModel, ModelState
from fedl2p.core.functional.named_tensors import conjugate_gradients
from fedl2p.core.hypergradients import problem as problems
from fedl2p.core.hypergradients import unrolled as unrolling
from fedl2p.core.hypergradients.estimators import hypergradient
from fedl2p.core.hypergradients.problem import Hypergradient
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.settings import MODES, HypergradientConfig, Mode, Statistics
from fedl2p.core.sites import find_sites
from support.core_nets import (
    ConvNet,
    SharedNorm,
    TiedWeights,
    cross_entropy,
    cut,
    examples,
    hypergradient_of,
    mlp,
    settled,
)
from support.nets import nested_net

Pair = tuple[Tensor, Tensor]


class Problem:
    """One client's bilevel problem: C = 1, K batches, validation, uneven hyperparameters."""

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        *,
        steps: int,
        statistics: Statistics = "corrected",
        classes: int = 3,
        size: int = 4,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.net = FunctionalModel(model)
        self.statistics = statistics
        drawn = examples(size * steps, *shape, seed=seed, classes=classes)
        self.batches = cut(drawn, size) if steps else []
        x, y = examples(9, *shape, seed=seed + 100, classes=classes)
        self.validation = (x[None], y[None])
        generator = torch.Generator().manual_seed(seed)
        norms, params = len(self.net.sites.norms), len(self.net.sites.params)
        mix = 0.2 + 0.6 * torch.rand(1, norms, generator=generator, dtype=torch.float64)
        rate = 0.02 + 0.06 * torch.rand(1, params, generator=generator, dtype=torch.float64)
        self.hyper = Hyperparams(mix, rate, self.net.sites)

    def gradient(self, mode: str, **settings: object) -> Hypergradient:
        return hypergradient_of(
            self.net,
            self.hyper,
            self.batches,
            self.validation,
            config=HypergradientConfig(mode=mode, **settings),
            statistics=self.statistics,
        )

    def loss(self, hyper: Hyperparams, state: ModelState) -> Tensor:
        """Validation loss of as many clients as ``hyper`` has, all with this client's data."""
        x, y = repeated(self.validation, len(hyper.mix))
        logits, _ = self.net.logits(state, hyper.mix, x, training=False)
        return cross_entropy(logits, y)

    def loss_after_training(self, hyper: Hyperparams) -> Tensor:
        batches = [repeated(b, len(hyper.mix)) for b in self.batches]
        return self.loss(
            hyper, run_inner_loop(self.net, hyper, batches, statistics=self.statistics)
        )

    def differences(
        self, loss: Callable[[Hyperparams], Tensor] | None = None, *, size: int = 32
    ) -> tuple[Tensor, Tensor]:
        """Central differences of fourth order by mix and by rate, (B,) and (P,).

        The shifted hyperparameters are the clients of cohorts of ``size``.
        """
        norms = self.hyper.mix.shape[1]
        at = torch.cat([self.hyper.mix[0], self.hyper.rate[0]])
        epsilon = 1e-3 * at
        shifts = torch.cat([at + k * torch.diag(epsilon) for k in (1, -1, 2, -2)])
        losses = [
            (loss or self.loss_after_training)(
                Hyperparams(part[:, :norms], part[:, norms:], self.net.sites)
            )
            for part in shifts.split(size)
        ]
        up, down, up2, down2 = torch.cat(losses).view(4, -1)
        slope = (8 * (up - down) - (up2 - down2)) / (12 * epsilon)
        return slope[:norms], slope[norms:]

    def state_after(self, steps: int) -> ModelState:
        return run_inner_loop(
            self.net, self.hyper, self.batches[:steps], statistics=self.statistics
        )

    def training_gradient(self, state: ModelState, batch: Pair) -> dict[str, Tensor]:
        """The inner gradient at a state, straight from autograd."""
        leaves = {k: v.clone().requires_grad_() for k, v in state.params.items()}
        logits, _ = self.net.logits(
            ModelState(leaves, state.stats), self.hyper.mix, batch[0], training=True
        )
        loss = nn.functional.cross_entropy(logits[0], batch[1][0])
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def gradients_along(self) -> list[dict[str, Tensor]]:
        return [
            self.training_gradient(self.state_after(k), batch)
            for k, batch in enumerate(self.batches)
        ]

    def validation_gradient(self) -> dict[str, Tensor]:
        state = self.state_after(len(self.batches))
        leaves = {k: v.clone().requires_grad_() for k, v in state.params.items()}
        loss = self.loss(self.hyper, ModelState(leaves, state.stats)).sum()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def repeated(batch: Pair, clients: int) -> Pair:
    return batch[0].expand(clients, *batch[0].shape[1:]), batch[1].expand(clients, -1)


def nested(steps: int, statistics: Statistics = "corrected", seed: int = 0) -> Problem:
    return Problem(
        nested_net(), (1, 6, 6), steps=steps, statistics=statistics, classes=10, seed=seed
    )


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Compare relatively to the largest entry, which must be there."""
    assert ours.shape == expected.shape
    if expected.numel():
        size = expected.abs().max()
        assert size > 1e-6, "nothing to compare with"
        error = (ours - expected).abs().max() / size
        assert error < tolerance, f"relative error {error:.2e}"


def inner(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
    return torch.stack([(a[k] * b[k]).sum() for k in a])


# ------------------------------------------------------------ exact


@pytest.mark.parametrize("statistics", ["corrected", "published"])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_unrolled_equals_finite_differences(steps: int, statistics: Statistics) -> None:
    problem = nested(steps, statistics)
    ours = problem.gradient("unrolled")
    mix, rate = problem.differences()
    close(ours.mix[0], mix)
    close(ours.rate[0], rate)


OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: ConvNet(1), (2, 5)),
    "3d without affine": (lambda: ConvNet(3, affine=False), (2, 3, 3, 3)),
    "shared norm": (SharedNorm, (4,)),
    "tied weights": (TiedWeights, (4,)),
    "without batch-norm": (lambda: mlp(norm=False), (4,)),
}


@pytest.fixture(params=OTHERS.values(), ids=OTHERS.keys())
def other(request: pytest.FixtureRequest) -> Problem:
    build, shape = request.param
    return Problem(settled(build()), shape, steps=4)


def test_unrolled_equals_finite_differences_on_other_nets(other: Problem) -> None:
    ours = other.gradient("unrolled")
    mix, rate = other.differences()
    close(ours.mix[0], mix)
    close(ours.rate[0], rate)


def test_unrolled_with_frozen_parameters_and_a_norm_among_them() -> None:
    model = settled(ConvNet(2))
    model.conv1.requires_grad_(False)
    model.norm2.requires_grad_(False)
    problem = Problem(model, (2, 4, 4), steps=3)
    ours = problem.gradient("unrolled")
    mix, rate = problem.differences()
    assert ours.rate.shape == (1, 6)
    close(ours.mix[0], mix)
    close(ours.rate[0], rate)


def test_a_batch_of_one_value_per_channel_in_between() -> None:
    problem = Problem(settled(mlp()), (4,), steps=3)
    problem.batches = cut(examples(13, 4), 4)
    assert problem.batches[-1][1].shape == (1, 1)
    ours = problem.gradient("unrolled")
    mix, rate = problem.differences()
    close(ours.mix[0], mix)
    close(ours.rate[0], rate)


@pytest.mark.parametrize("statistics", ["corrected", "published"])
@pytest.mark.parametrize("segment", [2, 3, 7])
@pytest.mark.parametrize("mode", ["unrolled", "truncated"])
def test_the_segment_does_not_change_the_result(
    mode: str, segment: int, statistics: Statistics
) -> None:
    problem = nested(7, statistics)
    first = problem.gradient(mode, segment=1, steps=5)
    ours = problem.gradient(mode, segment=segment, steps=5)
    close(ours.mix, first.mix, 1e-12)
    close(ours.rate, first.rate, 1e-12)


def test_as_many_graphs_are_held_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = nested(7)
    whole = problem.gradient("unrolled")
    (size,) = problem.net.graph_bytes.values()
    assert size > 0
    monkeypatch.setattr(unrolling, "GRAPHS", 3 * size)  # segments of 1, 3 and 3 steps
    taken: list[int] = []
    run_segment = unrolling._run_segment

    def counted(*args: Any) -> Any:
        taken.append(args[-1] - args[-2])
        return run_segment(*args)

    monkeypatch.setattr(unrolling, "_run_segment", counted)
    parted = problem.gradient("unrolled")
    assert taken == [3, 3, 1]
    close(parted.mix, whole.mix, 1e-12)
    close(parted.rate, whole.rate, 1e-12)


class _Marked(torch.autograd.Function):
    """Does nothing; its node holds an object that lives as long as the graph."""

    marks: ClassVar[list[weakref.ref[Any]]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark = threading.Event()
        _Marked.marks.append(weakref.ref(ctx.mark))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clone()


class _Marker(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        apply: Callable[[Tensor], Tensor] = _Marked.apply
        return apply(x)


@pytest.mark.parametrize("mode", MODES)
def test_no_graph_outlives_its_hypergradient(mode: Mode) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), _Marker(), nn.BatchNorm2d(4), nn.Sigmoid()),
        *(nn.Flatten(), nn.Linear(4 * 16, 3)),
    ).double()
    x, y = torch.randn(8, 1, 6, 6).double(), torch.arange(8) % 3
    hyper = Hyperparams.constant(find_sites(model), mix=0.5, rate=0.1)
    _Marked.marks.clear()
    for _ in range(2):  # the first measures a graph, too
        hypergradient(model, hyper, [(x, y)] * 3, (x, y), mode=mode)
    assert _Marked.marks
    assert all(mark() is None for mark in _Marked.marks)


@pytest.mark.parametrize("mode", MODES)
def test_judging_some_examples_at_a_time_changes_nothing(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = nested(3)  # 9 validation examples
    whole = problem.gradient(mode)
    for size in (1, 4):
        monkeypatch.setattr(problems, "PASS_SMALL", size)
        parts = problem.gradient(mode)
        for ours, expected in zip(vars(parts).values(), vars(whole).values(), strict=True):
            close(ours, expected, 1e-10)


def test_a_large_model_judges_fewer_examples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = nested(1)
    seen: list[int] = []
    logits = FunctionalModel.logits

    def noting(net: FunctionalModel, state: ModelState, mix: Tensor, x: Tensor, **how: Any) -> Any:
        seen.append(x.shape[1])
        return logits(net, state, mix, x, **how)

    monkeypatch.setattr(FunctionalModel, "logits", noting)
    monkeypatch.setattr(problems, "PASS_LARGE", 5)
    problem.gradient("last-step")
    monkeypatch.setattr(net_module, "SMALL", 10)
    problem.gradient("last-step")
    assert seen == [9, 5, 4]


def test_loss_and_accuracy_are_those_after_the_inner_loop() -> None:
    problem = nested(3)
    expected = problem.loss_after_training(problem.hyper)
    x, y = problem.validation
    logits, _ = problem.net.logits(problem.state_after(3), problem.hyper.mix, x, training=False)
    for mode in MODES:
        ours = problem.gradient(mode)
        torch.testing.assert_close(ours.loss, expected)
        assert float(ours.accuracy) == float((logits.argmax(-1) == y).double().mean())


# ------------------------------------------------------------ truncated


@pytest.mark.parametrize("steps", [4, 9])
def test_truncated_at_the_whole_length_is_unrolled(steps: int) -> None:
    problem = nested(4)
    exact, ours = problem.gradient("unrolled"), problem.gradient("truncated", steps=steps)
    close(ours.mix, exact.mix, 1e-12)
    close(ours.rate, exact.rate, 1e-12)


@pytest.mark.parametrize("statistics", ["corrected", "published"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_truncated_is_exact_through_its_last_steps(steps: int, statistics: Statistics) -> None:
    """Finite differences of a loop whose older gradients and statistics stand still."""
    problem = nested(5, statistics)
    older = len(problem.batches) - steps
    moved = problem.gradients_along()[:older]
    reached = problem.state_after(older)
    names = list(reached.params)

    def loss(hyper: Hyperparams) -> Tensor:
        clients = len(hyper.mix)
        params = {}
        for i, name in enumerate(names):
            theta = problem.net.start(1, statistics).params[name]
            total = sum(g[name] for g in moved)
            params[name] = theta - hyper.rate[:, i].view(-1, *(1,) * (theta.dim() - 1)) * total
        stats = {k: v.expand(clients, *v.shape[1:]) for k, v in reached.stats.items()}
        batches = [repeated(b, clients) for b in problem.batches[older:]]
        state = run_inner_loop(
            problem.net,
            hyper,
            batches,
            statistics=statistics,
            start=ModelState(params, stats),
        )
        return problem.loss(hyper, state)

    torch.testing.assert_close(loss(problem.hyper), problem.loss_after_training(problem.hyper))
    ours = problem.gradient("truncated", steps=steps)
    mix, rate = problem.differences(loss)
    close(ours.mix[0], mix)
    close(ours.rate[0], rate)
    exact = problem.gradient("unrolled").mix
    assert (ours.mix - exact).norm() > 0.01 * exact.norm(), "too short a loop to tell them apart"


# ------------------------------------------------------------ last-step and trajectory


@pytest.mark.parametrize("mode", ["last-step", "trajectory", "implicit"])
def test_after_one_step_the_rate_is_exact(mode: str) -> None:
    problem = nested(1)
    close(problem.gradient(mode).rate, problem.gradient("unrolled").rate, 1e-12)


@pytest.mark.parametrize("steps", [1, 3, 6])
@pytest.mark.parametrize("mode", ["last-step", "trajectory", "implicit"])
def test_rate_by_the_gradients_of_the_steps(mode: str, steps: int) -> None:
    problem = nested(steps)
    v, along = problem.validation_gradient(), problem.gradients_along()
    chosen = along[-1:] if mode == "last-step" else along
    close(problem.gradient(mode).rate[0], -sum(inner(v, g) for g in chosen), 1e-10)


def direct_term(problem: Problem) -> Tensor:
    """dL_val/dbeta by finite differences, the fine-tuned tensors held."""
    state = problem.state_after(len(problem.batches))

    def loss(hyper: Hyperparams) -> Tensor:
        count = len(hyper.mix)
        held = [
            {k: v.expand(count, *v.shape[1:]) for k, v in part.items()}
            for part in (state.params, state.stats)
        ]
        return problem.loss(hyper, ModelState(*held))

    return problem.differences(loss)[0]


def mixed_term(problem: Problem, vector: dict[str, Tensor]) -> Tensor:
    """d/dbeta <g(theta_K; beta), vector> on the last batch, forward over reverse."""
    state = problem.state_after(len(problem.batches))
    x, y = problem.batches[-1]

    def slope(mix: Tensor) -> Tensor:
        leaves = {k: v.clone().requires_grad_() for k, v in state.params.items()}
        logits, _ = problem.net.logits(ModelState(leaves, state.stats), mix, x, training=True)
        grads = torch.autograd.grad(
            nn.functional.cross_entropy(logits[0], y[0]), list(leaves.values()), create_graph=True
        )
        return sum((g * vector[k]).sum() for k, g in zip(leaves, grads, strict=True))

    return torch.autograd.functional.jacobian(slope, problem.hyper.mix)[0]


@pytest.mark.parametrize("statistics", ["corrected", "published"])
def test_last_steps_mix_is_the_direct_term(statistics: Statistics) -> None:
    problem = nested(4, statistics)
    close(problem.gradient("last-step").mix[0], direct_term(problem))


@pytest.mark.parametrize("steps", [1, 4])
def test_trajectorys_mix_is_direct_less_k_mixed_products(steps: int) -> None:
    problem = nested(steps)
    v = problem.validation_gradient()
    weighted = {k: problem.hyper.rate[0, i] * v[k] for i, k in enumerate(v)}
    mixed = mixed_term(problem, weighted)
    assert mixed.abs().max() > 1e-4
    expected = direct_term(problem) - steps * mixed
    close(problem.gradient("trajectory").mix[0], expected)


@pytest.mark.parametrize("mode", ["last-step", "trajectory"])
def test_with_small_rates_the_cheap_modes_approach_the_exact_rate_gradient(mode: str) -> None:
    """Curvature enters with the rates, so the error of ``trajectory`` must shrink with them.

    Only at mix 0, though: it leaves out that the running statistics follow the weights.
    """

    def error(factor: float) -> float:
        problem = nested(5)
        problem.hyper = Hyperparams(
            0 * problem.hyper.mix, problem.hyper.rate * factor, problem.net.sites
        )
        exact = problem.gradient("unrolled").rate
        return float((problem.gradient(mode).rate - exact).norm() / exact.norm())

    if mode == "trajectory":
        assert error(1e-4) < 1e-3
        assert error(1e-4) < 0.02 * error(1e-2)
    else:
        assert error(1e-4) > 0.5, "one step of five cannot be the whole derivative"


# ------------------------------------------------------------ implicit


class Convex(Problem):
    """Logistic regression on mixed-normalised inputs: the optimum exists and depends on beta."""

    def __init__(self, steps: int) -> None:
        model = settled(nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)))
        super().__init__(model, (4,), steps=1, size=60)
        self.batches = self.batches * steps
        self.hyper = Hyperparams(self.hyper.mix, torch.full((1, 2), 0.5).double(), self.net.sites)


@cache
def converged() -> Convex:
    return Convex(500)


@pytest.mark.slow
def test_implicit_is_exact_at_the_optimum_of_a_convex_problem() -> None:
    problem = converged()
    last = problem.training_gradient(problem.state_after(500), problem.batches[0])
    assert max(g.abs().max() for g in last.values()) < 1e-9, "not at the optimum"
    ours = problem.gradient("implicit", iterations=30)
    mix, _ = problem.differences()
    close(ours.mix[0], mix, 1e-6)
    close(ours.mix, problem.gradient("unrolled", segment=25).mix, 1e-6)
    error = (problem.gradient("last-step").mix[0] - mix).abs() / mix.abs()
    assert error > 0.01, "the direct term alone would do, so nothing was tested"


def test_implicit_before_the_optimum_is_an_approximation() -> None:
    problem = Convex(3)
    exact = problem.gradient("unrolled").mix
    assert (
        problem.gradient("implicit", iterations=30).mix - exact
    ).abs().max() > 1e-3 * exact.max()


def test_implicit_takes_its_second_derivatives_at_the_following_batch() -> None:
    problem = Convex(3)
    x, y = examples(60, 4, seed=5)
    ours = [
        hypergradient_of(
            problem.net,
            problem.hyper,
            problem.batches,
            problem.validation,
            config=HypergradientConfig(mode="implicit"),
            following=following,
        ).mix
        for following in (None, problem.batches[-1], (x[None], y[None]))
    ]
    assert torch.equal(ours[0], ours[1])
    assert not torch.allclose(ours[0], ours[2])


def test_heavy_damping_leaves_the_direct_term() -> None:
    problem = converged()
    direct = problem.gradient("last-step").mix
    close(problem.gradient("implicit", damping=1e9).mix, direct, 1e-6)


def systems(matrices: Sequence[Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Products with one matrix per client, the vector being split over two named tensors."""
    stacked = torch.stack(list(matrices))

    def matvec(q: dict[str, Tensor]) -> dict[str, Tensor]:
        product = (stacked @ torch.cat([q["a"], q["b"].flatten(1)], 1).unsqueeze(-1)).squeeze(-1)
        return split(product)

    return matvec


def split(v: Tensor) -> dict[str, Tensor]:
    return {"a": v[:, :2], "b": v[:, 2:].view(len(v), -1, 2)}


def joined(q: dict[str, Tensor]) -> Tensor:
    return torch.cat([q["a"], q["b"].flatten(1)], 1)


def positive(seed: int, size: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return root @ root.T + 0.5 * torch.eye(size, dtype=torch.float64)


def right_sides(count: int, size: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(count, size, generator=generator, dtype=torch.float64)


def test_conjugate_gradients_solve_each_clients_system() -> None:
    matrices, b = [positive(0), 100 * positive(1), torch.eye(6).double()], right_sides(3)
    found = joined(conjugate_gradients(systems(matrices), split(b), 12))
    expected = torch.linalg.solve(torch.stack(matrices), b.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_conjugate_gradients_by_hand() -> None:
    """One step from zero: q = (b.b / b.Ab) b."""
    matrix, b = positive(3), right_sides(1)
    found = joined(conjugate_gradients(systems([matrix]), split(b), 1))
    torch.testing.assert_close(found[0], b[0] * (b[0] @ b[0]) / (b[0] @ matrix @ b[0]))


def test_conjugate_gradients_stop_a_client_at_negative_curvature() -> None:
    at_once = -torch.eye(6).double()
    later = torch.diag(torch.tensor([2.0, -1.0, 2.0, 2.0, 2.0, 2.0])).double()
    b = right_sides(4)
    b[1] = torch.tensor([1.0, 0.1, 0, 0, 0, 0])
    b[3] = 0.0
    found = joined(
        conjugate_gradients(systems([at_once, later, positive(0), positive(1)]), split(b), 12)
    )
    assert torch.equal(found[0], torch.zeros(6).double())
    one_step = b[1] * (b[1] @ b[1]) / (b[1] @ later @ b[1])
    torch.testing.assert_close(found[1], one_step)
    torch.testing.assert_close(found[2], torch.linalg.solve(positive(0), b[2]))
    assert torch.equal(found[3], torch.zeros(6).double())


def test_conjugate_gradients_with_values_that_are_not_finite_spare_the_others() -> None:
    b = right_sides(2)
    b[0] = float("nan")
    found = joined(conjugate_gradients(systems([positive(0), positive(1)]), split(b), 12))
    torch.testing.assert_close(found[1], torch.linalg.solve(positive(1), b[1]))


# ------------------------------------------------------------ published


def test_published_without_terms_by_hand() -> None:
    """J = 0: p = v; the rate gets + p^T H g as in the reference, H of the evaluation-mode loss."""
    problem = nested(2, "published")
    state, names = problem.state_after(2), problem.net.sites.params
    v, last = problem.validation_gradient(), problem.gradients_along()[-1]
    x, y = problem.batches[-1]

    def gradient(shift: float) -> dict[str, Tensor]:
        leaves = {k: (p + shift * v[k]).detach().requires_grad_() for k, p in state.params.items()}
        logits, _ = problem.net.logits(
            ModelState(leaves, state.stats), problem.hyper.mix, x, training=False
        )
        loss = nn.functional.cross_entropy(logits[0], y[0])
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    up, down = gradient(1e-5), gradient(-1e-5)
    expected = torch.stack([((up[k] - down[k]) / 2e-5 * last[k]).sum() for k in names])
    close(problem.gradient("published", terms=0).rate[0], expected)


# ------------------------------------------------------------ all modes


def cohort_of(problems: Sequence[Problem]) -> tuple[Hyperparams, list[Pair], Pair]:
    """Stack problems that share a net."""
    batches = [
        (torch.cat([b[0] for b in step]), torch.cat([b[1] for b in step]))
        for step in zip(*(p.batches for p in problems), strict=True)
    ]
    validation = tuple(torch.cat([p.validation[i] for p in problems]) for i in (0, 1))
    hyper = Hyperparams.stack([p.hyper[0] for p in problems])
    return hyper, batches, validation


@pytest.mark.parametrize("statistics", ["corrected", "published"])
@pytest.mark.parametrize("mode", MODES)
def test_a_cohort_gives_each_client_what_it_gets_alone(mode: str, statistics: Statistics) -> None:
    problems = [nested(4, statistics, seed=s) for s in range(3)]
    hyper, batches, validation = cohort_of(problems)
    config = HypergradientConfig(mode=mode, steps=2, segment=2, iterations=3, psi=0.01)
    together = hypergradient_of(
        problems[0].net, hyper, batches, validation, config=config, statistics=statistics
    )
    for c, problem in enumerate(problems):
        alone = hypergradient_of(
            problem.net,
            problem.hyper,
            problem.batches,
            problem.validation,
            config=config,
            statistics=statistics,
        )
        close(together.mix[c], alone.mix[0], 1e-10)
        close(together.rate[c], alone.rate[0], 1e-10)
        torch.testing.assert_close(together.loss[c], alone.loss[0], rtol=1e-12, atol=0)
        assert together.accuracy[c] == alone.accuracy[0]


@pytest.mark.parametrize("clients", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_a_model_without_batch_norm(mode: str, clients: int) -> None:
    problems = [Problem(settled(mlp(norm=False)), (4,), steps=3, seed=s) for s in range(clients)]
    hyper, batches, validation = cohort_of(problems)
    ours = hypergradient_of(
        problems[0].net, hyper, batches, validation, config=HypergradientConfig(mode=mode)
    )
    assert ours.mix.shape == (clients, 0)
    assert ours.rate.shape == (clients, 4)
    assert (ours.rate != 0).all()
    assert ours.rate.isfinite().all()
    if mode in ("unrolled", "truncated"):
        close(ours.rate[0], problems[0].differences()[1])


@pytest.mark.parametrize("statistics", ["corrected", "published"])
@pytest.mark.parametrize("mode", MODES)
def test_no_inner_step(mode: str, statistics: Statistics) -> None:
    """Then the model stays as it is, whatever the rates and the mix."""
    problem = nested(0, statistics)
    ours = problem.gradient(mode)
    assert torch.equal(ours.rate, torch.zeros_like(ours.rate))
    assert torch.equal(ours.mix, torch.zeros_like(ours.mix))
    assert not problem.differences()[0].any()


@pytest.mark.parametrize("mode", MODES)
def test_frozen_parameters_have_no_entry_and_a_scalar_one_has(mode: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()
            self.temperature = nn.Parameter(torch.ones(()))
            self.body[0].requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * (1 + self.temperature)

    problem = Problem(settled(Scaled()), (4,), steps=1)
    ours = problem.gradient(mode)
    assert ours.rate.shape == (1, 5)
    assert problem.net.sites.params[0] == "temperature"
    if mode != "published":
        close(ours.rate, problem.gradient("unrolled").rate, 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_by_name(mode: str) -> None:
    problem = nested(2)
    named = hypergradient(
        problem.model,
        problem.hyper[0],
        [(x[0], y[0]) for x, y in problem.batches],
        (problem.validation[0][0], problem.validation[1][0]),
        mode=mode,
    )
    ours = problem.gradient(mode)
    assert named["mix"] == dict(zip(problem.net.sites.norms, ours.mix[0].tolist(), strict=True))
    assert named["rate"] == dict(zip(problem.net.sites.params, ours.rate[0].tolist(), strict=True))


def test_hyperparams_of_another_model_are_refused() -> None:
    problem, foreign = nested(1), nested(1)
    names = tuple(f"other.{n}" for n in foreign.net.sites.params)
    sites = type(foreign.net.sites)(**{**vars(foreign.net.sites), "params": names})
    hyper = Hyperparams(foreign.hyper.mix[0], foreign.hyper.rate[0], sites)
    with pytest.raises(ValueError, match="another model"):
        hypergradient(problem.model, hyper, [], (torch.zeros(1, 1, 6, 6), torch.zeros(1)))


@pytest.mark.parametrize("mode", ["unrolled", "truncated", "trajectory", "implicit", "last-step"])
def test_dropouts_masks_are_the_same_when_a_step_is_computed_again(mode: str) -> None:
    model = settled(
        nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    )
    problem = Problem(model, (4,), steps=4)
    pair = examples(16, 4)
    problem.batches = EpochBatches([Examples(*pair)], [7], epochs=1, batch_size=4)
    torch.manual_seed(0)
    first = problem.gradient(mode, segment=1)
    torch.manual_seed(1)
    ours = problem.gradient(mode, segment=4)
    close(ours.mix, first.mix, 1e-12)
    close(ours.rate, first.rate, 1e-12)


def test_unrolled_with_dropout_equals_finite_differences() -> None:
    model = settled(
        nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    )
    problem = Problem(model, (4,), steps=4)
    ours = problem.gradient("unrolled")
    mix, rate = problem.differences(size=1)
    close(ours.mix[0], mix)
    close(ours.rate[0], rate)


def test_a_stack_of_clients_with_dropout_is_refused() -> None:
    model = settled(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
    problems = [Problem(model, (4,), steps=1, seed=s) for s in range(2)]
    hyper, batches, validation = cohort_of(problems)
    with pytest.raises(ValueError, match="draws random numbers"):
        hypergradient_of(problems[0].net, hyper, batches, validation, config=HypergradientConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "exact"}, "mode is 'exact'"),
        ({"steps": 0}, "steps is 0"),
        ({"segment": 0}, "segment is 0"),
        ({"iterations": 0}, "iterations is 0"),
        ({"terms": -1}, "terms"),
        ({"psi": 0.0}, "psi"),
        ({"psi": -0.1}, "psi"),
        ({"psi": float("nan")}, "psi"),
        ({"damping": -1e-3}, "damping"),
        ({"damping": float("inf")}, "damping"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HypergradientConfig(**settings)
