"""Mixed batch-norm and fine-tuning against plain torch, and what must stay untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.core.finetuning.batches import Batches, EpochBatches
from fedl2p.core.finetuning.inner_loop import (
    DivergedError,
    finetune,
    fold_client,
    inner_batches,
    run_inner_loop,
)
from fedl2p.core.functional.mixed_norm import MarkedMean, MixedNorm
from fedl2p.core.functional.model import FunctionalModel, ModelState
from fedl2p.core.functional.workspace import Workspace
from fedl2p.core.hypergradients.estimators import hypergradient
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.objective import Objective
from fedl2p.core.profiles import profile
from fedl2p.core.settings import MODES, InnerLoop, Statistics
from fedl2p.core.sites import find_sites
from support.core_nets import (
    NORMS,
    ConvNet,
    SharedNorm,
    TiedWeights,
    cut,
    examples,
    mlp,
    plain_training,
    settled,
)
from support.nets import NestedNet, nested_net

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def tune(
    model: nn.Module,
    batches: Batches,
    *,
    mix: float | list[float],
    rate: float | dict[str, float] = 0.1,
    statistics: Statistics = "corrected",
) -> tuple[nn.Module, FunctionalModel, ModelState, Hyperparams]:
    """Fine-tune one client on given batches; also return the parts it was made of."""
    net = FunctionalModel(model)
    sites = net.sites
    mixes = [mix] * len(sites.norms) if isinstance(mix, float) else mix
    rates = [rate if isinstance(rate, float) else rate[name] for name in sites.params]
    double = (torch.tensor(values, dtype=torch.float64) for values in ([mixes], [rates]))
    hyper = Hyperparams(*double, sites).to(net.device, net.dtype)
    state = run_inner_loop(net, hyper, batches, statistics=statistics)
    return fold_client(net, state, hyper.mix, 0), net, state, hyper


def same(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-6) -> None:
    """Compare every tensor but the counters of batches."""
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    for name, value in mine.items():
        if "num_batches_tracked" not in name:
            torch.testing.assert_close(
                value,
                other[name],
                rtol=tolerance,
                atol=tolerance,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def reset_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: ConvNet(1), (2, 6)),
    "2d": (lambda: ConvNet(2), (2, 5, 4)),
    "3d": (lambda: ConvNet(3), (2, 3, 4, 3)),
    "2d without affine": (lambda: ConvNet(2, affine=False), (2, 4, 4)),
    "2d other momentum and eps": (lambda: ConvNet(2, momentum=0.3, eps=1e-2), (2, 4, 4)),
    "1d flat": (mlp, (4,)),
    "without batch-norm": (lambda: mlp(norm=False), (4,)),
    "shared norm": (SharedNorm, (4,)),
    "tied weights": (TiedWeights, (4,)),
    "norm without statistics": (lambda: ConvNet(2, track_running_stats=False), (2, 4, 4)),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Return a model and five batches, the last one smaller."""
    build, shape = request.param
    return settled(build()), cut(examples(22, *shape), 5)


def some_rates(model: nn.Module) -> dict[str, float]:
    return {name: 0.05 + 0.02 * i for i, name in enumerate(find_sites(model).params)}


# ------------------------------------------------------------ the two ends against plain torch


def test_mix_0_is_plain_fine_tuning_with_frozen_global_statistics(case) -> None:
    model, batches = case
    rates = some_rates(model)
    ours, *_ = tune(model, batches, mix=0.0, rate=rates)
    theirs = plain_training(copy.deepcopy(model), batches, rates, frozen_statistics=True)
    same(ours, theirs)
    assert not torch.equal(next(ours.parameters()), next(model.parameters())), (
        "nothing moved, so nothing was compared"
    )


def test_mix_1_is_plain_batch_norm_training_from_reset_statistics(case) -> None:
    model, batches = case
    rates = some_rates(model)
    ours, *_ = tune(model, batches, mix=1.0, rate=rates, statistics="published")
    same(ours, plain_training(reset_statistics(copy.deepcopy(model)), batches, rates))


