"""The inner loop's optimizers against torch.optim, step for step, alone and in a stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.core.finetuning.batches import EpochBatches
from fedl2p.core.finetuning.inner_loop import finetune, run_inner_loop
from fedl2p.core.finetuning.optimizers import Optimizer, optimizer_of
from fedl2p.core.functional.model import FunctionalModel, ModelState
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.metanets import MetaNets
from fedl2p.core.personalization import personalize
from fedl2p.core.profiles import profile
from fedl2p.core.settings import InnerLoop
from fedl2p.core.sites import find_sites
from fedl2p.method import Client
from fedl2p.methods import build
from fedl2p.methods.base.personalizing import finetune_stack
from fedl2p.methods.base.settings import Baselines, Grid, MetaLearning, Settings
from support.core_nets import ConvNet, UnusedNorm, cut, examples, mlp, settled

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "decay": {"weight_decay": 0.1},
    "momentum and decay": {"momentum": 0.8, "weight_decay": 0.1},
    "adam": {"optimizer": "adam"},
    "adam and decay": {"optimizer": "adam", "weight_decay": 0.1},
}
STEPS, SIZE = 10, 4
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "two norms": (lambda: ConvNet(2), (2, 4, 4)),
    "layers that the loss does not depend on": (UnusedNorm, (4,)),
}


@pytest.fixture(params=OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def given(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


def partly_frozen(model: nn.Module) -> nn.Module:
    """Return the model settled, without training of the head's bias and of biases before a norm.

    These have gradients of rounding errors, which Adam makes large.
    """
    for name, parameter in settled(model).named_parameters():
        parameter.requires_grad_(name not in ("head.bias", "conv1.bias", "conv2.bias"))
    return model


def optimizer(given: dict[str, Any]) -> Optimizer | None:
    return optimizer_of(InnerLoop(**given))


def hyperparams(net: FunctionalModel, clients: int = 1) -> Hyperparams:
    """Return mix 1 and uneven rates for each client."""
    rng = torch.Generator().manual_seed(1)
    params = len(net.sites.params)
    rate = 0.01 + 0.04 * torch.rand(clients, params, generator=rng, dtype=torch.float64)
    return Hyperparams(torch.ones(clients, len(net.sites.norms)).double(), rate, net.sites)


def by_torch(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], rate: Tensor, given: dict[str, Any]
) -> dict[str, Tensor]:
    """Return all tensors of a model that torch.optim trained, one group per tensor."""
    given = dict(given)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[given.pop("optimizer", "sgd")]
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p], "lr": float(r)} for p, r in zip(trained, rate, strict=True)]
    optimizer = kind(groups, **given)
    model.train()
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x[0]), y[0]).backward()
        optimizer.step()
    return dict(model.state_dict())


def assert_equal(
    net: FunctionalModel, state: ModelState, client: int, expected: dict[str, Tensor]
) -> None:
    for name, value in state.params.items():
        torch.testing.assert_close(value[client], expected[name], rtol=1e-10, atol=1e-12)
    for norm in net.sites.norms:
        for part in ("mean", "var"):
            ours = state.stats[f"{norm}.client_{part}"][client]
            torch.testing.assert_close(
                ours, expected[f"{norm}.running_{part}"], rtol=1e-10, atol=1e-12
            )


@pytest.mark.parametrize(("make", "shape"), NETS.values(), ids=NETS.keys())
def test_steps_are_those_of_torch(
    make: Callable[[], nn.Module], shape: tuple[int, ...], given: dict[str, Any]
) -> None:
    net = FunctionalModel(partly_frozen(make()))
    for clients in (1, 3):
        hyper = hyperparams(net, clients)
        drawn = [cut(examples(STEPS * SIZE, *shape, seed=c), SIZE) for c in range(clients)]
        batches = [
            (torch.cat([x for x, _ in step]), torch.cat([y for _, y in step]))
            for step in zip(*drawn, strict=True)
        ]
        state = run_inner_loop(net, hyper, batches, statistics="global", optimizer=optimizer(given))
        for c in range(clients):
            expected = by_torch(partly_frozen(make()), drawn[c], hyper.rate[c], given)
            assert_equal(net, state, c, expected)


def test_clients_of_unequal_sizes_count_their_own_steps(given: dict[str, Any]) -> None:
    net = FunctionalModel(settled(mlp()))
    parts = [Examples(*examples(n, 4, seed=n)) for n in (21, 7, 21, 12)]
    hyper, inner = hyperparams(net, len(parts)), InnerLoop(epochs=3, batch_size=5, **given)
    for align in ("epochs", "end"):
        together = run_inner_loop(
            net,
            hyper,
            EpochBatches(parts, range(4), epochs=3, batch_size=5, align=align, fewest=3),
            statistics="corrected",
            optimizer=optimizer_of(inner),
        )
        for c, part in enumerate(parts):
            alone = run_inner_loop(
                net,
                Hyperparams.stack([hyper[c]]),
                EpochBatches([part], [c], epochs=3, batch_size=5),
                statistics="corrected",
                optimizer=optimizer_of(inner),
            )
            for name, value in alone.params.items():
                # At mix 1 the gradient of the bias before the norm is 0 but for rounding, and Adam
                # divides that by its own size.
                zero = name == "0.bias" and given.get("optimizer") == "adam"
                atol = 1e-5 if zero else 1e-7
                torch.testing.assert_close(together.params[name][c], value[0], rtol=1e-7, atol=atol)
            for name, value in alone.moments.items():
                torch.testing.assert_close(together.moments[name][c], value[0])


def test_a_rate_of_zero_holds_a_tensor_that_would_decay(given: dict[str, Any]) -> None:
    net = FunctionalModel(settled(mlp(norm=False)))
    hyper = hyperparams(net, 3)
    hyper.rate[:, 0] = 0  # of all clients, so that it is not differentiated
    hyper.rate[1, 1] = 0  # of one
    batches = [tuple(t.expand(3, *t.shape[1:]) for t in b) for b in cut(examples(8, 4), SIZE)]
    state = run_inner_loop(net, hyper, batches, statistics="global", optimizer=optimizer(given))
    first, second = net.sites.params[:2]
    start = net.start(3).params
    assert torch.equal(state.params[first], start[first])
    still = (state.params[second] == start[second]).flatten(1).all(1)
    assert still.tolist() == [False, True, False]


def test_moments_go_on_where_a_loop_is_cut(given: dict[str, Any]) -> None:
    net, how = FunctionalModel(settled(mlp())), optimizer(given)
    hyper, batches = hyperparams(net), cut(examples(24, 4), SIZE)
    whole = run_inner_loop(net, hyper, batches, statistics="corrected", optimizer=how)
    half = run_inner_loop(net, hyper, batches[:3], statistics="corrected", optimizer=how)
    ours = run_inner_loop(
        net, hyper, batches[3:], statistics="corrected", start=half, optimizer=how
    )
    for name, value in whole.params.items():
        assert torch.equal(ours.params[name], value)
    assert ours.moments.keys() == whole.moments.keys()


# ------------------------------------------------------------ where it is reached


def test_finetune_and_personalize_take_it(given: dict[str, Any]) -> None:
    model = partly_frozen(ConvNet(1))
    pair = examples(12, 2, 5)
    how = {"epochs": 2, "batch_size": 4, "statistics": "global"}
    rate = hyperparams(FunctionalModel(model))[0]
    tuned = finetune(model, rate, pair, **how, **given)
    order = EpochBatches([Examples(*pair)], [0], epochs=2, batch_size=4)
    expected = by_torch(partly_frozen(ConvNet(1)), list(order), rate.rate, given)
    for name, value in tuned.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name])
    nets = MetaNets(find_sites(model), seed=0)
    made = personalize(model, nets, pair, **how, **given)
    seen = profile(model, [pair], groups=nets.config.profile)
    same = finetune(model, nets(seen), pair, **how, **given)
    for name, value in made.model.state_dict().items():
        torch.testing.assert_close(value, same.state_dict()[name])


def people(count: int) -> list[Client]:
    parts = [[Examples(*examples(n, 4, seed=10 * i + n)) for n in (12, 8, 8)] for i in range(count)]
    return [Client(f"c{i}", ClientData(*part), seed=i) for i, part in enumerate(parts)]


def test_early_stopping_keeps_an_epoch_of_the_same_run(given: dict[str, Any]) -> None:
    net = FunctionalModel(settled(mlp()))
    hyper, clients = hyperparams(net, 4), people(4)
    stopped = finetune_stack(
        net, clients, hyper, InnerLoop(epochs=4, batch_size=4, early_stopping=True, **given)
    )
    epochs = [
        finetune_stack(net, clients, hyper, InnerLoop(epochs=e, batch_size=4, **given)).params
        for e in range(5)
    ]
    for c in range(4):
        assert any(
            all(torch.equal(stopped.params[k][c], params[k][c]) for k in params)
            for params in epochs
        )


@pytest.mark.parametrize("name", ["fedl2p", "gridsearch", "finetuning-client", "fedper"])
def test_methods_follow_it_and_threads_change_no_bit(name: str) -> None:
    model, clients = settled(mlp(), dtype=torch.float32), people(21)
    losses = {}
    before = torch.get_num_threads()
    try:
        for kind, given in OPTIMIZERS.items():
            method = build(
                name,
                Settings(
                    finetune=InnerLoop(epochs=2, batch_size=8, **given),
                    finetune_rate=0.01,
                    grid=Grid(mixes=(0.5,), rates=(0.01,)),
                    baselines=Baselines(rate=0.01),
                ),
            )
            state = method.start(model, seed=0)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                updates = method.train(model, state, clients[:12]) if name == "fedl2p" else []
                assert all(update.failure is None for update in updates)
                outcomes = method.personalize(model, state, clients)
                found = [o.loss for o in outcomes]
                assert losses.setdefault(kind, found) == found
    finally:
        torch.set_num_threads(before)
    assert len({loss[0] for loss in losses.values()}) == len(OPTIMIZERS)


# ------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "rmsprop"}, "optimizer is 'rmsprop', but must be one of sgd, adam"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"momentum": -0.1}, "momentum is -0.1"),
        ({"momentum": float("nan")}, "momentum is nan"),
        ({"momentum": 0.9, "optimizer": "adam"}, "adam has its own"),
        ({"weight_decay": -1e-4}, "weight_decay is -0.0001"),
        ({"weight_decay": float("inf")}, "weight_decay is inf"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InnerLoop(**settings)


def test_a_study_with_a_mode_for_plain_sgd_is_refused() -> None:
    with pytest.raises(ValueError, match="mode 'published' is for plain SGD"):
        Settings(finetune=InnerLoop(momentum=0.9), meta=MetaLearning.published())


@pytest.mark.parametrize("name", ["ditto", "apfl"])
def test_methods_with_steps_of_their_own_refuse_it(name: str) -> None:
    with pytest.raises(ValueError, match=f"leave out {name}"):
        build(name, Settings(finetune=InnerLoop(weight_decay=0.1)))


def test_baselines_do_not_take_adam_at_the_rate_of_local_training() -> None:
    adam = InnerLoop(optimizer="adam")
    with pytest.raises(ValueError, match="give baselines"):
        build("fedper", Settings(finetune=adam))
    assert build("fedper", Settings(finetune=adam, baselines=Baselines(rate=1e-3)))
