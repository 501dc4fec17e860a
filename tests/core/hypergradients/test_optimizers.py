"""Hypergradients through momentum, weight decay and Adam, against central finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedl2p.core.clientdata import Examples
from fedl2p.core.finetuning.batches import Batches, EpochBatches
from fedl2p.core.finetuning.inner_loop import run_inner_loop
from fedl2p.core.finetuning.optimizers import optimizer_of
from fedl2p.core.functional.model import FunctionalModel, ModelState
from fedl2p.core.hypergradients.estimators import hypergradient
from fedl2p.core.hypergradients.problem import Hypergradient
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.settings import MODES, OPTIMIZER_MODES, HypergradientConfig, InnerLoop, Mode
from support.core_nets import ConvNet, cross_entropy, cut, examples, hypergradient_of, mlp, settled

Pair = tuple[Tensor, Tensor]

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.9},
    "decay": {"weight_decay": 0.1},
    "momentum and decay": {"momentum": 0.8, "weight_decay": 0.1},
    "adam": {"optimizer": "adam"},
    "adam and decay": {"optimizer": "adam", "weight_decay": 0.1},
}


@pytest.fixture(params=OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def given(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


class Problem:
    """One client's bilevel problem: K batches, validation, uneven hyperparameters."""

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        given: dict[str, Any],
        *,
        steps: int,
        seed: int = 0,
    ) -> None:
        self.model, self.net = model, FunctionalModel(model)
        self.optimizer = optimizer_of(InnerLoop(**given))
        self.batches: Batches = cut(examples(4 * steps, *shape, seed=seed), 4)
        x, y = examples(9, *shape, seed=seed + 100)
        self.validation = (x[None], y[None])
        rng = torch.Generator().manual_seed(seed)
        mix = 0.2 + 0.6 * torch.rand(1, len(self.net.sites.norms), generator=rng).double()
        rate = 0.01 + 0.03 * torch.rand(1, len(self.net.sites.params), generator=rng).double()
        self.hyper = Hyperparams(mix, rate, self.net.sites)

    def gradient(self, mode: Mode, **settings: Any) -> Hypergradient:
        return hypergradient_of(
            self.net,
            self.hyper,
            self.batches,
            self.validation,
            config=HypergradientConfig(mode=mode, **settings),
            optimizer=self.optimizer,
        )

    def trained(
        self, hyper: Hyperparams, first: int = 0, start: ModelState | None = None
    ) -> ModelState:
        clients = len(hyper.mix)
        batches = [repeated(self.batches[k], clients) for k in range(first, len(self.batches))]
        return run_inner_loop(
            self.net,
            hyper,
            batches,
            statistics="corrected",
            start=start,
            optimizer=self.optimizer,
        )

    def loss(self, hyper: Hyperparams, state: ModelState) -> Tensor:
        x, y = repeated(self.validation, len(hyper.mix))
        return cross_entropy(self.net.logits(state, hyper.mix, x, training=False)[0], y)

    def differences(
        self, loss: Callable[[Hyperparams], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Central differences of fourth order by mix and by rate, (B,) and (P,)."""
        norms = self.hyper.mix.shape[1]
        at = torch.cat([self.hyper.mix[0], self.hyper.rate[0]])
        epsilon = 1e-4 * at
        shifts = torch.cat([at + k * torch.diag(epsilon) for k in (1, -1, 2, -2)])
        hyper = Hyperparams(shifts[:, :norms], shifts[:, norms:], self.net.sites)
        losses = self.loss(hyper, self.trained(hyper)) if loss is None else loss(hyper)
        up, down, up2, down2 = losses.view(4, -1)
        slope = (8 * (up - down) - (up2 - down2)) / (12 * epsilon)
        return slope[:norms], slope[norms:]


def repeated(batch: Pair, clients: int) -> Pair:
    return batch[0].expand(clients, *batch[0].shape[1:]), batch[1].expand(clients, -1)


def close(ours: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Compare relatively to the largest entry, which must be there."""
    assert ours.shape == expected.shape
    size = expected.abs().max()
    assert size > 1e-6, "nothing to compare with"
    error = (ours - expected).abs().max() / size
    assert error < tolerance, f"relative error {error:.2e}"


def conv(given: dict[str, Any], steps: int, seed: int = 0) -> Problem:
    return Problem(settled(ConvNet(1)), (2, 5), given, steps=steps, seed=seed)


@pytest.mark.parametrize("mode", ["unrolled", "truncated"])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_exact_modes_equal_finite_differences(
    steps: int, mode: Mode, given: dict[str, Any]
) -> None:
    problem = conv(given, steps)
    ours = problem.gradient(mode, steps=steps)
    mix, rate = problem.differences()
    close(ours.mix[0], mix)
    close(ours.rate[0], rate)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_truncated_holds_older_directions_and_moments(steps: int, given: dict[str, Any]) -> None:
    """Finite differences of a loop whose older directions, moments and statistics stand still."""
    problem = conv(given, 5)
    older = len(problem.batches) - steps
    begin, batches = problem.net.start(1), problem.batches
    problem.batches = [batches[k] for k in range(older)]
    reached = problem.trained(problem.hyper)
    problem.batches = batches
    rates = dict(zip(reached.params, problem.hyper.rate[0], strict=True))
    moved = {k: (begin.params[k] - p) / rates[k] for k, p in reached.params.items()}

    def loss(hyper: Hyperparams) -> Tensor:
        def expanded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {k: v.expand(len(hyper.mix), *v.shape[1:]) for k, v in tensors.items()}

        params = {
            k: begin.params[k] - hyper.rate[:, i].view(-1, *(1,) * (d.dim() - 1)) * d
            for i, (k, d) in enumerate(moved.items())
        }
        start = ModelState(params, expanded(reached.stats), expanded(reached.moments))
        return problem.loss(hyper, problem.trained(hyper, older, start))

    ours = problem.gradient("truncated", steps=steps)
    mix, rate = problem.differences(loss)
    close(ours.mix[0], mix)
    close(ours.rate[0], rate)
    exact = problem.gradient("unrolled").mix
    assert (ours.mix - exact).norm() > 0.01 * exact.norm(), "too short a loop to tell them apart"


@pytest.mark.parametrize("segment", [1, 2, 7])
def test_the_segment_does_not_change_the_result(segment: int, given: dict[str, Any]) -> None:
    problem = conv(given, 7)
    first = problem.gradient("truncated", steps=5, segment=3)
    ours = problem.gradient("truncated", steps=5, segment=segment)
    close(ours.mix, first.mix, 1e-10)
    close(ours.rate, first.rate, 1e-10)


def test_the_last_step_is_exact_by_the_rate_after_one_step(given: dict[str, Any]) -> None:
    problem = conv(given, 1)
    close(problem.gradient("last-step").rate, problem.gradient("unrolled").rate, 1e-10)


class Cut(nn.Module):
    """Without a norm; its first input is always 0, so that some gradients are exactly 0."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(norm=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * x.new_tensor([0.0, 1.0, 1.0, 1.0]))


def test_adam_is_differentiable_where_every_gradient_was_zero() -> None:
    problem = Problem(settled(Cut()), (4,), OPTIMIZERS["adam"], steps=3)
    second = problem.trained(problem.hyper).moments[".second.body.0.weight"]
    assert (second[0, :, 0] == 0).all()
    ours = problem.gradient("unrolled")
    close(ours.rate[0], problem.differences()[1])


def test_the_first_adam_step_has_the_limits_derivative_at_zero() -> None:
    """d = g / (|g| + eps) has the derivative 1 / eps at g = 0."""
    adam = optimizer_of(InnerLoop(optimizer="adam"))
    assert adam is not None
    grad = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    params = {"w": torch.ones(1, 3, dtype=torch.float64)}
    start = adam.start(ModelState(params, {}))
    directions, _ = adam(params, {"w": grad}, start.moments)
    (slope,) = torch.autograd.grad(directions["w"].sum(), grad)
    torch.testing.assert_close(slope, torch.full_like(slope, 1e8))


def test_adam_in_half_precision_stays_finite() -> None:
    adam = optimizer_of(InnerLoop(optimizer="adam"))
    assert adam is not None
    grad = torch.tensor([[0.0, 1e-4, 1e-7, 1.0]], dtype=torch.float16)
    params = {"w": torch.ones_like(grad)}
    directions, moments = adam(params, {"w": grad}, adam.start(ModelState(params, {})).moments)
    assert directions["w"].isfinite().all()
    assert moments[".second.w"].dtype == torch.float32


@pytest.mark.parametrize("mode", OPTIMIZER_MODES)
def test_a_stack_gives_each_client_what_it_gets_alone(mode: Mode, given: dict[str, Any]) -> None:
    problems = [Problem(settled(mlp(norm=False)), (4,), given, steps=4, seed=s) for s in range(3)]
    for problem, count in zip(problems, (13, 7, 13), strict=True):
        pair = examples(count, 4, seed=count)
        problem.batches = EpochBatches(
            [Examples(*pair)], [count], epochs=2, batch_size=5, align="end"
        )
    parts = [problem.batches._examples[0] for problem in problems]
    together = hypergradient_of(
        problems[0].net,
        Hyperparams.stack([p.hyper[0] for p in problems]),
        EpochBatches(parts, [13, 7, 13], epochs=2, batch_size=5, align="end"),
        tuple(torch.cat([p.validation[i] for p in problems]) for i in (0, 1)),
        config=HypergradientConfig(mode=mode, steps=5, segment=2),
        optimizer=problems[0].optimizer,
    )
    for c, problem in enumerate(problems):
        alone = problem.gradient(mode, steps=5, segment=2)
        close(together.rate[c], alone.rate[0], 1e-9)
        torch.testing.assert_close(together.loss[c], alone.loss[0])


def test_the_memory_of_a_graph_is_measured_for_each_optimizer() -> None:
    problem = conv(OPTIMIZERS["adam"], 3)
    problem.gradient("unrolled")
    problem.optimizer = None
    problem.gradient("unrolled")
    with_adam, plain = problem.net.graph_bytes.values()
    assert with_adam > plain


@pytest.mark.parametrize("mode", MODES)
def test_by_name_or_refused(mode: Mode, given: dict[str, Any]) -> None:
    problem = conv(given, 2)
    batches = [(x[0], y[0]) for x, y in (problem.batches[k] for k in range(2))]
    validation = problem.validation[0][0], problem.validation[1][0]

    def named() -> dict[str, dict[str, float]]:
        return hypergradient(
            problem.model, problem.hyper[0], batches, validation, mode=mode, **given
        )

    if mode in OPTIMIZER_MODES:
        assert list(named()["rate"].values()) == problem.gradient(mode).rate[0].tolist()
    else:
        with pytest.raises(ValueError, match=f"{mode!r} is for plain SGD") as refusal:
            named()
        assert "\n" not in str(refusal.value)