def test_mix_1_with_global_statistics_is_plain_training_that_goes_on(case) -> None:
    model, batches = case
    rates = some_rates(model)
    ours, *_ = tune(model, batches, mix=1.0, rate=rates, statistics="global")
    same(ours, plain_training(copy.deepcopy(model), batches, rates))


def test_corrected_statistics_are_the_published_ones_without_their_start(case) -> None:
    model, batches = case
    ours, *_ = tune(model, batches, mix=1.0, statistics="corrected")
    recipe = plain_training(reset_statistics(copy.deepcopy(model)), batches, 0.1)
    for name, norm in recipe.named_modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats:
            start = (1 - norm.momentum) ** int(norm.num_batches_tracked)
            assert 0.1 < start < 0.9
            mine = ours.get_submodule(name)
            mean, var = norm.running_mean / (1 - start), (norm.running_var - start) / (1 - start)
            torch.testing.assert_close(mine.running_mean, mean, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(mine.running_var, var, rtol=1e-7, atol=1e-9)


def test_corrected_statistics_after_one_step_are_the_batchs_own() -> None:
    model = settled(nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 3)))
    x, y = examples(7, 2, 3, 3)
    ours, *_ = tune(model, [(x[None], y[None])], mix=1.0)
    torch.testing.assert_close(ours[0].running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(ours[0].running_var, x.var((0, 2, 3), correction=1))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_formula_of_the_layer(dims: int, mix: float) -> None:
    """(x - mean) / sd by hand, in both modes, gradients included."""
    norm = settled(NORMS[dims](3))
    layer = copy.deepcopy(norm)
    mixed = MixedNorm(layer)
    mixed.values = torch.tensor(mix, dtype=torch.float64), *mixed.values[1:]
    x = examples(6, 3, *(4,) * dims)[0].requires_grad_()
    flat = x.transpose(0, 1).flatten(1)
    shape = (1, 3, *(1,) * dims)

    def by_hand(mean: Tensor, var: Tensor) -> Tensor:
        mean = (1 - mix) * norm.running_mean + mix * mean
        var = (1 - mix) * norm.running_var + mix * var
        weight, bias = layer.weight.view(shape), layer.bias.view(shape)
        return (x - mean.view(shape)) / (var + 1e-5).sqrt().view(shape) * weight + bias

    expected = by_hand(flat.mean(1), flat.var(1, correction=0))
    ours = layer.train()(x)
    torch.testing.assert_close(ours, expected)
    towards = torch.randn_like(x)
    for a, b in zip(
        torch.autograd.grad(ours, [x, layer.weight], towards, retain_graph=True),
        torch.autograd.grad(expected, [x, layer.weight], towards),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        ours = layer.eval()(x)
        torch.testing.assert_close(ours, by_hand(flat.mean(1), flat.var(1, correction=1)))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_an_input_of_wrong_dimension_is_refused_as_torch_does(dims: int) -> None:
    layer = NORMS[dims](3)
    MixedNorm(layer)
    with pytest.raises(ValueError, match=r"expected .* input"):
        layer(torch.randn(2, 3, *(4,) * (dims + 1)))


# ------------------------------------------------------------ folding


@pytest.mark.parametrize("statistics", ["corrected", "published", "global"])
@pytest.mark.parametrize("mix", [[0.0, 1.0], [0.2, 0.7]])
def test_the_folded_model_computes_what_the_mixed_one_does(
    statistics: Statistics, mix: list[float]
) -> None:
    model = settled(ConvNet(2))
    ours, net, state, hyper = tune(
        model, cut(examples(22, 2, 4, 4), 5), mix=mix, statistics=statistics
    )
    x = examples(9, 2, 4, 4, seed=1)[0]
    mixed, _ = net.logits(state, hyper.mix, x[None], training=False)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), mixed[0], rtol=1e-9, atol=1e-9)


