"""Integrated gradients: closed forms, completeness, a second derivation by finite differences."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor

from fedl2p.core.metanets import MetaNets
from fedl2p.core.profiles import Profile, profile
from fedl2p.core.settings import MetaNetsConfig
from fedl2p.core.sites import Sites, find_sites
from fedl2p.explain import attribution
from fedl2p.explain.attribution import (
    STEPS,
    Attribution,
    attribute,
    integrated_gradients,
    median_profile,
)
from support.core_nets import examples, mlp, settled

pytest.importorskip("captum")

SITES = Sites(
    norms=("n1", "n2", "n3"), layers=("c1", "n1", "n2", "head"), params=("w", "b", "v"), head=()
)
NORMS, ENTRIES = 3, 11
FORMS: dict[str, MetaNetsConfig] = {
    "default": MetaNetsConfig(profile=("published",)),
    "published": MetaNetsConfig.published(base_rate=0.01),
}


def values(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def made_up(seed: int, sites: Sites = SITES) -> Profile:
    """Return a profile whose divergences spread over orders of magnitude."""
    divergence = values(len(sites.norms), seed=seed).mul(1.5).exp()
    return Profile(divergence, values(len(sites.layers), 2, seed=seed + 500), 10, sites)


def nets(config: MetaNetsConfig, sites: Sites = SITES, *, size: float = 0.1) -> MetaNets:
    """Return meta-nets none of whose parts stands at its plain start."""
    made = MetaNets(sites, config=config, seed=3)
    with torch.no_grad():
        for i, (name, tensor) in enumerate(made.state_dict().items()):
            if tensor.numel():
                spread = size * values(*tensor.shape, seed=i).to(tensor)
                if name.startswith("base"):  # a negative rate would be cut off
                    tensor.mul_(1 + spread)
                else:
                    tensor.add_(spread)
    return made


def matrix(found: Attribution, field: str) -> Tensor:
    """Return one field of all hyperparameters, mixes before rates."""
    rows = [getattr(one, field) for one in (*found.mixes, *found.rates)]
    return torch.tensor(rows, dtype=torch.float64)


# ------------------------------------------------------------ any function


def test_a_linear_map_has_its_weights_times_the_differences() -> None:
    weight, start, end = values(4, 6, seed=1), values(6, seed=2), values(6, seed=3)
    found, gap = integrated_gradients(lambda z: z @ weight.T + 7.0, start, end)
    assert torch.allclose(found, weight * (end - start), rtol=1e-12)
    assert gap < 1e-12


def test_sums_of_functions_of_one_input_are_attributed_to_it() -> None:
    start, end = values(5, seed=2), values(5, seed=3)
    found, _ = integrated_gradients(
        lambda z: torch.stack([(z**3).sum(-1), z.exp().sum(-1)], dim=-1), start, end
    )
    exact = torch.stack([end**3 - start**3, end.exp() - start.exp()])
    assert torch.allclose(found, exact, atol=1e-5)


def test_a_product_is_shared_equally_from_zero() -> None:
    end = torch.tensor([3.0, -5.0, 2.0], dtype=torch.float64)
    found, _ = integrated_gradients(
        lambda z: (z[:, 0] * z[:, 1])[:, None], torch.zeros_like(end), end
    )
    assert found[0].tolist() == pytest.approx([-7.5, -7.5, 0.0], abs=1e-9)


def test_the_gap_says_how_far_attributions_do_not_add_up() -> None:
    """Only the points behind a kink at 0.7 of the path have a gradient."""
    end = torch.ones(2, dtype=torch.float64) / 2
    found, gap = integrated_gradients(
        lambda z: torch.relu(z.sum(-1, keepdim=True) - 0.7), torch.zeros_like(end), end
    )
    behind = sum((i + 0.5) / STEPS > 0.7 for i in range(STEPS)) / STEPS
    assert behind != pytest.approx(0.3, abs=1e-5)
    assert found.tolist() == [pytest.approx([behind / 2, behind / 2])]
    assert gap == pytest.approx(abs(behind - 0.3) / behind)


def test_the_opposite_direction_has_the_opposite_attributions() -> None:
    weight, start, end = values(3, 4, seed=1), values(4, seed=2), values(4, seed=3)

    def curved(z: Tensor) -> Tensor:
        return torch.tanh(z @ weight.T)

    forth, _ = integrated_gradients(curved, start, end)
    back, _ = integrated_gradients(curved, end, start)
    assert torch.allclose(forth, -back, rtol=1e-9)


def test_more_outputs_than_rows_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, start, end = values(7, 6, seed=1), values(6, seed=2), values(6, seed=3)
    monkeypatch.setattr(attribution, "ROWS", 3)
    found, _ = integrated_gradients(lambda z: z @ weight.T, start, end)
    assert torch.allclose(found, weight * (end - start), rtol=1e-12)


def test_two_equal_ends_leave_nothing_to_explain() -> None:
    end = values(4, seed=3)
    found, gap = integrated_gradients(lambda z: z.exp(), end, end)
    assert (found == 0).all()
    assert gap == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    end = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="not finite"):
        integrated_gradients(lambda z: z * bad, torch.zeros_like(end), end)


# ------------------------------------------------------------ the meta-nets


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS.keys())
def test_parts_add_up_to_the_change_before_the_bounds(config: MetaNetsConfig) -> None:
    metanets, here, there = nets(config), made_up(1), made_up(2)
    found = attribute(metanets, here, there)
    assert found.gap <= 0.01
    outputs, parts = matrix(found, "output"), matrix(found, "attributions")
    change = outputs - matrix(found, "typical_output")
    assert parts.shape == (NORMS + len(SITES.params), ENTRIES)
    assert ((parts.sum(1) - change).abs() <= 0.01 * parts.abs().sum(1)).all()
    assert (change.abs() > 1e-6).all()
    mix, rate = outputs.split([NORMS, len(SITES.params)])
    # Within the bounds these are the very hyperparameters that the client gets.
    wanted = metanets(here)
    assert torch.allclose(mix.clamp(0, 1), wanted.mix.double(), atol=1e-5)
    if config.form == "default":
        bounded = rate.exp().clamp(config.min_rate, config.max_rate)
    else:
        bounded = rate.clamp_min(0)
    assert torch.allclose(bounded, wanted.rate.double(), rtol=1e-4)
    assert torch.allclose(
        matrix(found, "value"), torch.cat([wanted.mix, wanted.rate]).double(), rtol=1e-4
    )


def raw_entries(p: Profile) -> Tensor:
    return torch.cat([p.divergence, p.moments.flatten()])


def path(name: str, there: Tensor, here: Tensor, along: Tensor) -> Tensor:
    """Return raw entries (N, E) on the way, as the documentation describes it."""
    points = there + along[:, None] * (here - there)
    if name == "default":
        shift = 1e-3  # log(shift + nats) is what the nets read
        ends = [(x[:NORMS] + shift).log() for x in (there, here)]
        points[:, :NORMS] = (ends[0] + along[:, None] * (ends[1] - ends[0])).exp() - shift
    return points


@pytest.mark.parametrize("name", FORMS)
def test_parts_agree_with_finite_differences_in_the_raw_profile(name: str) -> None:
    """The same line integral in nats and moments themselves, through MetaNets.forward."""
    config = dataclasses.replace(FORMS[name], initial_mix=0.5)
    metanets, here, there = nets(config, size=0.01).double(), made_up(1), made_up(2)

    @torch.no_grad()
    def outputs(raw: Tensor) -> Tensor:
        written = metanets(Profile(raw[:, :NORMS], raw[:, NORMS:].unflatten(1, (-1, 2)), 1, SITES))
        assert ((written.mix > 0) & (written.mix < 1)).all()  # no bound is met on the way
        rate = written.rate.log() if config.form == "default" else written.rate
        return torch.cat([written.mix, rate], dim=1)

    ends, pieces = (raw_entries(there), raw_entries(here)), 4000
    along = torch.linspace(0, 1, 2 * pieces + 1, dtype=torch.float64)
    points = path(name, *ends, along)
    middle, steps = points[1::2], points[2::2] - points[:-1:2]
    parts = []
    for i in range(ENTRIES):
        h = 1e-6 * middle[:, i].abs().clamp_min(1e-3)
        move = torch.zeros_like(middle)
        move[:, i] = h
        slope = (outputs(middle + move) - outputs(middle - move)) / (2 * h[:, None])
        parts.append((slope * steps[:, i, None]).sum(0))
    found = attribute(metanets, here, there)
    ours = matrix(found, "attributions")
    size = ours.abs().sum(1, keepdim=True)
    assert (size > 1e-6).all()
    assert ((torch.stack(parts, dim=1) - ours).abs() < 2e-3 * size).all()


def linear_nets(weight: Tensor) -> MetaNets:
    """Return nets whose mixes are linear in what they read: relu(z) - relu(-z) = z."""
    made = nets(MetaNetsConfig(hidden=2 * ENTRIES, profile=("published",))).double()
    eye = torch.eye(ENTRIES, dtype=torch.float64)
    with torch.no_grad():
        made.bnnet.hidden1.weight.copy_(torch.cat([eye, -eye]))
        made.bnnet.hidden2.weight.copy_(torch.eye(2 * ENTRIES))
        made.bnnet.hidden1.bias.zero_()
        made.bnnet.hidden2.bias.zero_()
        made.bnnet.out.weight.copy_(torch.cat([weight, -weight], dim=1))
    return made


def test_linear_nets_have_a_closed_form() -> None:
    weight = values(NORMS, ENTRIES, seed=9)
    metanets, here, there = linear_nets(weight), made_up(1), made_up(2)
    found = attribute(metanets, here, there)
    scales = metanets.input_scale.scale.detach()
    logs = ((here.divergence + 1e-3) / (there.divergence + 1e-3)).log()
    apart = torch.cat([logs, (here.moments - there.moments).flatten()])
    assert torch.allclose(
        matrix(found, "attributions")[:NORMS], weight * scales * apart, rtol=1e-9, atol=1e-12
    )


def test_an_entry_that_the_nets_ignore_has_no_part_and_a_push_has_its_sign() -> None:
    weight = torch.zeros(NORMS, ENTRIES, dtype=torch.float64)
    weight[0, 1], weight[1, 1] = 0.3, -0.3
    here, there = made_up(1), made_up(2)
    farther = Profile(here.divergence.clone(), here.moments, 10, SITES)
    farther.divergence[1] = 50.0 * there.divergence[1]
    found = attribute(linear_nets(weight), farther, there)
    mixes = matrix(found, "attributions")[:NORMS]
    assert mixes[0, 1] > 0.5
    assert mixes[1, 1] < -0.5
    mixes[:, 1] = 0
    assert (mixes == 0).all()


def test_nets_that_read_their_own_inputs_ignore_the_others() -> None:
    found = attribute(nets(FORMS["published"]), made_up(1), made_up(2))
    mixes, rates = matrix(found, "attributions").split([NORMS, len(SITES.params)])
    assert (mixes[:, NORMS:] == 0).all()
    assert (rates[:, :NORMS] == 0).all()
    assert (mixes[:, :NORMS] != 0).any()
    assert (rates[:, NORMS:] != 0).any()


def test_a_bound_hides_nothing() -> None:
    weight = torch.zeros(NORMS, ENTRIES, dtype=torch.float64)
    weight[0, 1] = 5.0
    here, there = made_up(1), made_up(2)
    far = Profile(here.divergence.clone(), here.moments, 10, SITES)
    far.divergence[1] = 50.0 * there.divergence[1]
    found = attribute(linear_nets(weight), far, there)
    assert found.mixes[0].value == 1.0
    assert found.mixes[0].output > 5.0
    assert found.mixes[0].at_bound
    assert found.mixes[0].attributions[1] == pytest.approx(found.mixes[0].change)


def test_a_model_without_norms_has_rates_only() -> None:
    model = settled(mlp(norm=False))
    sites = find_sites(model)
    here, there = (profile(model, [examples(20, 4, seed=s)[0] * s]) for s in (1, 2))
    found = attribute(nets(FORMS["default"], sites), here, there)
    assert not found.mixes
    assert matrix(found, "attributions").shape == (len(sites.params), 2 * len(sites.layers))
    assert (matrix(found, "attributions") != 0).any()
    assert found.gap <= 0.01


def test_the_nets_are_left_as_they_are() -> None:
    metanets = nets(FORMS["default"])
    before = copy.deepcopy(metanets.state_dict())
    attribute(metanets, made_up(1), made_up(2))
    for name, tensor in metanets.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == torch.float32
    assert all(p.grad is None for p in metanets.parameters())


def test_what_cannot_be_explained_is_refused() -> None:
    here, there = made_up(1), made_up(2)
    with pytest.raises(ValueError, match="same hyperparameters for every client"):
        attribute(nets(MetaNetsConfig(constant=True)), here, there)
    with pytest.raises(ValueError, match="index the stack"):
        attribute(nets(FORMS["default"]), Profile.stack([here, there]), there)
    other = Sites(norms=("x",), layers=("x",), params=("w",), head=())
    with pytest.raises(ValueError, match="another model"):
        attribute(nets(FORMS["default"]), made_up(1, other), made_up(2, other))


# ------------------------------------------------------------ the typical profile


def test_the_median_profile_goes_entry_by_entry() -> None:
    many = [made_up(i) for i in range(5)]
    many[2].divergence[0] = 2500.0  # a dead channel
    typical = median_profile(many)
    for i in range(NORMS):
        assert float(typical.divergence[i]) == sorted(float(p.divergence[i]) for p in many)[2]
    assert typical.moments.shape == (4, 2)
    even = median_profile(many[:2])
    middle = (many[0].moments + many[1].moments) / 2
    assert torch.allclose(even.moments, middle)
    assert torch.equal(median_profile([many[0]]).divergence, many[0].divergence)


def test_the_median_profile_of_nothing_or_of_two_models_is_refused() -> None:
    with pytest.raises(ValueError, match="no profile"):
        median_profile([])
    other = Sites(norms=("x",), layers=("x",), params=("w",), head=())
    with pytest.raises(ValueError, match="different models"):
        median_profile([made_up(1), made_up(1, other)])
