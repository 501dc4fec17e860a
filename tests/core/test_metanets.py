"""The meta-nets: clamps, initialisations, bounds, files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

from fedl2p.core.metanets import (
    SHARED_LR_SCALE,
    MetaNets,
    clamp_inward,
    clamp_straight_through,
)
from fedl2p.core.profile_groups import GROUPS
from fedl2p.core.profiles import Profile, profile
from fedl2p.core.settings import (
    PROFILE_GROUPS,
    PUBLISHED_PROFILE,
    Form,
    MetaNetsConfig,
    ProfileGroup,
)
from fedl2p.core.sites import Sites, find_sites
from support.core_nets import examples, mlp, settled
from support.nets import nested_net

LIKE_RESNET18 = Sites(
    norms=tuple(f"norm{i}" for i in range(20)),
    layers=tuple(f"layer{i}" for i in range(41)),
    params=tuple(f"param{i}" for i in range(62)),
    head=("param60", "param61"),
)

FORMS: dict[str, MetaNetsConfig] = {
    "default": MetaNetsConfig(),
    "published": MetaNetsConfig.published(),
    "small": MetaNetsConfig(hidden=8),
    "constant": MetaNetsConfig(constant=True),
    "constant published": MetaNetsConfig(form="published", constant=True),
}


@pytest.fixture(params=FORMS.values(), ids=FORMS.keys())
def form(request: pytest.FixtureRequest) -> MetaNetsConfig:
    return request.param


def made_up(sites: Sites, *, divergence: float = 1.0, seed: int = 0, clients: int = 0) -> Profile:
    """Return a profile with moments near a trained net's."""
    generator = torch.Generator().manual_seed(seed)
    front = (clients,) if clients else ()
    moments = torch.rand(*front, len(sites.layers), 2, generator=generator)
    spread = 0.5 + torch.rand(*front, len(sites.norms), generator=generator)
    return Profile(
        divergence * spread,
        moments,
        10,
        sites,
        gradients=torch.rand(*front, len(sites.params), generator=generator),
        loss=torch.rand(*front, 2, generator=generator),
        labels=torch.rand(*front, 3, generator=generator) + torch.tensor([1.0, 1.0, 0.0]),
        size=torch.randint(5, 100, (*front, 1), generator=generator).float(),
    )


# ------------------------------------------------------------ clamps

POINTS = [-5.0, -0.5, 0.0, 0.3, 1.0, 1.5, 40.0]


@pytest.mark.parametrize("clamp", [clamp_straight_through, clamp_inward])
def test_clamps_give_the_clamped_value_exactly(clamp: Callable[..., Tensor]) -> None:
    x = torch.cat([torch.tensor(POINTS), 1e8 * torch.randn(50), torch.rand(50)])
    assert torch.equal(clamp(x, 0.0, 1.0), x.clamp(0.0, 1.0))


def test_the_straight_through_clamp_has_gradient_1_everywhere() -> None:
    x = torch.tensor(POINTS, requires_grad=True)
    towards = torch.linspace(-2, 3, len(POINTS))
    (grad,) = torch.autograd.grad(clamp_straight_through(x, 0.0, 1.0), x, towards)
    assert torch.equal(grad, towards)


@pytest.mark.parametrize(
    ("towards", "expected"),
    [
        # descent with a positive gradient lowers the entry: blocked at and below the lower bound
        (1.0, [0, 0, 0, 1, 1, 1, 1]),
        (-1.0, [-1, -1, -1, -1, 0, 0, 0]),
    ],
)
def test_the_inward_clamp_blocks_steps_that_lead_further_outside(
    towards: float, expected: list[float]
) -> None:
    x = torch.tensor(POINTS, requires_grad=True)
    (grad,) = torch.autograd.grad(clamp_inward(x, 0.0, 1.0), x, torch.full((len(POINTS),), towards))
    assert grad.tolist() == expected


