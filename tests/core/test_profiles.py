"""Profiles against closed forms and against the whole data in one piece."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from fedl2p.core.profiles import EPS, Profile, Profiler, profile, symmetric_kl
from fedl2p.core.sites import find_sites
from support.core_nets import ConvNet, SharedNorm, UnusedNorm, examples, mlp, settled
from support.nets import nested_net


def by_hand(model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Divergences and moments of the whole data, through hooks and torch.distributions."""
    model = copy.deepcopy(model).eval()
    sites, modules = find_sites(model), dict(model.named_modules())
    inputs: dict[str, list[Tensor]] = {name: [] for name in sites.layers}
    for name in sites.layers:
        modules[name].register_forward_pre_hook(
            lambda _, args, name=name: inputs[name].append(args[0].detach())
        )
    model(x)
    divergences = []
    for name in sites.norms:
        norm = modules[name]
        # positions of all calls of a shared layer side by side: (channels, values)
        seen = torch.cat([i.transpose(0, 1).flatten(1) for i in inputs[name]], 1)
        ours = Normal(seen.mean(1), (seen.var(1, correction=1) + 1e-5).sqrt())
        theirs = Normal(norm.running_mean, (norm.running_var + 1e-5).sqrt())
        both = kl_divergence(theirs, ours) + kl_divergence(ours, theirs)
        divergences.append((both / 2).mean())
    whole = [torch.cat([i.flatten() for i in inputs[name]]) for name in sites.layers]
    moments = [torch.stack([w.mean(), (w.var(correction=1) + 1e-5).sqrt()]) for w in whole]
    return divergences, moments


def same(ours: Profile, theirs: Profile, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours.divergence, theirs.divergence, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.moments, theirs.moments, rtol=tolerance, atol=tolerance)
    assert ours.num_examples == theirs.num_examples
    assert ours.sites == theirs.sites


NETS = {
    "nested": (nested_net, (1, 6, 6)),
    "1d": (lambda: settled(ConvNet(1)), (2, 5)),
    "2d": (lambda: settled(ConvNet(2)), (2, 5, 4)),
    "3d": (lambda: settled(ConvNet(3)), (2, 3, 4, 3)),
    "flat": (lambda: settled(mlp()), (4,)),
    "shared norm": (lambda: settled(SharedNorm()), (4,)),
}


@pytest.fixture(params=NETS.values(), ids=NETS.keys())
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    build, shape = request.param
    return build(), examples(13, *shape)[0]


# ------------------------------------------------------------ closed forms


@pytest.mark.parametrize("seed", range(3))
def test_symmetric_kl_is_that_of_torch(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    m_g, m_c = 3 * torch.randn(2, 20, generator=generator, dtype=torch.float64)
    v_g, v_c = torch.exp(4 * torch.randn(2, 20, generator=generator, dtype=torch.float64))
    g, c = Normal(m_g, v_g.sqrt()), Normal(m_c, v_c.sqrt())
    expected = (kl_divergence(g, c) + kl_divergence(c, g)) / 2
    torch.testing.assert_close(symmetric_kl(m_g, v_g, m_c, v_c), expected, rtol=1e-10, atol=1e-12)


def test_symmetric_kl_of_known_values() -> None:
    one, two = torch.ones(1).double(), 2 * torch.ones(1).double()
    # equal variances: distance^2 / (2 v); equal means: (r + 1/r - 2) / 4
    torch.testing.assert_close(symmetric_kl(one, two, 4 * one, two), torch.tensor([9 / 4]).double())
    torch.testing.assert_close(symmetric_kl(one, one, one, two), torch.tensor([0.125]).double())
    assert symmetric_kl(one, two, one, two) == 0


def test_symmetric_kl_is_symmetric_and_never_negative() -> None:
    generator = torch.Generator().manual_seed(4)
    m = torch.randn(2, 1000, generator=generator).double()
    v = torch.rand(2, 1000, generator=generator).double() + 1e-3
    there, back = symmetric_kl(m[0], v[0], m[1], v[1]), symmetric_kl(m[1], v[1], m[0], v[0])
    torch.testing.assert_close(there, back)
    assert (there >= 0).all()


def test_a_profile_is_the_closed_form_of_the_whole_data(case) -> None:
    model, x = case
    ours = profile(model, x.split(4))
    divergences, moments = by_hand(model, x)
    torch.testing.assert_close(ours.divergence, torch.stack(divergences), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.moments, torch.stack(moments), rtol=1e-10, atol=1e-12)
    assert ours.num_examples == 13
    assert ours.sites == find_sites(model)
    assert (ours.divergence > 1e-3).all(), "client and global statistics must differ here"


# ------------------------------------------------------------ how the data is cut


@pytest.mark.parametrize("sizes", [[1] * 13, [12, 1], [1, 12], [5, 1, 7], [0, 6, 0, 7]])
def test_the_cut_into_batches_does_not_matter(case, sizes: list[int]) -> None:
    model, x = case
    same(profile(model, x.split(sizes)), profile(model, [x]))


def test_order_does_not_matter(case) -> None:
    model, x = case
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    same(profile(model, x[order].split(3)), profile(model, x.split(4)))


def test_large_offsets_lose_no_digits() -> None:
    """Sums of squares would: mean 1e6, variance 1."""
    model = settled(nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 2)))
    x = 1e6 + examples(64, 1)[0]
    ours = profile(model, x.split(5))
    assert ours.moments[0, 1] == pytest.approx(float((x.var() + EPS).sqrt()), rel=1e-9)