def test_the_folded_model_is_the_users_own_class_with_plain_batch_norm() -> None:
    model = nested_net()
    ours = finetune(model, constant(model), examples(20, 1, 6, 6), epochs=1, batch_size=8)
    assert type(ours) is NestedNet
    kinds = {name: type(m) for name, m in ours.named_modules()}
    assert kinds == {name: type(m) for name, m in model.named_modules()}
    fresh = NestedNet().double()
    fresh.load_state_dict(ours.state_dict(), strict=True)
    x = examples(4, 1, 6, 6, seed=3)[0]
    assert torch.equal(fresh.eval()(x), ours.eval()(x))


def constant(model: nn.Module, mix: float = 0.4, rate: float = 0.05) -> Hyperparams:
    return Hyperparams.constant(find_sites(model), mix=mix, rate=rate)


def test_each_norm_and_tensor_gets_its_own_entry() -> None:
    model = settled(ConvNet(2))
    rates = dict.fromkeys(find_sites(model).params, 0.0) | {"conv2.weight": 0.2}
    ours, *_ = tune(model, cut(examples(10, 2, 4, 4), 5), mix=[0.0, 1.0], rate=rates)
    changed = {
        name
        for name, value in ours.state_dict().items()
        if not torch.equal(value, model.state_dict()[name])
    }
    assert changed == {"conv2.weight", "norm2.running_mean", "norm2.running_var"}


# ------------------------------------------------------------ the caller's model


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything a caller could notice: values, writes, flags, hooks and gradients."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "values": {k: v.detach().clone() for k, v in tensors.items()},
        "identities": {k: (id(v), v.data_ptr(), v._version) for k, v in tensors.items()},
        "flags": {k: m.training for k, m in model.named_modules()},
        "requires_grad": {k: v.requires_grad for k, v in tensors.items()},
        "gradients": {k: v.grad for k, v in tensors.items()},
        "types": {k: type(m) for k, m in model.named_modules()},
        "hooks": {
            k: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for k, m in model.named_modules()
        },
    }


USES: dict[str, Callable[[nn.Module, tuple[Tensor, Tensor]], object]] = {
    "finetune": lambda m, d: finetune(m, constant(m), d, epochs=2, batch_size=5),
    "profile": lambda m, d: profile(m, d[0].split(5)),
    **{
        f"hypergradient {mode}": lambda m, d, mode=mode: hypergradient(
            m, constant(m), [d, d], d, mode=mode
        )
        for mode in MODES
    },
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_the_callers_model_is_untouched(use: Callable[..., object]) -> None:
    model = nested_net()
    model.train()
    model.blocks[0].eval()
    model.head.bias.requires_grad_(False)
    model.stem[0].register_forward_hook(lambda *_: None)
    before = snapshot(model)
    use(model, examples(12, 1, 5, 5))
    after = snapshot(model)
    values, then = after.pop("values"), before.pop("values")
    assert after == before
    assert all(torch.equal(values[k], then[k]) for k in then)


def test_the_folded_model_keeps_flags_and_shares_no_memory() -> None:
    model = nested_net()
    model.blocks[0].eval()
    model.head.bias.requires_grad_(False)
    ours = finetune(model, constant(model), examples(12, 1, 5, 5), epochs=1)
    before, after = snapshot(model), snapshot(ours)
    assert after["flags"] == before["flags"]
    assert after["requires_grad"] == before["requires_grad"]
    mine = {v.data_ptr() for v in ours.state_dict().values()}
    assert mine.isdisjoint({v.data_ptr() for v in model.state_dict().values()})


def test_frozen_parameters_do_not_change_and_the_others_do() -> None:
    model = nested_net()
    model.stem.requires_grad_(False)
    ours = finetune(model, constant(model), examples(12, 1, 5, 5), epochs=2)
    for name, value in ours.named_parameters():
        assert torch.equal(value, model.get_parameter(name)) == name.startswith("stem"), name


@pytest.mark.parametrize("statistics", ["corrected", "published"])
def test_frozen_parameters_equal_a_plain_loop(statistics: Statistics) -> None:
    model = settled(ConvNet(2))
    model.conv1.requires_grad_(False)
    model.norm2.weight.requires_grad_(False)
    batches = cut(examples(15, 2, 4, 4), 5)
    ours, *_ = tune(model, batches, mix=0.0, statistics=statistics)
    same(ours, plain_training(copy.deepcopy(model), batches, 0.1, frozen_statistics=True))


def test_buffers_that_a_layer_writes_in_training_do_not_carry_over() -> None:
    """Spectral norm writes its vectors in training: a second run must not start from them."""
    model = settled(
        nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)
        )
    )
    net = FunctionalModel(model)
    hyper = Hyperparams.stack([constant(model)]).to(net.device, net.dtype)
    batches = cut(examples(15, 4), 5)
    runs = [run_inner_loop(net, hyper, batches, statistics="corrected") for _ in "ab"]
    for name, value in runs[0].params.items():
        assert torch.equal(value, runs[1].params[name]), name


