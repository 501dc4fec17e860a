"""The fused norm against the composed one, finite differences, and what it must refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

from fedl2p.core.finetuning.sgd_step import differentiable_gradient, plain_gradient
from fedl2p.core.functional.fused_norm import fused_mixed_norm
from fedl2p.core.functional.mixed_norm import Fused, MixedNorm
from fedl2p.core.functional.model import FunctionalModel, ModelState
from support.nets import nested_net

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPES = [(6, 3), (5, 3, 9), (7, 3, 4, 5), (2, 3, 2, 2, 3)]
WAYS: tuple[Fused | None, ...] = ("single", None)
KINDS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixed(
    dims: int, *, mix: float, affine: bool = True, fused: Fused | None, first_order: bool = False
) -> MixedNorm:
    norm = KINDS[dims](3, affine=affine).double()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(drawn(3, seed=1))
    norm.running_var.copy_(drawn(3, seed=2).exp())
    if affine:
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(3))
        nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(4))
    made = MixedNorm(norm.train())
    made.values = torch.tensor(mix, dtype=torch.float64), *made.values[1:]
    made.fused, made.first_order = fused, first_order
    return made


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_equals_the_composed_norm(shape: tuple[int, ...], affine: bool, mix: float) -> None:
    x = (3.0 + 2.0 * drawn(*shape, seed=5)).requires_grad_()
    weight = drawn(*shape, seed=6)
    results = []
    for fused in WAYS:
        norm = mixed(len(shape), mix=mix, affine=affine, fused=fused)
        y = norm.norm(x)
        grads = torch.autograd.grad((weight * y).sum(), [x, *norm.norm.parameters()])
        results.append([y, *grads, *norm.values[1:]])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_derivatives_against_finite_differences(shape: tuple[int, ...], affine: bool) -> None:
    inputs = [drawn(*shape, seed=5), torch.tensor(0.4, dtype=torch.float64)]
    if affine:
        inputs += [drawn(3, seed=6), drawn(3, seed=7)]
    inputs = [t.requires_grad_() for t in inputs]
    running = (drawn(3, seed=8), drawn(3, seed=9).exp())

    def norm(x: Tensor, mix: Tensor, *affine: Tensor) -> tuple[Tensor, ...]:
        weight, bias = affine or (None, None)
        return fused_mixed_norm(x, weight, bias, running, mix, 1e-5)

    assert torch.autograd.gradcheck(norm, inputs)
    assert torch.autograd.gradgradcheck(lambda *t: norm(*t)[0], inputs)


def after_a_step(norm: MixedNorm, x: Tensor, rate: Tensor) -> Tensor:
    """Return something of a norm's parameters and statistics after a step, on a batch."""
    weights = list(norm.norm.parameters())
    loss = (norm.norm(x).tanh() ** 2).sum()
    grads = torch.autograd.grad(loss, [x, *weights], create_graph=True)
    moved = [p - rate * g for p, g in zip([x, *weights], grads, strict=True)]
    y = (moved[0] * moved[1].view(-1, 1, 1)).sin().sum() + (moved[2] ** 3).sum()
    _, mean, var, _ = norm.values
    return y + (mean * var).sum()


def test_a_differentiated_step_equals_that_of_the_composed_norm() -> None:
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    results = []
    for fused in WAYS:
        norm = mixed(4, mix=0.3, fused=fused)
        norm.values[0].requires_grad_()
        x = (3.0 + 2.0 * drawn(6, 3, 4, 5, seed=5)).requires_grad_()
        at = [x, *norm.norm.parameters(), norm.values[0], rate]
        results.append(torch.autograd.grad(after_a_step(norm, x, rate), at))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)