def test_the_inward_clamp_under_vmap() -> None:
    x = torch.tensor([POINTS, POINTS[::-1]], requires_grad=True)
    towards = torch.randn(2, len(POINTS), generator=torch.Generator().manual_seed(0))
    ours = vmap(lambda row: clamp_inward(row, 0.0, 1.0))(x)
    alone = torch.stack([clamp_inward(row, 0.0, 1.0) for row in x])
    assert torch.equal(ours, alone)
    (grad,) = torch.autograd.grad(ours, x, towards)
    assert torch.equal(grad, torch.autograd.grad(alone, x, towards)[0])
    assert (grad == 0).any()


def test_an_entry_behind_its_bound_comes_back_only_by_an_inward_gradient() -> None:
    """The gain of the inward clamp: descent does not wind an entry up behind its bound."""
    ends = {}
    for clamp in (clamp_straight_through, clamp_inward):
        x = torch.tensor(0.9, requires_grad=True)
        for target in [2.0] * 20 + [0.5] * 5:  # 20 steps pull beyond the bound, then 5 back
            (grad,) = torch.autograd.grad((clamp(x, 0.0, 1.0) - target) ** 2, x)
            x = (x - 0.1 * grad).detach().requires_grad_()
        ends[clamp] = float(clamp(x.detach(), 0.0, 1.0))
    assert ends[clamp_straight_through] == 1.0
    assert ends[clamp_inward] < 0.75


# ------------------------------------------------------------ initialisation


def test_published_number_of_floats_for_resnet18() -> None:
    nets = MetaNets(LIKE_RESNET18, config=MetaNetsConfig.published())
    assert sum(p.numel() for p in nets.parameters()) == 38_944
    assert list(nets.buffers()) == []


def test_published_initialisation() -> None:
    nets = MetaNets(LIKE_RESNET18, config=MetaNetsConfig.published(base_rate=1e-3))
    for net, bias in ((nets.bnnet, 0.5), (nets.lrnet, 1.0)):
        for layer in (net.hidden1, net.hidden2, net.out):
            assert (layer.bias == bias).all()
            outputs, inputs = layer.weight.shape
            sd = 0.1 * (2 / (inputs + outputs)) ** 0.5
            assert float(layer.weight.detach().std()) == pytest.approx(sd, rel=0.1)
            assert abs(float(layer.weight.detach().mean())) < 0.2 * sd
    assert torch.equal(nets.base, torch.full((62,), 1e-3))


@torch.no_grad()
def movement(nets: MetaNets) -> Tensor:
    """How far each mix moves when divergences go from 0.04 to 7.5 nats."""
    near, far = (made_up(nets.sites, divergence=d) for d in (0.04, 7.5))
    return (nets(far).mix - nets(near).mix).abs()


def test_at_the_published_initialisation_the_client_hardly_matters() -> None:
    three = Sites(norms=("a", "b", "c"), layers=("a", "b", "c"), params=("p",), head=())

    def largest(sites: Sites, config: MetaNetsConfig) -> list[float]:
        return [float(movement(MetaNets(sites, config=config, seed=s)).max()) for s in range(6)]

    published, ours = MetaNetsConfig.published(), MetaNetsConfig()
    means = [float(movement(MetaNets(three, config=published, seed=s)).mean()) for s in range(6)]
    assert sum(means) / 6 < 0.003
    for sites in (three, find_sites(nested_net()), LIKE_RESNET18):
        assert max(largest(sites, published)) < 0.015
        assert sum(largest(sites, ours)) / 6 > 0.1


@pytest.mark.parametrize("seed", range(3))
def test_sensitive_rates_depend_on_the_client_too(seed: int) -> None:
    nets = MetaNets(find_sites(nested_net()), seed=seed)
    one, two = (nets(made_up(nets.sites, seed=s)).rate.log() for s in (1, 2))
    assert (one - two).abs().max() > 0.01


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("form", ["default", "published"])
def test_outputs_start_around_the_configured_values(form: Form, constant: bool) -> None:
    config = dataclasses.replace(FORMS[form], constant=constant, base_rate=0.02, initial_mix=0.3)
    ours = MetaNets(LIKE_RESNET18, config=config)
    if not constant:
        with torch.no_grad():
            for net in (ours.bnnet, ours.lrnet):
                net.out.weight.mul_(1e-2)
    written = ours(made_up(LIKE_RESNET18))
    mix = 0.5 if form == "published" and not constant else 0.3  # a bias of the last layer
    torch.testing.assert_close(written.mix, torch.full((20,), mix), rtol=0.05, atol=0)
    torch.testing.assert_close(written.rate, torch.full((62,), 0.02), rtol=0.05, atol=0)


