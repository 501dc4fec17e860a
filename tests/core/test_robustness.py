"""What users' models and calls bring along: dtypes, keywords, layers of their own."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.core.finetuning.batches import EpochBatches
from fedl2p.core.finetuning.evaluation import evaluate
from fedl2p.core.finetuning.inner_loop import finetune
from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.hypergradients.estimators import hypergradient
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.metanets import MetaNets
from fedl2p.core.personalization import personalize
from fedl2p.core.profiles import profile
from fedl2p.core.settings import HypergradientConfig, Statistics
from fedl2p.core.sites import Sites, find_sites
from fedl2p.core.working_copies import working_copies
from support.core_nets import examples, mlp, settled
from support.nets import nested_net


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# ------------------------------------------------------------ dtypes


def test_float64_data_fine_tunes_and_judges_a_float32_model_as_float32_data_does() -> None:
    model = nested_net().float()
    x, y = examples(12, 1, 5, 5)
    assert x.dtype == torch.float64
    hyper = Hyperparams.constant(find_sites(model), mix=0.5, rate=0.05)
    tuned = [finetune(model, hyper, (data, y), epochs=1) for data in (x, x.float())]
    assert same(*tuned)
    net = FunctionalModel(model)
    judged = [
        evaluate(net, net.start(1), torch.zeros(1, 6), [Examples(data, y)])
        for data in (x, x.float())
    ]
    assert judged[0] == judged[1]


def test_data_follows_the_models_first_layer_where_only_the_head_is_trained() -> None:
    model = nn.Sequential(nn.Linear(4, 3).bfloat16().requires_grad_(False), Upcast(3))
    hyper = Hyperparams.constant(find_sites(model), mix=0.5, rate=0.05)
    tuned = finetune(model, hyper, examples(8, 4), epochs=1)
    assert not same(tuned, model)


class Upcast(nn.Linear):
    """A float32 head on activations of any dtype."""

    def __init__(self, features: int) -> None:
        super().__init__(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


def test_a_profile_is_in_float32_at_least_and_what_is_too_large_for_it_an_error() -> None:
    model = settled(mlp(), dtype=torch.float32)
    x = examples(16, 4, dtype=torch.float32)[0] * 3e3
    seen = profile(model, [x])
    assert seen.divergence.max() > torch.finfo(torch.float16).max
    half = profile(model.half(), [x.half()])
    assert half.divergence.dtype == torch.float32
    torch.testing.assert_close(half.divergence, seen.divergence, rtol=0.1, atol=0.0)
    with pytest.raises(ValueError, match=r"divergence of layer .* not finite in torch\.float32"):
        profile(model.float(), [x.float() * 1e36])


# ------------------------------------------------------------ working copies kept between calls


def test_working_copies_are_made_anew_when_the_model_changes() -> None:
    model = nested_net()
    first = working_copies(model)
    assert working_copies(model) is first
    with torch.no_grad():
        model.head.bias.add_(1.0)
    second = working_copies(model)
    assert second is not first
    model.head.bias.requires_grad_(False)
    third = working_copies(model)
    assert third is not second
    assert "head.bias" in second.net.sites.params
    assert "head.bias" not in third.net.sites.params


# ------------------------------------------------------------ batches


def test_batches_can_be_gone_through_and_go_on_after_the_last() -> None:
    batches = EpochBatches([Examples(*examples(7, 4))], [3], epochs=2, batch_size=3)
    through = list(batches)
    assert len(through) == len(batches) == 6
    for step, (x, y) in enumerate(through):
        assert torch.equal(x, batches[step][0])
        assert torch.equal(y, batches[step][1])
    assert batches[len(batches)][0].shape == (1, 3, 4)


# ------------------------------------------------------------ calls


def test_mode_and_config_do_not_mix() -> None:
    model = settled(mlp())
    hyper = Hyperparams.constant(find_sites(model), mix=0.5, rate=0.05)
    data = examples(6, 4)
    by_mode = hypergradient(model, hyper, [data], data, mode="last-step")
    by_config = hypergradient(
        model, hyper, [data], data, config=HypergradientConfig(mode="last-step")
    )
    assert by_mode == by_config
    assert hypergradient(model, hyper, [data], data) == hypergradient(
        model, hyper, [data], data, config=HypergradientConfig()
    )
    with pytest.raises(ValueError, match="give one of them"):
        hypergradient(model, hyper, [data], data, mode="unrolled", config=HypergradientConfig())


@pytest.mark.parametrize("statistics", ["corrected", "published", "global"])
def test_0_epochs_leave_the_model_as_it_is(statistics: Statistics) -> None:
    model = nested_net()
    hyper = Hyperparams.constant(find_sites(model), mix=0.7, rate=0.1)
    data = examples(12, 1, 5, 5)
    assert same(finetune(model, hyper, data, epochs=0, statistics=statistics), model)


def test_statistics_can_be_chosen_and_matter() -> None:
    model = nested_net()
    data = examples(12, 1, 5, 5)
    hyper = Hyperparams.constant(find_sites(model), mix=0.7, rate=0.05)
    default = finetune(model, hyper, data, epochs=1)
    published = finetune(model, hyper, data, epochs=1, statistics="published")
    assert same(default, finetune(model, hyper, data, epochs=1, statistics="corrected"))
    assert not same(default, published)
    nets = MetaNets(find_sites(model)).double()
    mine = personalize(model, nets, data, epochs=1, statistics="published")
    wanted = finetune(model, mine.hyperparams, data, epochs=1, statistics="published")
    assert same(mine.model, wanted)


@pytest.mark.parametrize(
    ("mix", "rate", "reason"),
    [
        (1.5, 0.1, "a mix is 1.5, but must be in"),
        (float("nan"), 0.1, "a mix is nan, but must be in"),
        (0.5, -0.1, "a rate is -0.1, but a learning rate must be"),
        (0.5, float("inf"), "a rate is inf, but a learning rate must be"),
        (0.5, 1e39, "a rate is inf, but a learning rate must be"),
        (0.5, float("nan"), "a rate is nan, but a learning rate must be"),
    ],
)
def test_hyperparams_out_of_bounds_are_refused(mix: float, rate: float, reason: str) -> None:
    sites = find_sites(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    with pytest.raises(ValueError, match=reason):
        Hyperparams.constant(sites, mix=mix, rate=rate)
    mixes, rates = torch.tensor([mix]), torch.tensor([rate] * len(sites.params))
    with pytest.raises(ValueError, match=reason):
        Hyperparams(mixes, rates, sites)


def test_mix_and_rate_of_different_cohorts_are_refused() -> None:
    sites = Sites(norms=("n",), layers=(), params=("a", "b"), head=())
    with pytest.raises(ValueError, match="mix is for 3 clients, but rate for 2"):
        Hyperparams(torch.zeros(3, 1), torch.zeros(2, 2), sites)


# ------------------------------------------------------------ layers


class ByKeyword(nn.Module):
    """Calls its layers by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=torch.relu(self.norm(input=self.first(input=x))))