def test_a_single_example_has_variance_0() -> None:
    model = settled(mlp())
    x = examples(1, 4)[0]
    ours = profile(model, [x])
    with torch.no_grad():
        seen = model[0](x)[0]
    norm = model[1]
    expected = symmetric_kl(
        norm.running_mean, norm.running_var + EPS, seen, torch.full((6,), EPS).double()
    ).mean()
    torch.testing.assert_close(ours.divergence[0], expected)
    assert ours.num_examples == 1
    assert ours.moments.isfinite().all()


def test_batches_may_be_pairs_or_a_generator() -> None:
    model, (x, y) = settled(mlp()), examples(12, 4)
    pairs = zip(x.split(5), y.split(5), strict=True)
    same(profile(model, pairs), profile(model, iter(x.split(5))))


# ------------------------------------------------------------ what the numbers mean


def test_a_client_like_the_global_model_has_no_divergence() -> None:
    """Running statistics set to those of the data itself, layer after layer."""
    model, x = nested_net(), examples(16, 1, 6, 6)[0]
    assert profile(model, [x]).divergence.max() > 0.01
    for _ in find_sites(model).norms:  # an earlier norm changes the input of the later ones
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.register_forward_pre_hook(adopt)
        model.eval()(x)
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm._forward_pre_hooks.clear()
    assert profile(model, [x]).divergence.max() < 1e-12


def adopt(norm: nn.Module, args: tuple[Tensor]) -> None:
    norm.running_mean.copy_(args[0].detach().mean((0, 2, 3)))
    norm.running_var.copy_(args[0].detach().transpose(0, 1).flatten(1).var(1, correction=1))


def test_a_shifted_client_diverges_more_the_further_it_is() -> None:
    model, x = settled(mlp()), examples(40, 4)[0]
    seen = [float(profile(model, [x + shift]).divergence[0]) for shift in (0.0, 2.0, 4.0)]
    assert seen[0] < seen[1] < seen[2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_dead_channel_gives_a_large_but_finite_divergence(dtype: torch.dtype) -> None:
    model = settled(nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 2)), dtype=dtype)
    ours = profile(model, [torch.zeros(8, 1)])
    expected = (float(model[0].running_var) + float(model[0].running_mean) ** 2) / (4 * EPS)
    assert ours.divergence.isfinite().all()
    assert float(ours.divergence) == pytest.approx(expected, rel=1e-3)
    assert float(ours.divergence) > 1000


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("build", "layer"), [(lambda: mlp(), "'1'"), (lambda: mlp(norm=False), "'0'")]
)
def test_values_that_are_not_finite_are_an_error_that_names_the_layer(build, layer, bad) -> None:
    x = examples(6, 4)[0]
    x[3, 1] = bad
    with pytest.raises(ValueError, match=f"layer {layer} is not finite"):
        profile(settled(build()), x.split(2))


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 4)]])
def test_no_example_is_an_error(batches: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="no example"):
        profile(settled(mlp()), batches)


# ------------------------------------------------------------ unusual models


def test_a_layer_that_never_runs_says_nothing() -> None:
    model, x = settled(UnusedNorm()), examples(9, 4)[0]
    ours = profile(model, [x])
    divergence = dict(zip(ours.sites.norms, ours.divergence, strict=True))
    moments = dict(zip(ours.sites.layers, ours.moments, strict=True))
    assert divergence["extra.1"] == 0
    assert divergence["norm"] > 0
    nothing = torch.tensor([0.0, EPS**0.5], dtype=torch.float64)
    for name in ("extra.0", "extra.1"):
        torch.testing.assert_close(moments[name], nothing)


def test_without_batch_norm_there_are_moments_only() -> None:
    ours = profile(settled(mlp(norm=False)), [examples(9, 4)[0]])
    assert ours.divergence.shape == (0,)
    assert ours.moments.shape == (2, 2)


def test_norms_without_running_statistics_are_profiled_as_layers() -> None:
    ours = profile(settled(ConvNet(2, track_running_stats=False)), [examples(9, 2, 4, 4)[0]])
    assert ours.divergence.shape == (0,)
    assert ours.moments.shape == (5, 2)


def test_it_is_evaluated_on_global_statistics_without_dropout() -> None:
    model = settled(
        nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3))
    )
    model.train()
    x = examples(9, 4)[0]
    same(profile(model, [x]), profile(model, [x]))
    assert model.training
    with torch.no_grad():
        last = model.eval()[1](model[0](x))
    torch.testing.assert_close(profile(model, [x]).moments[2, 0], last.mean())


def test_a_profiler_starts_afresh_for_each_client() -> None:
    model = settled(mlp())
    one, two = examples(9, 4)[0], 3 * examples(7, 4, seed=1)[0]
    profiler = Profiler(model)
    first = profiler([one])
    profiler([two])
    same(profiler([one]), first)
    same(profiler([two]), profile(model, [two]))


def test_sites_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="another model"):
        profile(settled(mlp()), [examples(3, 4)[0]], sites=find_sites(nested_net()))


def test_a_stack_of_profiles() -> None:
    model = settled(mlp())
    many = [profile(model, [examples(n, 4, seed=n)[0]]) for n in (3, 5)]
    stacked = Profile.stack(many)
    assert stacked.divergence.shape == (2, 1)
    assert stacked.moments.shape == (2, 3, 2)
    assert stacked.num_examples == 8
    assert torch.equal(stacked.moments[1], many[1].moments)