def test_tied_weights_stay_tied() -> None:
    model = settled(TiedWeights())
    ours = finetune(model, constant(model), examples(12, 4), epochs=2)
    assert ours.second.weight is ours.first.weight
    assert not torch.equal(ours.first.weight, model.first.weight)


# ------------------------------------------------------------ little data


@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("statistics", ["corrected", "published", "global"])
def test_one_sample_on_a_1_x_1_map_is_finite(mix: float, statistics: Statistics) -> None:
    """Plain batch-norm refuses such a batch; the reference gives NaN silently."""
    ours, *_ = tune(nested_net(), cut(examples(5, 1, 1, 1), 4), mix=mix, statistics=statistics)
    assert all(v.isfinite().all() for v in ours.state_dict().values())


def test_one_value_per_channel_has_no_variance_and_leaves_the_statistics_alone() -> None:
    model = settled(mlp())
    with_one, *_ = tune(model, cut(examples(5, 4), 4), mix=1.0, rate=0.0)
    without, *_ = tune(model, cut(examples(5, 4), 4)[:1], mix=1.0, rate=0.0)
    same(with_one, without, 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_one_sample_on_a_1_x_1_map_are_finite(mode: str) -> None:
    model = nested_net()
    one = examples(1, 1, 1, 1)
    found = hypergradient(model, constant(model), [one, one], one, mode=mode)
    values = torch.tensor([*found["mix"].values(), *found["rate"].values()])
    assert values.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 6, 6), (1, 1, 1)])
def test_a_client_with_one_example(shape: tuple[int, ...]) -> None:
    model = nested_net()
    ours = finetune(model, constant(model), examples(1, *shape), epochs=3)
    assert all(v.isfinite().all() for v in ours.state_dict().values())
    assert not torch.equal(ours.head.bias, model.head.bias)


def test_0_epochs_leave_the_model_as_it_is() -> None:
    model = nested_net()
    ours = finetune(model, constant(model, mix=1.0), examples(12, 1, 5, 5), epochs=0)
    same(ours, model, 0.0)
    assert ours is not model


def test_divergence_is_an_error_that_says_what_to_do() -> None:
    model = settled(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), dtype=torch.float32)
    data = examples(12, 4, dtype=torch.float32)
    with pytest.raises(DivergedError, match="smaller rates"):
        finetune(model, constant(model, rate=1e30), data, epochs=3)


@pytest.mark.parametrize("part", ["mix", "epochs", "batch_size", "statistics"])
def test_wrong_settings_are_refused(part: str) -> None:
    if part == "mix":
        with pytest.raises(ValueError, match="another model"):
            finetune(settled(mlp()), constant(nested_net()), examples(3, 4))
        return
    wrong = {"epochs": -1, "batch_size": 0, "statistics": "exact"}[part]
    with pytest.raises(ValueError, match=f"{part} is"):
        InnerLoop(**{part: wrong})


