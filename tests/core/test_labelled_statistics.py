"""The groups of a profile that read targets: closed forms, finite differences, odd data."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedl2p.core.labelled_statistics import LEAST_WEIGHT
from fedl2p.core.metanets import MetaNets
from fedl2p.core.personalization import personalize
from fedl2p.core.profiles import Profile, Profiler, profile
from fedl2p.core.settings import PROFILE_GROUPS, MetaNetsConfig
from fedl2p.core.sites import find_sites
from support.core_nets import ConvNet, SharedNorm, examples, mlp, settled

FULL = ("full",)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


@pytest.mark.parametrize("build", [mlp, SharedNorm, lambda: mlp(norm=False)])
def test_gradients_agree_with_finite_differences(build: Callable[[], nn.Module]) -> None:
    model = settled(build()).eval()
    x, y = examples(11, 4, seed=1)
    ours = profile(model, [(x, y)], groups=("gradients",))
    assert ours.gradients is not None
    moved = copy.deepcopy(model)
    for (name, p), ratio in zip(moved.named_parameters(), ours.gradients.tolist(), strict=True):
        flat, slopes = p.data.flatten().clone(), []
        for i in range(p.numel()):
            ends = []
            for step in (1e-6, -1e-6):
                p.data.view(-1)[i] = flat[i] + step
                ends.append(loss_of(moved, x, y))
            p.data.view(-1)[i] = flat[i]
            slopes.append((ends[0] - ends[1]) / 2e-6)
        wanted = math.hypot(*slopes) / float(p.data.norm())
        assert ratio == pytest.approx(wanted, rel=1e-6, abs=1e-8), name


def test_a_linear_model_has_a_closed_form() -> None:
    """Of softmax regression: the gradient is the mean of (p - onehot) x^T."""
    model = nn.Linear(4, 3).double()
    x, y = examples(9, 4)
    ours = profile(model, [(x, y)], groups=FULL)
    with torch.no_grad():
        outputs = model(x)
    away = outputs.softmax(1) - F.one_hot(y, 3)
    norms = ((away.T @ x / 9).norm(), away.mean(0).norm())
    wanted = [g / p.detach().norm() for g, p in zip(norms, model.parameters(), strict=True)]
    torch.testing.assert_close(ours.gradients, torch.stack(wanted))
    guessed = outputs.argmax(1)
    right = guessed.eq(y).double().mean()
    torch.testing.assert_close(ours.loss, torch.stack([F.cross_entropy(outputs, y), right]))
    shares = torch.bincount(y).double() / 9
    shares = shares[shares > 0]
    pairs = [(a, b) for a in range(9) for b in range(a) if guessed[a] == guessed[b]]
    agree = sum(bool(y[a] == y[b]) for a, b in pairs)
    assert 0 < agree < len(pairs)
    wanted_labels = torch.tensor(
        [-(shares * shares.log()).sum(), len(shares), (agree + 0.5) / (len(pairs) + 1)]
    )
    torch.testing.assert_close(ours.labels, wanted_labels.double())
    assert ours.size is not None
    assert ours.size.tolist() == [9.0]
    assert ours.gradients is not None
    assert ours.gradients.dtype == torch.float64


@pytest.mark.parametrize("sizes", [[9], [1] * 9, [4, 1, 4], [200]])
def test_batches_do_not_matter(sizes: list[int]) -> None:
    model = settled(ConvNet(2))
    x, y = examples(max(9, sum(sizes)), 2, 5, 4)
    ours = profile(model, zip(x.split(sizes), y.split(sizes), strict=True), groups=FULL)
    theirs = profile(model, [(x, y)], groups=FULL)
    for field, value in ours.tensors().items():
        torch.testing.assert_close(value, theirs.tensors()[field], rtol=1e-10, atol=1e-12)


def test_more_groups_change_nothing_of_the_published_profile_and_of_the_model() -> None:
    model = settled(ConvNet(2)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = examples(30, 2, 5, 4)
    full, published = profile(model, [(x, y)], groups=FULL), profile(model, [x])
    assert torch.equal(full.divergence, published.divergence)
    assert torch.equal(full.moments, published.moments)
    assert published.tensors().keys() == {"divergence", "moments"}
    assert full.tensors().keys() - published.tensors().keys() == {
        *("gradients", "loss", "labels", "size")
    }
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_labels_agree_under_other_codes_but_not_with_noise() -> None:
    model = nn.Linear(3, 3).double()
    with torch.no_grad():
        model.weight.copy_(torch.eye(3))
        model.bias.zero_()
    true = torch.arange(3).repeat(20)
    x = F.one_hot(true, 3).double()
    rng = torch.Generator().manual_seed(0)
    wrong = torch.rand(60, generator=rng) < 0.4
    noisy = torch.where(wrong, torch.randint(3, (60,), generator=rng), true)
    agreements = []
    for y in (true, (true + 1) % 3, noisy):
        labels = profile(model, [(x, y)], groups=("labels",)).labels
        assert labels is not None
        agreements.append(float(labels[2]))
    pairs = 3 * 20 * 19 / 2
    assert agreements[:2] == pytest.approx([(pairs + 0.5) / (pairs + 1)] * 2)
    assert 0.3 < agreements[2] < 0.8


# ------------------------------------------------------------ losses


def binary(n: int) -> tuple[Tensor, Tensor]:
    x, _ = examples(n, 4)
    return x, (x[:, :2] > 0).double()


def mean_square(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs - y).square().mean(1)


def smoothed(outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs, y, reduction="none", label_smoothing=0.1)


def test_labels_of_bce_are_the_mean_over_columns() -> None:
    model = settled(nn.Linear(4, 2))
    x = examples(4, 4)[0]
    y = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]).double()
    ours = profile(model, [(x[:1], y[:1]), (x[1:], y[1:])], groups=FULL, loss="bce")
    assert ours.labels is not None
    assert ours.labels.tolist() == pytest.approx([math.log(2) / 2, 1.5, 0.5])
    single = profile(settled(nn.Linear(4, 1)), [(x, y[:, :1])], groups=FULL, loss="bce")
    assert single.labels is not None
    assert single.labels.tolist() == pytest.approx([math.log(2), 2.0, 0.5])


@pytest.mark.parametrize("loss", ["mse", mean_square])
def test_numbers_have_neither_labels_nor_accuracy(loss: Any) -> None:
    model = settled(nn.Linear(4, 2))
    x, y = binary(8)
    ours = profile(model, [(x, y)], groups=FULL, loss=loss)
    assert ours.labels is not None
    assert ours.labels.tolist() == [0.0, 0.0, 0.5]
    assert ours.loss is not None
    with torch.no_grad():
        wanted = float((model(x) - y).square().mean())
    assert ours.loss.tolist() == pytest.approx([wanted, 0.0])
    assert ours.gradients is not None
    assert (ours.gradients > 0).all()


def test_whole_numbers_of_a_callable_loss_are_labels_and_a_metric_is_the_accuracy() -> None:
    x, y = examples(9, 4)
    model = settled(mlp())
    ours = profile(
        model, [(x, y)], groups=FULL, loss=smoothed, metric=lambda o, _: torch.full((len(o),), 0.25)
    )
    plain = profile(model, [(x, y)], groups=FULL)
    assert ours.labels is not None
    assert plain.labels is not None
    assert torch.equal(ours.labels[:2], plain.labels[:2])
    assert float(ours.labels[2]) == 0.5  # no class is predicted under a loss of the user's
    assert ours.loss is not None
    assert float(ours.loss[1]) == 0.25
    assert not torch.equal(ours.gradients, plain.gradients)


def test_labels_of_positions_and_those_that_do_not_count() -> None:
    model = settled(nn.Conv2d(2, 3, 1))
    x = examples(4, 2, 4, 5)[0]
    y = torch.full((4, 4, 5), -100)
    y[0, 0, :3] = torch.tensor([0, 1, 1])
    y[1, 2, 2] = 2
    split = [(x[:1], y[:1]), (x[1:3], y[1:3]), (x[3:], y[3:])]  # nothing counts in the last one
    ours = profile(model, split, groups=FULL, ignore_index=-100)
    assert ours.labels is not None
    with torch.no_grad():
        guessed = model(x).argmax(1)[y != -100]
    counted = y[y != -100]
    pairs = [(a, b) for a in range(4) for b in range(a) if guessed[a] == guessed[b]]
    agree = sum(bool(counted[a] == counted[b]) for a, b in pairs)
    assert ours.labels.tolist() == pytest.approx(
        [0.5 * math.log(4) + 0.5 * math.log(2), 3.0, (agree + 0.5) / (len(pairs) + 1)]
    )
    whole = profile(model, [(x[:2], y[:2])], groups=FULL, ignore_index=-100)
    torch.testing.assert_close(ours.loss, whole.loss)
    torch.testing.assert_close(ours.gradients, whole.gradients)


# ------------------------------------------------------------ odd clients and models


def written(model: nn.Module, made: Profile) -> Tensor:
    config = MetaNetsConfig(profile=FULL)
    hyperparams = MetaNets(find_sites(model), config=config).to(torch.float64)(made)
    return torch.cat([hyperparams.mix, hyperparams.rate])


def test_one_example_of_one_class() -> None:
    model = settled(mlp())
    x, y = examples(1, 4)
    made = profile(model, [(x, y)], groups=FULL)
    assert made.labels is not None
    assert made.labels.tolist() == [0.0, 1.0, 0.5]
    assert written(model, made).isfinite().all()


def test_weights_and_gradients_of_zero() -> None:
    model = settled(mlp())
    with torch.no_grad():
        model[-1].weight.zero_()  # no gradient passes it; its own is divided by the least weight
    x, y = examples(12, 4)
    made = profile(model, [(x, y)], groups=FULL)
    assert made.gradients is not None
    *before, weight, bias = made.gradients.tolist()
    assert not any(before)
    assert bias > 0
    inner = nn.Sequential(*model[:-1]).eval()
    with torch.no_grad():
        away = model.eval()(x).softmax(1) - F.one_hot(y, 3)
        norm = float((away.T @ inner(x) / 12).norm())
    assert weight == pytest.approx(norm / (LEAST_WEIGHT * model[-1].weight.numel() ** 0.5))
    assert written(model, made).isfinite().all()


def test_frozen_and_unused_tensors() -> None:
    model = settled(mlp())
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    model[0].weight.requires_grad_(False)
    made = profile(model, [examples(5, 4)], groups=FULL)
    ratios = dict(zip(made.sites.params, made.gradients.tolist(), strict=True))
    assert ratios["unused"] == 0.0
    assert "0.weight" not in ratios
    assert ratios["0.bias"] > 0


def test_dropout_between_recurrent_layers_is_off() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 5, num_layers=2, dropout=0.9, batch_first=True)
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    torch.manual_seed(0)
    model = Recurrent().double().eval()
    x, y = examples(6, 7, 4)
    made = profile(model, [(x, y)], groups=FULL)
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    wanted = [g.norm() / p.detach().norm() for g, p in zip(grads, model.parameters(), strict=True)]
    torch.testing.assert_close(made.gradients, torch.stack(wanted))


def test_bad_input_is_named() -> None:
    model = settled(mlp())
    x, y = examples(6, 4)
    with pytest.raises(ValueError, match="a Tensor came where a pair"):
        profile(model, [x], groups=("labels",))
    with pytest.raises(ValueError, match="must be a tuple of one or more of divergences"):
        profile(model, [(x, y)], groups=("age",))
    with pytest.raises(ValueError, match="global model's loss is not finite"):
        profile(
            model, [(x, y)], groups=("loss",), loss=lambda o, _: torch.full((len(o),), math.inf)
        )
    made = profile(model, [(x, y)], groups=("size",))
    with pytest.raises(ValueError, match="the profile lacks its group 'gradients'"):
        MetaNets(made.sites)(made)


# ------------------------------------------------------------ through the nets


def test_stacked_profiles_are_each_clients_own() -> None:
    model = settled(ConvNet(2))
    profiler = Profiler(model)
    many = [profiler([examples(n, 2, 5, 4, seed=n)], PROFILE_GROUPS) for n in (3, 8, 20)]
    together = Profile.stack(many)
    nets = MetaNets(many[0].sites).double()
    both = nets(together)
    for c, own in enumerate(many):
        for field, value in own.tensors().items():
            assert torch.equal(together.tensors()[field][c], value)
        torch.testing.assert_close(both.rate[c], nets(own).rate)
    assert together.num_examples == 31


@pytest.mark.parametrize("groups", [("published",), FULL, ("labels", "size"), ("gradients",)])
def test_personalize_makes_what_the_loaded_nets_read(groups: Any, tmp_path: Any) -> None:
    model = settled(mlp()).float()
    x, y = examples(9, 4)
    nets = MetaNets(find_sites(model), config=MetaNetsConfig(profile=groups), seed=4)
    nets.save(tmp_path / "nets")
    loaded = MetaNets.load(tmp_path / "nets")
    assert loaded.config == nets.config
    mine = personalize(model, loaded, (x.float(), y), epochs=1)
    made = profile(model, [(x.float(), y)], groups=groups)
    torch.testing.assert_close(mine.hyperparams.rate, nets(made).rate.detach())
    assert mine.profile.tensors().keys() == made.tensors().keys()