def test_second_derivatives_of_stacked_clients_equal_those_of_each() -> None:
    x, weight, bias = drawn(4, 6, 3, 5, 5, seed=1), drawn(4, 3, seed=2), drawn(4, 3, seed=3)
    running, mix = (drawn(3, seed=4), drawn(3, seed=5).exp()), drawn(4, seed=6).sigmoid()

    def twice(inputs: list[Tensor], *, stacked: bool) -> list[Tensor]:
        def norm(x: Tensor, w: Tensor, b: Tensor, m: Tensor) -> Tensor:
            return fused_mixed_norm(x, w, b, running, m, 1e-5, stacked=stacked)[0]

        y = vmap(norm)(*inputs) if stacked else norm(*inputs)
        first = torch.autograd.grad((y.sin() ** 2).sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum((g**2).sum() for g in first), inputs))

    together = twice([t.clone().requires_grad_() for t in (x, weight, bias, mix)], stacked=True)
    for c in range(4):
        own = [t[c].clone().requires_grad_() for t in (x, weight, bias, mix)]
        for ours, wanted in zip(together, twice(own, stacked=False), strict=True):
            torch.testing.assert_close(ours[c], wanted)


def test_a_far_off_mean_costs_no_digits() -> None:
    x = (1000.0 + drawn(64, 3, 8, 8)).float()
    running = (torch.zeros(3), torch.ones(3))
    _, mean, var = fused_mixed_norm(x, None, None, running, torch.tensor(0.5), 1e-5)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=0.0)
    wanted = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(var.double(), wanted, rtol=1e-5, atol=0.0)