# ------------------------------------------------------------ dtype and device


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-4), (torch.float64, 1e-9), (torch.bfloat16, 0.15)],
    ids=["float32", "float64", "bfloat16"],
)
def test_dtype_and_device_are_kept(device: str, dtype: torch.dtype, tolerance: float) -> None:
    model = settled(ConvNet(2))
    x, y = examples(12, 2, 4, 4)
    exact = finetune(model, constant(model), (x, y), epochs=2, batch_size=5)
    low = copy.deepcopy(model).to(device, dtype)
    ours = finetune(low, constant(low), (x.to(dtype), y), epochs=2, batch_size=5)
    for name, value in ours.state_dict().items():
        assert value.device.type == device
        assert value.dtype == low.state_dict()[name].dtype
    same(copy.deepcopy(ours).cpu().double(), exact, tolerance)
    seen = profile(low, [x])
    assert seen.divergence.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert seen.divergence.device.type == device


def test_norms_in_float32_within_a_bfloat16_model() -> None:
    model = settled(mlp(), dtype=torch.bfloat16)
    model[1].float()
    x, y = examples(12, 4, dtype=torch.bfloat16)
    ours = finetune(model, constant(model, mix=0.3), (x, y), epochs=1, batch_size=5)
    assert ours[1].running_mean.dtype == torch.float32
    assert ours[0].weight.dtype == torch.bfloat16
    assert not torch.equal(ours[1].running_mean, model[1].running_mean)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    model = settled(mlp())
    x, y = examples(12, 4)
    ours = finetune(model, constant(model), (x, y.to(dtype)), epochs=1)
    same(ours, finetune(model, constant(model), (x, y), epochs=1), 0.0)


# ------------------------------------------------------------ batches, seeds and cohorts


def test_the_seed_alone_decides_the_result() -> None:
    model = settled(mlp())
    data = examples(20, 4)

    def run(seed: int) -> Tensor:
        return finetune(model, constant(model), data, epochs=2, batch_size=3, seed=seed)[0].weight

    first = run(1)
    torch.manual_seed(99)
    assert torch.equal(first, run(1))
    assert not torch.equal(first, run(2))


def test_every_epoch_holds_each_example_once_in_a_new_order() -> None:
    x = torch.arange(11.0).unsqueeze(1)
    batches = EpochBatches([Examples(x, x[:, 0].long())], [3], epochs=3, batch_size=4)
    assert len(batches) == 9
    epochs = [torch.cat([batches[3 * e + k][1][0] for k in range(3)]).tolist() for e in range(3)]
    assert [sorted(e) for e in epochs] == [list(range(11))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert [batches[k][1].shape[1] for k in range(3)] == [4, 4, 3]
    assert all(torch.equal(batches[k][0][..., 0].long(), batches[k][1]) for k in range(9))
    assert torch.equal(batches[2][1], batches[2][1]), "a step must give the same batch again"


def test_augmentation_is_drawn_per_client_and_step() -> None:
    x = torch.zeros(6, 2)
    client = ClientData(
        Examples(x, torch.zeros(6).long()),
        augment=lambda x, g: x + torch.rand(x.shape, generator=g),
    )
    plain = ClientData(client.train)
    net = FunctionalModel(settled(mlp()))
    inner = InnerLoop(epochs=2, batch_size=3)
    batches = inner_batches(net, [client, plain, client], [1, 1, 2], inner)
    assert torch.equal(batches[1][0], batches[1][0])
    assert not torch.equal(batches[1][0][0], batches[2][0][0])
    assert not torch.equal(batches[1][0][0], batches[1][0][2])
    assert torch.equal(batches[1][0][1], x[:3]), "a client without augmentation has its data"
    alone = inner_batches(net, [client], [2], inner)
    assert torch.equal(batches[3][0][2], alone[3][0][0])


COHORTS = {k: MODELS[k] for k in ("1d", "2d", "3d", "shared norm", "tied weights", "1d flat")}


@pytest.mark.parametrize("statistics", ["corrected", "published", "global"])
@pytest.mark.parametrize(("build", "shape"), COHORTS.values(), ids=COHORTS.keys())
def test_a_cohort_gives_each_client_what_it_gets_alone(
    build: Callable[[], nn.Module], shape: tuple[int, ...], statistics: Statistics
) -> None:
    net = FunctionalModel(settled(build()))
    data = [ClientData(Examples(*examples(11, *shape, seed=s))) for s in range(3)]
    inner = InnerLoop(epochs=2, batch_size=5, statistics=statistics)
    norms, params = len(net.sites.norms), len(net.sites.params)
    generator = torch.Generator().manual_seed(0)
    hyper = Hyperparams(
        torch.rand(3, norms, generator=generator, dtype=torch.float64),
        0.1 * torch.rand(3, params, generator=generator, dtype=torch.float64),
        net.sites,
    )
    together = run_inner_loop(
        net, hyper, inner_batches(net, data, [5, 6, 7], inner), statistics=statistics
    )
    for c in range(3):
        alone = run_inner_loop(
            net,
            Hyperparams.stack([hyper[c]]),
            inner_batches(net, [data[c]], [5 + c], inner),
            statistics=statistics,
        )
        for mine, theirs in ((together.params, alone.params), (together.stats, alone.stats)):
            for name, value in mine.items():
                torch.testing.assert_close(value[c], theirs[name][0], rtol=1e-10, atol=1e-12)


def test_a_workspace_keeps_the_modules_and_marks_each_norm_once() -> None:
    model = settled(SharedNorm())
    work = Workspace(model, find_sites(model), Objective())
    assert [type(m) for m in work.module.modules()] == [type(m) for m in model.modules()]
    norm = work.module.first[1]
    assert type(norm) is nn.BatchNorm1d
    assert work.module.second[1] is norm
    assert isinstance(norm.running_mean, MarkedMean)
    assert list(work.norms) == ["first.1"]
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in work.module.named_parameters()] == names
    plain = ConvNet(2, track_running_stats=False)
    assert Workspace(plain, find_sites(plain), Objective()).norms == {}
    norm = nn.BatchNorm1d(3)
    assert list(Workspace(norm, find_sites(norm), Objective()).norms) == [""]


