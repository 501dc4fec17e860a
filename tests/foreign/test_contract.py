"""What fine-tuning, hypergradients and learning promise, on every net of the folder."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedl2p import (
    Client,
    ClientData,
    Examples,
    Hyperparams,
    InnerLoop,
    Rounds,
    Settings,
    find_sites,
    finetune,
    hypergradient,
    learn,
    personalize,
    profile,
)
from fedl2p.core.finetuning.batches import EpochBatches
from fedl2p.methods import build
from foreign.nets import CASES
from foreign.nets.case import Case
from foreign.reference import (
    Batch,
    FrozenStatistics,
    MixedStatistics,
    copied,
    drawing_from,
    noise,
    to_training,
    train,
)

RATE, SIZE, EPOCHS, SEED = 0.05, 4, 2, 3


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


ONE_OF_A_KIND = (
    *("residual", "weight-tied", "compiled", "LSTM", "vision transformer", "LoRA on BERT"),
    *("functional batch_norm", "norm and activation", "train() override", "forward hooks"),
    *("hand-written batch-norm", "F.dropout", "bfloat16 backbone, float32 head"),
)


def some_slow() -> pytest.MarkDecorator:
    """Try one net of a kind in `make test`, and all of them in `make test-all`."""
    marks = {True: (), False: pytest.mark.slow}
    nets = [
        pytest.param(case, id=name, marks=marks[name in ONE_OF_A_KIND])
        for name, case in CASES.items()
    ]
    return pytest.mark.parametrize("case", nets)


def constant(model: nn.Module, mix: float, rate: float) -> Hyperparams:
    return Hyperparams.constant(find_sites(model), mix=mix, rate=rate)


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    model = getattr(model, "_orig_mod", model).eval()
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    with torch.no_grad():
        return model(x.to(dtype) if x.is_floating_point() else x)


def drawn(x: Tensor, y: Tensor) -> list[Batch]:
    """Return the batches that fine-tuning draws."""
    batches = EpochBatches([Examples(x, y)], [SEED], epochs=EPOCHS, batch_size=SIZE)
    return [(a[0], b[0]) for a, b in batches]


def same(ours: nn.Module, theirs: nn.Module, tolerance: float) -> None:
    """Compare every tensor but the counters of batch-norm's batches."""
    mine = ours.state_dict()
    other = theirs.state_dict()
    mine = {n.removeprefix("_orig_mod."): v for n, v in mine.items()}
    assert list(mine) == list(other)
    for name, value in mine.items():
        if not name.endswith("num_batches_tracked"):
            assert value.dtype == other[name].dtype, name
            torch.testing.assert_close(
                value,
                other[name],
                rtol=tolerance,
                atol=tolerance,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def uniform(model: nn.Module, rate: float = RATE) -> dict[str, float]:
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    return {n.removeprefix("_orig_mod."): rate for n in names}


def tuned(case: Case, model: nn.Module, mix: float, rate: float, **more: object) -> nn.Module:
    data = case.examples(10, 1)
    hyper = constant(model, mix, rate)
    return finetune(
        model, hyper, data, epochs=EPOCHS, batch_size=SIZE, seed=SEED, statistics="global", **more
    )


def test_rate_0_and_mix_0_give_the_global_outputs(case: Case) -> None:
    model = case.build()
    x, _ = case.examples(6, 2)
    mine = tuned(case, model, 0.0, 0.0)
    assert type(mine) is type(model)
    if case.state:  # which moves without any rate, as in plain torch
        with FrozenStatistics():
            theirs = train(model, drawn(*case.examples(10, 1)), uniform(model, 0.0), seeds=(SEED,))
        same(mine, theirs, case.tolerance)
    else:
        torch.testing.assert_close(outputs(mine, x), outputs(model, x))


def test_mix_1_equals_plain_training(case: Case) -> None:
    model = case.build()
    theirs = train(model, drawn(*case.examples(10, 1)), uniform(model), seeds=(SEED,))
    mine = tuned(case, model, 1.0, RATE)
    same(mine, theirs, case.tolerance)
    x, _ = case.examples(6, 2)
    torch.testing.assert_close(
        outputs(mine, x), outputs(theirs, x), rtol=case.tolerance, atol=case.tolerance
    )


def test_mix_0_equals_training_with_frozen_statistics(case: Case) -> None:
    model = case.build()
    with FrozenStatistics():
        theirs = train(model, drawn(*case.examples(10, 1)), uniform(model), seeds=(SEED,))
    same(tuned(case, model, 0.0, RATE), theirs, case.tolerance)


def validation_loss(
    case: Case, model: nn.Module, mix: Tensor, rate: Tensor, batches: list[Batch], last: Batch
) -> float:
    """Return the loss after training a plain model whose norms mix, in plain operations."""
    sites = find_sites(model)
    names = [n.removeprefix("_orig_mod.") for n in sites.params]
    work = to_training(copied(model))
    norms = dict(zip([n.removeprefix("_orig_mod.") for n in sites.norms], mix, strict=True))
    mixing = MixedStatistics(work, norms)
    params = dict(work.named_parameters())
    for step, (x, y) in enumerate(batches):
        with drawing_from(noise(step)), mixing:
            logits = work(x)
        moved = [params[n] for n in names]
        grads = torch.autograd.grad(F.cross_entropy(logits, y), moved, allow_unused=True)
        with torch.no_grad():
            for p, r, g in zip(moved, rate, grads, strict=True):
                p -= 0.0 if g is None else r * g
            mixing.sums = {k: (a.detach(), b.detach(), w) for k, (a, b, w) in mixing.sums.items()}
    with mixing, torch.no_grad():
        return float(F.cross_entropy(work.eval()(last[0]), last[1]))


def test_the_unrolled_hypergradient_equals_finite_differences(case: Case) -> None:
    if not case.differentiable:
        pytest.skip("not a differentiable function, or not in float64")
    model = case.build()
    sites = find_sites(model)
    batches = [case.examples(5, 10 + k) for k in range(case.steps)]
    last = case.examples(6, 20)
    generator = torch.Generator().manual_seed(5)

    def uniform(n: int, low: float, high: float) -> Tensor:
        drawn = torch.rand(n, generator=generator, dtype=torch.float64)
        return low + (high - low) * drawn

    mix, rate = uniform(len(sites.norms), 0.2, 0.8), uniform(len(sites.params), 0.02, 0.1)
    answer = hypergradient(model, Hyperparams(mix, rate, sites), batches, last, mode="unrolled")
    ours = torch.tensor([*answer["mix"].values(), *answer["rate"].values()], dtype=torch.float64)
    step = 1e-6
    for _ in range(2):
        along = uniform(len(ours), -1.0, 1.0)
        along = along / along.norm()
        d_mix, d_rate = along.split([len(mix), len(rate)])
        ends = [
            validation_loss(case, model, mix + s * d_mix, rate + s * d_rate, batches, last)
            for s in (step, -step)
        ]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert abs(slope) > 1e-6
        assert float(ours @ along) == pytest.approx(slope, rel=1e-5, abs=1e-8)


def clients(case: Case, count: int = 4) -> list[Client]:
    parts = [
        [Examples(*case.examples(n, 100 * i + j)) for j, n in enumerate((9, 5, 4))]
        for i in range(count)
    ]
    return [
        Client(f"c{i}", ClientData(*three), seed=40 + i, round=1) for i, three in enumerate(parts)
    ]


SETTINGS = Settings(finetune=InnerLoop(epochs=1, batch_size=SIZE), finetune_rate=RATE)


@some_slow()
def test_a_stack_of_clients_equals_each_alone(case: Case) -> None:
    model, everybody = case.build(), clients(case)
    close = {"rel": max(1e-6, 5 * case.tolerance), "abs": max(1e-8, case.tolerance)}
    method = build("finetuning-half", SETTINGS)
    together = method.personalize(model, {}, everybody)
    for client, outcome in zip(everybody, together, strict=True):
        (alone,) = method.personalize(model, {}, [client])
        assert alone.failure is outcome.failure is None
        assert alone.loss == pytest.approx(outcome.loss, **close)
        assert alone.loss_before == pytest.approx(outcome.loss_before, **close)
    learner = build("fedl2p", SETTINGS)
    state = learner.start(model, seed=2)
    for client, update in zip(everybody, learner.train(model, state, everybody), strict=True):
        (alone,) = learner.train(model, state, [client])
        assert alone.failure is update.failure is None
        for name, value in alone.shared.items():
            torch.testing.assert_close(
                value, update.shared[name], rtol=close["rel"], atol=10 * close["abs"], msg=name
            )


def learned(case: Case, model: nn.Module) -> dict[str, Tensor]:
    data = {c.name: c.data for c in clients(case)}
    nets = learn(model, data, rounds=Rounds(rounds=1, keep="last"), settings=SETTINGS, seed=1)
    return nets.state_dict()


@some_slow()
def test_learning_moves_the_nets_and_is_the_same_twice(case: Case) -> None:
    model = case.build()
    once, again = learned(case, model), learned(case, model)
    start = build("fedl2p", SETTINGS).start(model, seed=1)
    assert not torch.equal(once["base"], start["base"])
    for name, value in once.items():
        assert torch.equal(value, again[name]), name
    other = learned(case, copy.deepcopy(getattr(model, "_orig_mod", model)))
    for name, value in once.items():
        assert torch.equal(value, other[name]), f"{name}: order of calls"


def test_a_full_profile_has_the_models_own_loss_and_gradients(case: Case) -> None:
    """Against autograd in evaluation mode, and one that is cut into batches."""
    model = case.build()
    x, y = case.examples(10, 1)
    full = profile(model, [(x, y)], groups=("full",))
    parts = profile(model, zip(x.split(7), y.split(7), strict=True), groups=("full",))
    published = profile(model, [x])
    torch.testing.assert_close(full.divergence, published.divergence)
    torch.testing.assert_close(full.moments, published.moments)
    for field, value in full.tensors().items():
        torch.testing.assert_close(value, parts.tensors()[field], rtol=1e-3, atol=1e-4, msg=field)
    plain = copy.deepcopy(getattr(model, "_orig_mod", model)).eval()
    params = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    dtype = next(p.dtype for p in plain.parameters() if p.is_floating_point())
    got = plain(x.to(dtype) if x.is_floating_point() else x)
    loss = F.cross_entropy(got.to(full.moments.dtype), y)
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    near = {"rtol": 1e-3, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-6, "atol": 1e-9}
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in plain.parameters()):
        near = {"rtol": 0.05, "atol": 0.01}
    assert full.loss is not None
    assert full.gradients is not None
    torch.testing.assert_close(full.loss[0], loss.detach().to(full.loss), **near)
    for name, grad, ratio in zip(params, grads, full.gradients, strict=True):
        size = params[name].detach().double().norm()
        size = size.clamp_min(1e-3 * params[name].numel() ** 0.5)
        wanted = torch.zeros(()) if grad is None else grad.double().norm() / size
        torch.testing.assert_close(
            ratio, wanted.to(ratio), msg=lambda m, n=name: f"{n}: {m}", **near
        )