def test_seeds_decide_the_weights_and_the_global_generator_is_left_alone() -> None:
    sites = find_sites(nested_net())
    before = torch.get_rng_state()
    first, again, other = (MetaNets(sites, seed=s) for s in (1, 1, 2))
    weight = "lrnet.hidden1.weight"
    assert torch.equal(first.get_parameter(weight), again.get_parameter(weight))
    assert not torch.equal(first.get_parameter(weight), other.get_parameter(weight))
    assert torch.equal(torch.get_rng_state(), before), "drawn from the global generator"


# ------------------------------------------------------------ outputs


@pytest.mark.parametrize("push", [-50.0, -1.0, 1.0, 50.0])
def test_log_rates_stay_positive_and_within_bounds(push: float) -> None:
    nets = MetaNets(find_sites(mlp()), config=MetaNetsConfig(min_rate=1e-4, max_rate=0.5))
    with torch.no_grad():
        nets.base += push
    rate = nets(made_up(nets.sites)).rate
    assert (rate >= 1e-4 * (1 - 1e-6)).all()
    assert (rate <= 0.5 * (1 + 1e-6)).all()


def test_a_linear_rate_is_never_negative_and_can_come_back() -> None:
    nets = MetaNets(find_sites(mlp()), config=MetaNetsConfig.published())
    with torch.no_grad():
        nets.base.fill_(-0.1)
    rate = nets(made_up(nets.sites)).rate
    assert (rate == 0).all()
    (grad,) = torch.autograd.grad(rate.sum(), nets.base)
    assert (grad > 0).all()


def test_mixes_stay_within_0_and_1(form: MetaNetsConfig) -> None:
    nets = MetaNets(find_sites(nested_net()), config=form)
    for push in (-9.0, 9.0):
        with torch.no_grad():
            (nets.base_mix if form.constant else nets.bnnet.out.bias).fill_(push)
        assert torch.equal(nets(made_up(nets.sites)).mix, torch.full((6,), float(push > 0)))


def test_shapes_and_gradients(form: MetaNetsConfig) -> None:
    nets = MetaNets(find_sites(nested_net()), config=form)
    ours = nets(made_up(nets.sites))
    assert ours.mix.shape == (6,)
    assert ours.rate.shape == (21,)
    assert ours.sites == nets.sites
    grads = torch.autograd.grad(
        ours.mix.sum() + ours.rate.sum(), list(nets.parameters()), allow_unused=True
    )
    for (name, _), grad in zip(nets.named_parameters(), grads, strict=True):
        assert grad is not None, name
        assert grad.isfinite().all(), name
        assert (grad != 0).any(), name


def test_a_cohorts_rows_are_the_clients_own(form: MetaNetsConfig) -> None:
    nets = MetaNets(find_sites(nested_net()), config=form)
    many = [made_up(nets.sites, seed=s) for s in range(3)]
    together = nets(Profile.stack(many))
    assert together.mix.shape == (3, 6)
    for c, own in enumerate(many):
        torch.testing.assert_close(together.mix[c], nets(own).mix)
        torch.testing.assert_close(together.rate[c], nets(own).rate)


def test_per_client_weights(form: MetaNetsConfig) -> None:
    """Equal weights give what forward gives; a client with other weights gets its own."""
    sites = find_sites(nested_net())
    nets, other = MetaNets(sites, config=form, seed=1), MetaNets(sites, config=form, seed=2)
    with torch.no_grad():
        other.base *= 1.1
    cohort = made_up(sites, clients=3)
    weights = {
        k: torch.stack([p, dict(other.named_parameters())[k], p]).detach()
        for k, p in nets.named_parameters()
    }
    ours = nets.per_client(weights, cohort)
    first, second = nets(cohort), other(cohort)
    for c, expected in enumerate((first, second, first)):
        torch.testing.assert_close(ours.mix[c], expected.mix[c])
        torch.testing.assert_close(ours.rate[c], expected.rate[c])
    assert not torch.allclose(second.rate, first.rate)