def test_a_marked_mean_is_a_plain_tensor_to_all_but_batch_norm() -> None:
    norm = nn.BatchNorm1d(3)
    mean = norm.running_mean
    MixedNorm(norm)
    marked = norm.running_mean
    for value in (marked + 1, marked.clone(), marked.double(), torch.stack([marked, marked])):
        assert type(value) is Tensor
    marked.add_(1.0)
    assert torch.equal(mean, torch.ones(3)), "the memory is shared"


# ------------------------------------------------------------ dropout


def dropout_net() -> nn.Module:
    return settled(
        nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3))
    )


@pytest.mark.parametrize(("p", "stackable"), [(0.0, True), (0.5, False)])
def test_a_net_with_dropout_is_not_stacked(p: float, stackable: bool) -> None:
    net = FunctionalModel(nn.Sequential(nn.Linear(4, 3), nn.Dropout(p)))
    assert net.stackable(torch.randn(5, 4)) == stackable


def test_fine_tuning_with_dropout_depends_on_the_seed_alone() -> None:
    model = dropout_net()
    data = examples(20, 4)

    def run(seed: int) -> Tensor:
        return finetune(model, constant(model), data, epochs=2, batch_size=20, seed=seed)[0].weight

    torch.manual_seed(1)
    first = run(1)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, run(1))
    assert not torch.equal(first, run(2))
    torch.set_rng_state(state)
    run(1)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is the caller's"


def test_dropouts_masks_are_drawn_per_client_and_step() -> None:
    """One example has only one order, so only the masks can differ."""
    model = settled(nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 3)))
    data = examples(1, 4)

    def dropped(seed: int, epochs: int) -> Tensor:
        """Units that no step has moved."""
        ours = finetune(model, constant(model), data, epochs=epochs, seed=seed)
        return (ours[2].weight == model[2].weight).all(0)

    one, two = dropped(1, 1), dropped(2, 1)
    assert 16 < one.sum() < 48
    assert not torch.equal(one, two)
    assert dropped(1, 4).sum() < 12, "every step must draw its own mask"