@some_slow()
def test_nothing_of_the_callers_is_touched(case: Case) -> None:
    model = case.build()
    x, y = case.examples(10, 1)
    flags = [m.training for m in model.modules()]
    hooks = [
        (dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m._backward_hooks))
        for m in model.modules()
    ]
    wanted = [p.requires_grad for p in model.parameters()]
    own = [sorted(m.__dict__) for m in model.modules()]
    of_copy = [sorted(m.__dict__) for m in copy.deepcopy(model).modules()]
    before = {n: v.clone() for n, v in model.state_dict().items()}
    generator, python = torch.get_rng_state(), random.getstate()
    hyper = constant(model, 0.5, RATE)

    seen = profile(model, [x])
    mine = finetune(model, hyper, (x, y), epochs=1, batch_size=SIZE)
    hypergradient(model, hyper, [(x, y)], (x, y))
    data = {c.name: c.data for c in clients(case)}
    nets = learn(model, data, rounds=Rounds(rounds=1, keep="last"), settings=SETTINGS)
    got = personalize(model, nets, (x, y), epochs=1)

    assert seen.num_examples == 10
    assert torch.equal(torch.get_rng_state(), generator)
    assert random.getstate() == python
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert [sorted(m.__dict__) for m in model.modules()] == own
    assert all(p.grad is None for p in model.parameters())
    assert hooks == [
        (dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m._backward_hooks))
        for m in model.modules()
    ]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for result in (mine, got.model):
        assert type(result) is type(model)
        assert [m.training for m in result.modules()] == flags
        assert [p.requires_grad for p in result.parameters()] == wanted
        assert [type(m) for m in result.modules()] == [type(m) for m in model.modules()]
        assert [sorted(m.__dict__) for m in result.modules()] == of_copy


def test_results_do_not_depend_on_the_mode_in_which_the_model_comes(case: Case) -> None:
    model, other = case.build(), case.build()
    if not all(m.training for m in other.modules()) and "override" not in type(other).__doc__:
        pytest.skip("evaluation mode would lose what was put into it alone")
    other.eval()
    same(tuned(case, other, 0.5, RATE), copied(tuned(case, model, 0.5, RATE)), 0.0)


@some_slow()
@pytest.mark.parametrize("mode", ["truncated", "last-step", "trajectory", "implicit", "published"])
def test_every_mode_runs(case: Case, mode: str) -> None:
    model = case.build()
    batch = case.examples(5, 3)
    answer = hypergradient(
        model, constant(model, 0.5, 0.01), [batch, batch], case.examples(5, 4), mode=mode
    )
    values = torch.tensor([*answer["mix"].values(), *answer["rate"].values()])
    assert bool(values.isfinite().all())
    assert bool((values != 0).any())