def test_per_client_gradients_are_each_clients_own(form: MetaNetsConfig) -> None:
    nets = MetaNets(find_sites(nested_net()), config=form)
    cohort = made_up(nets.sites, clients=2)
    weights = {k: torch.stack([p, p]).detach().requires_grad_() for k, p in nets.named_parameters()}
    ours = nets.per_client(weights, cohort)
    # a gradient of either sign, so that an inward clamp has something to block
    towards = [torch.linspace(-1, 1, t.numel()).view_as(t) for t in (ours.mix, ours.rate)]
    grads = torch.autograd.grad([ours.mix, ours.rate], list(weights.values()), towards)
    for c in range(2):
        own = {field: value[c] for field, value in cohort.tensors().items()}
        alone = nets(Profile(**own, num_examples=5, sites=nets.sites))
        expected = torch.autograd.grad(
            [alone.mix, alone.rate], list(nets.parameters()), [t[c] for t in towards]
        )
        for grad, own in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad[c], own, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["default", "published"])
def test_the_constant_ablation_ignores_the_profile(form: Form) -> None:
    nets = MetaNets(find_sites(nested_net()), config=MetaNetsConfig(form=form, constant=True))
    one, two = (nets(made_up(nets.sites, divergence=d, seed=int(d))) for d in (1.0, 9.0))
    assert torch.equal(one.mix, two.mix)
    assert torch.equal(one.rate, two.rate)
    assert {name for name, _ in nets.named_parameters()} == {"base_mix", "base"}


def test_a_dead_channel_does_not_run_away() -> None:
    nets = MetaNets(find_sites(nested_net()))
    seen = made_up(nets.sites, divergence=2500.0)
    assert nets(seen).mix.isfinite().all()
    assert nets.prepared(seen)[0].max() < 10


def test_inputs_by_hand() -> None:
    nets = MetaNets(find_sites(nested_net()))
    with torch.no_grad():
        nets.input_scale.shift.fill_(0.5)
        nets.input_scale.scale.fill_(2.0)
    seen = made_up(nets.sites)
    by_hand = [
        (0.001 + seen.divergence).log() + 1.5,
        seen.moments.flatten(),
        (1e-3 + seen.gradients).log() / 2,
        torch.stack([(1e-3 + seen.loss[0]).log() / 2, 2 * seen.loss[1] - 1]),
        torch.stack([seen.labels[0] - 1.5, seen.labels[1].log() - 1.5, 4 * seen.labels[2] - 2]),
        seen.size.log() / 2 - 2,
    ]
    read = nets.prepared(seen)
    torch.testing.assert_close(read, 2 * (torch.cat(by_hand) - 0.5))
    names = nets.entry_names
    assert len(names) == len(read) == len(set(names))
    assert names[0] == f"divergence of {nets.sites.norms[0]}"
    assert names[-6:] == [
        *("global model's loss", "global model's accuracy"),
        *("label entropy", "number of classes", "label agreement", "number of examples"),
    ]
    published = MetaNets(nets.sites, config=MetaNetsConfig.published()).prepared(seen)
    assert torch.equal(published, torch.cat([seen.divergence, seen.moments.flatten()]))


