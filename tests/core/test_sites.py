"""Where hyperparameters act: found by type at any depth."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.sites import find_sites, is_mixable_norm
from support.core_nets import NORMS, ConvNet, SharedNorm, TiedWeights, mlp
from support.nets import nested_net


def test_layers_three_levels_deep_are_found_in_order() -> None:
    sites = find_sites(nested_net())
    assert sites.norms == (
        "stem.1",
        "blocks.0.norm1",
        "blocks.0.norm2",
        "blocks.1.norm1",
        "blocks.1.norm2",
        "blocks.1.shortcut.1",
    )
    assert sites.layers[:3] == ("stem.0", "stem.1", "blocks.0.conv1")
    assert len(sites.layers) == 13
    assert len(sites.params) == 21
    assert sites.head == ("head.weight", "head.bias")


def test_names_are_the_models_own() -> None:
    model = nested_net()
    sites = find_sites(model)
    assert sites.params == tuple(name for name, _ in model.named_parameters())
    modules = dict(model.named_modules())
    assert all(isinstance(modules[name], nn.BatchNorm2d) for name in sites.norms)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norms_of_every_dimension(dims: int, affine: bool) -> None:
    sites = find_sites(ConvNet(dims, affine=affine))
    assert sites.norms == ("norm1", "norm2")
    assert sites.layers == ("conv1", "norm1", "conv2", "norm2", "head")
    assert ("norm1.weight" in sites.params) == affine


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_norm_without_running_statistics_is_no_site_but_a_layer(dims: int) -> None:
    sites = find_sites(ConvNet(dims, track_running_stats=False))
    assert sites.norms == ()
    assert "norm1" in sites.layers
    assert "norm1.weight" in sites.params


def test_a_model_that_is_itself_a_norm() -> None:
    sites = find_sites(nn.BatchNorm1d(3))
    assert sites.norms == ("",)
    assert sites.params == ("weight", "bias")


def test_other_norms_have_no_statistics_to_mix() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4))
    sites = find_sites(model)
    assert sites.norms == ()
    assert sites.layers == ("0", "1")
    assert not any(is_mixable_norm(m) for m in model)


def test_a_shared_layer_appears_once_under_its_first_name() -> None:
    sites = find_sites(SharedNorm())
    assert sites.norms == ("first.1",)
    assert sites.layers == ("first.0", "first.1", "second.0", "head")
    assert [name for name in sites.params if name.startswith("second.1")] == []


def test_a_tied_parameter_appears_once_under_its_first_name() -> None:
    sites = find_sites(TiedWeights())
    assert "first.weight" in sites.params
    assert "second.weight" not in sites.params
    assert "second.bias" in sites.params


def test_a_head_whose_weight_is_tied_is_found_under_the_first_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert find_sites(model).head == ("0.weight", "2.bias")


def test_frozen_parameters_are_left_out() -> None:
    model = nested_net()
    model.stem.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    sites = find_sites(model)
    assert not any(name.startswith("stem") for name in sites.params)
    assert sites.head == ("head.weight",)
    assert "stem.1" in sites.norms, "statistics of a frozen layer can be mixed all the same"
    assert "stem.0" in sites.layers


def test_no_batch_norm_at_all() -> None:
    sites = find_sites(mlp(norm=False))
    assert sites.norms == ()
    assert sites.params == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert Hyperparams.constant(sites, mix=0.5, rate=0.1).mix.shape == (0,)


def test_no_trainable_parameter_is_an_error() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        find_sites(mlp().requires_grad_(False))


def test_a_lazy_layer_is_an_error_until_it_has_a_shape() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d(), nn.LazyLinear(2))
    with pytest.raises(ValueError, match="layer '1' is lazy"):
        find_sites(model)
    model(torch.randn(3, 4))
    assert find_sites(model).norms == ("1",)


@pytest.mark.parametrize("norm", NORMS.values())
def test_is_mixable_norm(norm: type[nn.Module]) -> None:
    assert is_mixable_norm(norm(3))
    assert not is_mixable_norm(norm(3, track_running_stats=False))


def test_hyperparams_refuse_a_shape_that_does_not_fit_the_sites() -> None:
    sites = find_sites(mlp())
    with pytest.raises(ValueError, match=r"mix has shape \(2,\)"):
        Hyperparams(torch.zeros(2), torch.zeros(6), sites)
    with pytest.raises(ValueError, match=r"rate has shape \(5,\)"):
        Hyperparams(torch.zeros(1), torch.zeros(5), sites)
    with pytest.raises(ValueError, match="both"):
        Hyperparams(torch.zeros(1), torch.zeros(3, 6), sites)


@pytest.mark.parametrize(
    ("mix", "rate", "what"),
    [(-0.1, 0.1, "mix"), (1.1, 0.1, "mix"), (0.5, -1.0, "rate"), (0.5, float("inf"), "rate")],
)
def test_constant_hyperparams_out_of_range(mix: float, rate: float, what: str) -> None:
    with pytest.raises(ValueError, match=f"{what} is"):
        Hyperparams.constant(find_sites(mlp()), mix=mix, rate=rate)


def test_a_cohort_of_hyperparams_gives_each_client_its_own() -> None:
    sites = find_sites(mlp())
    one = Hyperparams.constant(sites, mix=0.25, rate=0.5)
    two = Hyperparams.constant(sites, mix=0.75, rate=0.125)
    cohort = Hyperparams.stack([one, two])
    assert cohort.mix.shape == (2, 1)
    assert cohort[1].by_name() == {
        "mix": {"1": 0.75},
        "rate": dict.fromkeys(sites.params, 0.125),
    }
    with pytest.raises(ValueError, match="one client"):
        cohort.by_name()