class ByPosition(ByKeyword):
    """The same by position."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.first(x))))


def test_layers_may_be_called_by_keyword() -> None:
    one, two = settled(ByKeyword()), settled(ByPosition())
    two.load_state_dict(one.state_dict())
    x, y = examples(10, 4)
    by_keyword, by_position = profile(one, [x]), profile(two, [x])
    assert by_keyword.divergence[0] > 0
    assert torch.equal(by_keyword.divergence, by_position.divergence)
    assert torch.equal(by_keyword.moments, by_position.moments)
    hyper = Hyperparams.constant(find_sites(one), mix=0.5, rate=0.05)
    assert same(finetune(one, hyper, (x, y), epochs=1), finetune(two, hyper, (x, y), epochs=1))


# ------------------------------------------------------------ files of meta-nets


def test_saving_that_fails_leaves_the_old_meta_nets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = find_sites(mlp())
    old = MetaNets(sites, seed=1)
    old.save(tmp_path / "nets")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        MetaNets(sites, seed=2).save(tmp_path / "nets")
    monkeypatch.undo()
    assert same(MetaNets.load(tmp_path / "nets"), old)
    files = ["README.md", "metanets.json", "metanets.safetensors"]
    assert sorted(f.name for f in (tmp_path / "nets").iterdir()) == files


def test_client_data_is_what_the_pair_is() -> None:
    model = settled(mlp())
    hyper = Hyperparams.constant(find_sites(model), mix=0.5, rate=0.05)
    x, y = examples(8, 4)
    assert same(
        finetune(model, hyper, (x, y), epochs=1),
        finetune(model, hyper, ClientData(Examples(x, y)), epochs=1),
    )