@pytest.mark.parametrize("group", PROFILE_GROUPS)
def test_nets_read_the_groups_that_are_chosen_and_no_others(group: ProfileGroup) -> None:
    sites = find_sites(nested_net())
    one, other = made_up(sites, seed=1), made_up(sites, divergence=3.0, seed=2)
    field = GROUPS[group].field
    moved = dataclasses.replace(one, **{field: getattr(other, field)})
    alone = MetaNets(sites, config=MetaNetsConfig(profile=(group,)))
    others = tuple(g for g in PROFILE_GROUPS if g != group)
    without = MetaNets(sites, config=MetaNetsConfig(profile=others))
    assert not torch.equal(alone(one).rate, alone(moved).rate)
    assert not torch.equal(alone(one).mix, alone(moved).mix)
    assert torch.equal(without(one).rate, without(moved).rate)
    assert torch.equal(without(one).mix, without(moved).mix)
    if group not in PUBLISHED_PROFILE:
        with pytest.raises(ValueError, match=f"lacks its group '{group}'"):
            alone(Profile(one.divergence, one.moments, 1, sites))


def test_entries_without_any_information_are_read_as_finite_numbers_of_usual_size() -> None:
    sites = find_sites(nested_net())
    nothing = Profile(
        torch.zeros(6),
        torch.zeros(len(sites.layers), 2),
        1,
        sites,
        gradients=torch.zeros(len(sites.params)),
        loss=torch.tensor([-3.0, 0.0]),
        labels=torch.zeros(3),
        size=torch.ones(1),
    )
    nets = MetaNets(sites)
    assert nets.prepared(nothing).abs().max() < 6
    written = nets(nothing)
    grads = torch.autograd.grad(written.rate.sum(), list(nets.lrnet.parameters()))
    assert all(bool(g.isfinite().all()) for g in grads)


def test_groups_may_be_named_by_a_word() -> None:
    assert MetaNetsConfig(profile=("full",)) == MetaNetsConfig(profile=PROFILE_GROUPS)
    assert MetaNetsConfig(profile=("published",)).groups == ("divergences", "moments")
    assert MetaNetsConfig(profile=("size", "published")).groups == (
        "divergences",
        "moments",
        "size",
    )
    assert MetaNetsConfig(constant=True).groups == ()


def test_without_batch_norm_only_rates_are_written(form: MetaNetsConfig) -> None:
    model = settled(mlp(norm=False))
    nets = MetaNets(find_sites(model), config=form)
    ours = nets(profile(model, [examples(7, 4)], groups=PROFILE_GROUPS))
    assert ours.mix.shape == (0,)
    assert ours.rate.shape == (4,)
    cohort = made_up(nets.sites, clients=2)
    weights = {k: torch.stack([p, p]) for k, p in nets.named_parameters()}
    torch.testing.assert_close(nets.per_client(weights, cohort).rate, nets(cohort).rate)


@pytest.mark.parametrize("use", ["forward", "per_client"])
def test_a_profile_of_another_model_is_refused(use: str) -> None:
    nets = MetaNets(find_sites(nested_net()))
    renamed = {k: tuple(f"x.{n}" for n in v) for k, v in vars(nets.sites).items()}
    foreign = made_up(Sites(**renamed), clients=1)
    weights = {k: p[None] for k, p in nets.named_parameters()}
    with pytest.raises(ValueError, match="another model"):
        nets(foreign) if use == "forward" else nets.per_client(weights, foreign)


# ------------------------------------------------------------ files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_and_loaded_bit_for_bit(form: MetaNetsConfig, dtype: torch.dtype, tmp_path) -> None:
    nets = MetaNets(find_sites(nested_net()), config=form, seed=3).to(dtype)
    nets.save(tmp_path / "metanets")
    written = {p.name for p in (tmp_path / "metanets").iterdir()}
    assert written == {"metanets.safetensors", "metanets.json", "README.md"}
    again = MetaNets.load(tmp_path / "metanets")
    assert again.config == nets.config
    assert again.sites == nets.sites
    ours, theirs = nets.state_dict(), again.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, theirs[name]), name


