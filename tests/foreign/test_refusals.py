"""What cannot be honoured is refused in one line, and nothing is guessed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedl2p import Hyperparams, find_sites, finetune, hypergradient, profile
from fedl2p.core.finetuning.inner_loop import DivergedError
from foreign.nets.structure import Base


class ByClosure(Base):
    """Reaches its norm's weights through a function that closed over them."""

    def __init__(self) -> None:
        super().__init__()
        weight = self.a.weight
        self.first = lambda x: x @ weight.T


class Closed(ByClosure):
    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.n(self.first(x))))


class Listed(Base):
    """Reaches a weight through a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.o.weight]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.n(self.a(x))) @ self.weights[0].T


class OwnFormula(Base):
    """Normalises with the layer's statistics in its own words."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.n
        return self.o((self.a(x) - n.running_mean) / (n.running_var + n.eps).sqrt())


class OwnAverage(Base):
    """Writes the layer's statistics itself."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.training:
            self.n.running_mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return self.o(self.n(h))


class Merging(Base):
    """Merges a tensor into a weight for evaluation, as adapters do."""

    def train(self, mode: bool = True) -> Merging:
        if not mode and self.training:
            self.a.weight.data += 0.1
        return super().train(mode)


class Recomputing(Base):
    """Recomputes activations in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self.o(checkpoint(lambda v: torch.tanh(self.n(self.a(v))), x, use_reentrant=False))


class Counting(Base):
    """Depends on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        return super().forward(x) * self.calls[0]


class OnceDifferentiable(torch.autograd.Function):
    """A kernel of one's own with a first derivative only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class OwnKernel(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.o(OnceDifferentiable.apply(self.n(self.a(x))))


def instance_closure() -> nn.Module:
    net = Base()
    own = net.n.forward
    net.n.forward = lambda x: torch.relu(own(x))
    return net


def complex_weight() -> nn.Module:
    net = Base()
    net.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    return net


def holds_an_open_file() -> nn.Module:
    net = Base()
    net.log = open(__file__)  # noqa: SIM115
    return net


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "closure": (Closed, r"reaches its tensor 'a\.weight' .* through a list, a closure"),
    "list of weights": (Listed, r"reaches its tensor 'o\.weight' .* through a list"),
    "instance forward over the original": (instance_closure, r"reaches its tensor 'n\."),
    "statistics in a formula": (OwnFormula, r"norm layer 'n' is computed by .*, not by"),
    "statistics written": (OwnAverage, r"running statistics of norm layer 'n' otherwise"),
    "merging": (Merging, r"eval\(\) changes the model's parameter 'a\.weight'"),
    "checkpointing": (Recomputing, r"recomputes activations"),
    "counting": (Counting, r"does not compute the same when it runs again"),
    "complex": (complex_weight, r"'phase' is of torch\.complex64"),
    "open file": (holds_an_open_file, r"\(Base\) cannot be copied"),
    "TorchScript": (lambda: torch.jit.trace(Base().eval(), torch.zeros(2, 5)), "is TorchScript"),
}


def data(n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 5, generator=generator), torch.arange(n) % 3


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_in_one_line(build: Callable[[], nn.Module], message: str) -> None:
    model = build()
    with pytest.raises(ValueError, match=message) as caught:
        finetune(model, Hyperparams.constant(find_sites(model), mix=0.5, rate=0.1), data())
    assert "\n" not in str(caught.value)


def test_a_kernel_without_second_derivative_is_named_with_the_mode_that_works() -> None:
    model = OwnKernel()
    hyper = Hyperparams.constant(find_sites(model), mix=0.5, rate=0.1)
    with pytest.raises(ValueError, match=r"once_differentiable.*use mode 'last-step'"):
        hypergradient(model, hyper, [data()], data(6))
    answer = hypergradient(model, hyper, [data()], data(6), mode="last-step")
    assert any(answer["rate"].values())


@pytest.mark.parametrize(("mix", "rate"), [(3.0, 0.1), (-0.1, 0.1), (0.5, -1.0)])
def test_hyperparams_out_of_bounds(mix: float, rate: float) -> None:
    sites = find_sites(Base())
    good = Hyperparams.constant(sites, mix=0.5, rate=0.1)
    with pytest.raises(ValueError, match="but"):
        Hyperparams(good.mix * 0 + mix, good.rate * 0 + rate, sites)
    for nan in (
        (good.mix * float("nan"), good.rate),
        (good.mix, good.rate * float("nan")),
    ):
        with pytest.raises(ValueError, match="is nan, but"):
            Hyperparams(*nan, sites)


def test_a_hypergradient_of_a_loop_that_diverged_is_an_error() -> None:
    model = Base()
    hyper = Hyperparams.constant(find_sites(model), mix=0.5, rate=1e30)
    with pytest.raises(DivergedError, match="use smaller rates"):
        hypergradient(model, hyper, [data()] * 4, data(6))


class FunctionalLinear(Base):
    """Calls F.linear with the weights of its head."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.n(self.a(x)))
        return nn.functional.linear(h, self.o.weight, self.o.bias)


def test_layers_and_norms_that_are_not_called_as_modules_are_profiled() -> None:
    from foreign.nets.structure import Functional

    torch.manual_seed(0)
    model, x = Base(), data(20)[0]
    wanted = profile(model, [x])
    for kind in (FunctionalLinear, Functional):
        other = kind()
        other.load_state_dict(model.state_dict())
        seen = profile(other, x.split(7))
        torch.testing.assert_close(seen.moments, wanted.moments)
        torch.testing.assert_close(seen.divergence, wanted.divergence)


def test_no_layer_of_attention_has_a_constant_profile() -> None:
    model = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    sites = find_sites(model)
    assert not any("out_proj" in name for name in sites.layers)
    generator = torch.Generator().manual_seed(1)
    one, two = (
        profile(model, [scale * torch.randn(6, 3, 4, generator=generator)]).moments
        for scale in (1.0, 3.0)
    )
    assert not bool((one == two).all(1).any())