def test_stacked_clients_equal_one_after_another() -> None:
    x = drawn(4, 6, 3, 5, 5, seed=1)
    weight, bias = drawn(4, 3, seed=2), drawn(4, 3, seed=3)
    running, mix = (drawn(3, seed=4), drawn(3, seed=5).exp()), drawn(4, seed=6).sigmoid()
    toward = drawn(*x.shape, seed=7)
    together = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y, mean, var = vmap(
        lambda x, w, b, m: fused_mixed_norm(x, w, b, running, m, 1e-5, stacked=True)
    )(*together, mix)
    grads = torch.autograd.grad((toward * y).sum(), together)
    for c in range(4):
        own = [t[c].clone().requires_grad_() for t in (x, weight, bias)]
        alone = fused_mixed_norm(own[0], own[1], own[2], running, mix[c], 1e-5)
        for ours, wanted in zip((y, mean, var), alone, strict=True):
            torch.testing.assert_close(ours[c], wanted)
        wanted_grads = torch.autograd.grad((toward[c] * alone[0]).sum(), own)
        for ours, wanted in zip(grads, wanted_grads, strict=True):
            torch.testing.assert_close(ours[c], wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("mix", [0.0, 1.0])
def test_what_a_known_mix_saves_changes_nothing(mix: float, affine: bool, device: str) -> None:
    inputs = [drawn(4, 6, 3, 5, 5, seed=1), *(drawn(4, 3, seed=2 + i) for i in range(2 * affine))]
    running = drawn(3, seed=4).to(device), drawn(3, seed=5).exp().to(device)
    mixes = torch.full((4,), mix, dtype=torch.float64, device=device)
    results = []
    for pure in (mix, None):

        def norm(x: Tensor, m: Tensor, *affine: Tensor, pure: float | None = pure) -> Tensor:
            weight, bias = affine or (None, None)
            kinds = {"stacked": True, "first_order": True, "pure": pure}
            return fused_mixed_norm(x, weight, bias, running, m, 1e-5, **kinds)[0]

        x, *others = (t.to(device).requires_grad_() for t in inputs)
        y = vmap(norm)(x, mixes, *others)
        results.append([y, *torch.autograd.grad((y.sin() ** 2).sum(), [x, *others])])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("at", [0, 1, 3, None])
def test_a_stack_takes_its_clients_from_any_dimension(at: int | None) -> None:
    """And what all have in common, the batch too."""
    x = drawn(6, 3, 5, 5, seed=1) if at is None else drawn(4, 6, 3, 5, 5, seed=1).movedim(0, at)
    weight, bias, mix = drawn(3, seed=2), drawn(3, 4, seed=3), drawn(4, seed=6).sigmoid()
    running = drawn(3, seed=4), drawn(3, seed=5).exp()

    def norm(x: Tensor, w: Tensor, b: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        return fused_mixed_norm(x, w, b, running, m, 1e-5, stacked=True)

    y, mean, var = vmap(norm, in_dims=(at, None, 1, 0))(x, weight, bias, mix)
    for c in range(4):
        own = x if at is None else x.select(at, c)
        alone = fused_mixed_norm(own, weight, bias[:, c], running, mix[c], 1e-5)
        for ours, wanted in zip((y, mean, var), alone, strict=True):
            torch.testing.assert_close(ours[c], wanted)


def test_the_norm_of_a_stack_is_refused_elsewhere_and_vmap_goes_on() -> None:
    x, running, mix = drawn(2, 6, 3, seed=1), (drawn(3), drawn(3).exp()), drawn(2).sigmoid()

    def norm(x: Tensor, m: Tensor) -> Tensor:
        return fused_mixed_norm(x, None, None, running, m, 1e-5, stacked=True)[0]

    with pytest.raises(RuntimeError, match=r"without torch.func.vmap"):
        norm(x[0], mix[0])
    with pytest.raises(RuntimeError, match=r"a second torch.func transform"):
        vmap(vmap(norm))(x.expand(2, *x.shape), mix.expand(2, 2))
    assert vmap(norm)(x, mix).shape == x.shape


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("clients", [1, 3])
def test_plain_gradient_equals_the_one_with_a_graph(clients: int, device: str) -> None:
    net = FunctionalModel(nested_net().double().to(device))
    start = net.start(clients)
    params = {
        k: (v + 0.1 * drawn(*v.shape, seed=i).to(device)).requires_grad_()
        for i, (k, v) in enumerate(start.params.items())
    }
    state = ModelState(params, start.stats)
    mix = drawn(clients, len(net.sites.norms), seed=1).sigmoid().to(device)
    x = drawn(clients, 8, 1, 20, 12, seed=2).to(device)
    y = torch.randint(0, 3, (clients, 8), generator=torch.Generator().manual_seed(3)).to(device)
    plain = plain_gradient(net, state, mix, (x, y))
    graph = differentiable_gradient(net, state, mix, (x, y))
    for ours, wanted in zip(plain, graph, strict=True):
        assert ours.keys() == wanted.keys()
        for name in ours:
            assert not ours[name].requires_grad
            torch.testing.assert_close(ours[name], wanted[name].detach(), rtol=1e-9, atol=1e-10)


def test_a_norm_for_first_derivatives_refuses_second_ones() -> None:
    norm = mixed(4, mix=0.5, fused="single", first_order=True)
    y = norm.norm(drawn(7, 3, 4, 5).requires_grad_())
    assert not norm.values[1].requires_grad
    with pytest.raises(RuntimeError, match="second order"):
        torch.autograd.grad(y.sum(), list(norm.norm.parameters()), create_graph=True)


def test_third_derivatives_are_refused() -> None:
    norm = mixed(4, mix=0.5, fused="single")
    x = drawn(7, 3, 4, 5).requires_grad_()
    (first,) = torch.autograd.grad((norm.norm(x) ** 3).sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="third order"):
        torch.autograd.grad((first**2).sum(), [x], create_graph=True)


def test_second_derivatives_of_the_statistics_are_refused() -> None:
    norm = mixed(4, mix=0.5, fused="single")
    x = drawn(7, 3, 4, 5).requires_grad_()
    total = norm.norm(x).sum() + (norm.values[1] ** 2).sum()
    with pytest.raises(RuntimeError, match="of its output alone"):
        torch.autograd.grad(total, [x], create_graph=True)


def test_one_value_per_channel_has_no_variance_here_either() -> None:
    norm = mixed(2, mix=0.5, fused="single")
    y = norm.norm(drawn(1, 3))
    assert bool(y.isfinite().all())
    assert float(norm.values[3]) == 0.0


def test_activations_of_another_dtype_go_the_composed_way() -> None:
    norm = MixedNorm(nn.BatchNorm2d(3))
    norm.fused = "single"
    y = norm.norm(drawn(4, 3, 5, 5).bfloat16())
    assert y.dtype == torch.bfloat16
