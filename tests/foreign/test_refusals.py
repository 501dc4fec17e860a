"""What cannot be honoured is refused in one line, and nothing is guessed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fedl2p
from fedl2p import ClientData, Hyperparams, find_sites, finetune, hypergradient, profile
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


class WithoutGradient(Base):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Detached(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class RecomputingByBackward(Base):
    """Recomputes activations by a backward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.o(checkpoint(lambda v: torch.tanh(self.n(v)), self.a(x), use_reentrant=True))


class Decaying(Base):
    """Makes its weights smaller whenever it runs."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.a.weight.mul_(0.99)
        return super().forward(x)


class Spectrum(Base):
    """Returns complex numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(super().forward(x))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "closure": (Closed, r"reaches its tensor 'a\.weight' .* through a list, a closure"),
    "list of weights": (Listed, r"reaches its tensor 'o\.weight' .* through a list"),
    "instance forward over the original": (instance_closure, r"reaches its tensor 'n\."),
    "statistics in a formula": (OwnFormula, r"norm layer 'n' is computed by .*, not by"),
    "statistics written": (OwnAverage, r"running statistics of norm layer 'n' otherwise"),
    "merging": (Merging, r"eval\(\) changes the model's parameter 'a\.weight'"),
    "checkpointing": (Recomputing, r"recomputes activations"),
    "checkpointing, reentrant": (RecomputingByBackward, r"recomputes activations"),
    "no_grad": (WithoutGradient, r"no gradient by any trainable parameter"),
    "detached": (Detached, r"no gradient by any trainable parameter"),
    "decay of weights": (Decaying, r"changes the model's parameter 'a\.weight' in place"),
    "complex outputs": (Spectrum, r"of torch\.complex64, but losses take real numbers"),
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


class Bag(nn.Module):
    """Means of embeddings by a kernel without second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.EmbeddingBag(7, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


def test_a_kernel_whose_second_derivative_is_missing_in_torch_is_named() -> None:
    model = Bag()
    hyper = Hyperparams.constant(find_sites(model), mix=0.5, rate=0.1)
    batch = torch.arange(24).view(8, 3) % 7, torch.arange(8) % 3
    with pytest.raises(ValueError, match=r"_embedding_bag_backward, .* use mode 'last-step'"):
        hypergradient(model, hyper, [batch], batch)
    assert any(hypergradient(model, hyper, [batch], batch, mode="last-step")["rate"].values())


@pytest.mark.parametrize(("model", "message"), [(nn.Linear, "the class Linear"), (len, "builtin")])
def test_what_is_no_module(model: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"the model is {message}.* torch.nn.Module"):
        fedl2p.learn(model, {"a": ClientData(data(), data(6))})


def test_paths_and_fractions_where_something_else_is_wanted() -> None:
    with pytest.raises(ValueError, match=r"metanets is a str.*MetaNets\.load\(path\)"):
        fedl2p.personalize(Base(), "metanets", data())
    with pytest.raises(ValueError, match=r"rounds is 1\.5, but must be a whole number"):
        fedl2p.Rounds(rounds=1.5)
    hyper = Hyperparams.constant(find_sites(Base()), mix=0.5, rate=0.1)
    with pytest.raises(ValueError, match=r"seed is 0\.5, but must be a whole number"):
        finetune(Base(), hyper, data(), seed=0.5)


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