def test_saved_and_loaded_without_batch_norm(tmp_path: Path) -> None:
    nets = MetaNets(find_sites(mlp(norm=False)), seed=3)
    nets.save(tmp_path / "metanets")
    seen = made_up(nets.sites)
    assert torch.equal(MetaNets.load(tmp_path / "metanets")(seen).rate, nets(seen).rate)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def without(key: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = json.loads(path.read_text())
        del content[key]
        path.write_text(json.dumps(content))

    return damage


def other_sites(path: Path) -> None:
    content = json.loads(path.read_text())
    content["sites"]["norms"].pop()
    path.write_text(json.dumps(content))


def unknown_setting(path: Path) -> None:
    content = json.loads(path.read_text())
    content["config"]["form"] = "squared"
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".safetensors", Path.unlink),
        (".json", Path.unlink),
        (".safetensors", cut_short),
        (".safetensors", lambda p: p.write_bytes(b"")),
        (".json", cut_short),
        (".json", lambda p: p.write_text("[]")),
        (".json", lambda p: p.write_bytes(b"\xff\xfe")),
        (".json", without("sites")),
        (".json", without("config")),
        (".json", without("card")),
        (".json", other_sites),
        (".json", unknown_setting),
    ],
)
def test_a_missing_or_damaged_file_is_a_clear_error(suffix: str, damage, tmp_path: Path) -> None:
    folder = tmp_path / "nets"
    MetaNets(find_sites(nested_net())).save(folder)
    damage(folder / f"metanets{suffix}")
    with pytest.raises(ValueError, match=r"meta-nets at .*nets cannot be read") as caught:
        MetaNets.load(folder)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": 0}, "hidden is 0"),
        ({"base_rate": 0.0}, "base_rate is 0"),
        ({"base_rate": float("nan")}, "base_rate is nan"),
        ({"base_rate": 2.0}, "must lie within"),
        ({"initial_mix": 1.5}, "initial_mix is 1.5"),
        ({"min_rate": 0.0}, "min_rate"),
        ({"min_rate": 2.0}, "min_rate"),
        ({"form": "squared"}, "form is 'squared'"),
        ({"profile": ()}, "profile is \\(\\), but must be"),
        ({"profile": ("labels", "age")}, "but must be a tuple of one or more of divergences"),
        ({"profile": "full"}, "profile is 'full', but must be a tuple"),
        ({"form": "published", "profile": ("labels",)}, "give profile published"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetaNetsConfig(**settings)


def test_what_the_nets_read() -> None:
    """In the default form both read all of a profile, in the published one half each."""
    sites = find_sites(nested_net())
    for form, moves in (("published", False), ("default", True)):
        nets = MetaNets(sites, config=FORMS[form])
        one, other = made_up(sites, divergence=0.1), made_up(sites, divergence=5.0)
        swapped = dataclasses.replace(one, moments=other.moments + 1.0)
        assert torch.equal(nets(one).mix, nets(swapped).mix) != moves
        far = dataclasses.replace(one, divergence=other.divergence)
        assert torch.equal(nets(one).rate, nets(far).rate) != moves


@pytest.mark.parametrize("form", ["default", "published"])
def test_shared_parameters_move_their_scale_times_as_far(form: Form) -> None:
    nets = MetaNets(find_sites(nested_net()), config=MetaNetsConfig(form=form, constant=True))
    seen = made_up(nets.sites)
    before = nets(seen)
    with torch.no_grad():
        nets.base_mix -= 0.01
        nets.base -= 0.01
    after = nets(seen)
    scale = SHARED_LR_SCALE if form == "default" else 1.0
    torch.testing.assert_close(before.mix - after.mix, torch.full((6,), 0.01 * scale))
    moved = before.rate.log() - after.rate.log() if form == "default" else before.rate - after.rate
    torch.testing.assert_close(moved, torch.full((21,), 0.01 * scale))


@pytest.mark.parametrize("hidden", [20_000, 10**7, 10**13])
def test_a_width_that_a_description_claims_costs_nothing(
    hidden: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and shapes are compared before a weight is read or made."""
    import safetensors.torch

    MetaNets(find_sites(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))).save(tmp_path / "nets")
    about = tmp_path / "nets" / "metanets.json"
    description = json.loads(about.read_text())
    description["config"]["hidden"] = hidden
    about.write_text(json.dumps(description))

    def read(*args: object, **kwargs: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(safetensors.torch, "load_file", read)
    with pytest.raises(ValueError, match=r"by the description|overflowed"):
        MetaNets.load(tmp_path / "nets")
