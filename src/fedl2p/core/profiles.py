"""A client's data profile: how far its feature statistics lie from the global model's.

Lee et al., "FedL2P", NeurIPS 2023, section 3.2: the input of BNNet (a divergence per norm layer)
and of LRNet (mean and standard deviation of every layer's input). One pass over the client's clean
training data in evaluation mode yields both; the reference takes two passes over augmented data.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedl2p.core import trees
from fedl2p.core.functional.copies import Modes, eager_copy
from fedl2p.core.functional.mixed_norm import MarkedMean
from fedl2p.core.functional.randomness import drawing_from, generators
from fedl2p.core.sites import Sites, find_sites
from fedl2p.core.trees import Tree
from fedl2p.core.user_data import inputs_of_batch

EPS = 1e-5
"""Added to every variance before a logarithm, a ratio or a root is taken, as published."""


@dataclass(frozen=True)
class Profile:
    """Statistics of a client's data in the global model (C clients: a leading dimension C).

    Parameters
    ----------
    divergence
        Shape (B,), nats: symmetrised KL divergence between the client's and the global input
        distribution of each norm layer, mean over channels.
    moments
        Shape (L, 2): mean and standard deviation of each layer's whole input tensor.
    num_examples
        Number of examples profiled.
    sites
        The names that the entries belong to.
    """

    divergence: Tensor
    moments: Tensor
    num_examples: int
    sites: Sites

    @classmethod
    def stack(cls, many: Sequence[Profile]) -> Profile:
        """Stack those of C clients along a new first dimension; examples are added up."""
        return cls(
            torch.stack([p.divergence for p in many]),
            torch.stack([p.moments for p in many]),
            sum(p.num_examples for p in many),
            many[0].sites,
        )


def symmetric_kl(mean_g: Tensor, var_g: Tensor, mean_c: Tensor, var_c: Tensor) -> Tensor:
    """Return 1/2 [KL(g || c) + KL(c || g)] of two normal distributions, elementwise, in nats."""
    ratio = var_g / var_c
    distance = (mean_g - mean_c) ** 2
    return 0.25 * (ratio + 1 / ratio - 2 + distance * (1 / var_g + 1 / var_c))


@dataclass
class _Moments:
    """Count, mean and sum of squared deviations, merged exactly (Chan, Golub, LeVeque 1979)."""

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    m2: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, rows: Tensor) -> None:
        """Merge in values of shape (values, channels)."""
        rows = rows.double()
        count, total = len(rows), self.count + len(rows)
        if count == 0:
            return
        mean = rows.mean(0)
        m2 = ((rows - mean) ** 2).sum(0)
        delta = mean - self.mean.to(mean.device)
        self.m2 = self.m2.to(mean.device) + m2 + delta**2 * (self.count * count / total)
        self.mean = self.mean.to(mean.device) + delta * (count / total)
        self.count = total

    def variance(self) -> Tensor:
        """Return the unbiased variance; 0 for a single value, which has none."""
        return self.m2 / max(self.count - 1, 1)


class _CalledByWeight(TorchFunctionMode):
    """Sees the inputs of layers whose weights a forward hands to torch's functions itself."""

    def __init__(self, layers: Mapping[str, nn.Module], moments: Callable[[str], _Moments]) -> None:
        super().__init__()
        self.names = frozenset(layers)
        self._names = {
            id(layer.weight): name
            for name, layer in layers.items()
            if isinstance(layer.weight, Tensor)
        }
        self._moments = moments

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        values = [*args, *kwargs.values()]
        name = next((self._names[id(v)] for v in values if id(v) in self._names), None)
        # F.linear, F.conv2d, F.layer_norm and others take the input first
        if name is not None and func in _LAYER_FUNCTIONS and isinstance(values[0], Tensor):
            self._moments(name).add(values[0].detach().reshape(-1, 1))
        return func(*args, **kwargs)


_LAYER_FUNCTIONS = frozenset(
    getattr(F, name)
    for name in (
        *("linear", "layer_norm", "group_norm", "batch_norm"),
        *(f"conv{d}d" for d in (1, 2, 3)),
        *(f"conv_transpose{d}d" for d in (1, 2, 3)),
    )
)


class Profiler:
    """Computes profiles of clients against one frozen model, by hooks in a private copy of it.

    Parameters
    ----------
    model
        The global model, with plain batch-norm. It is copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sites = find_sites(model)
        self._model = eager_copy(model)
        Modes(self._model).set(False)
        modules = dict(self._model.named_modules())
        self._channels: dict[str, _Moments] = {}
        self._whole: dict[str, _Moments] = {}
        self._statistics: dict[str, tuple[Tensor, Tensor]] = {}
        for name in self.sites.norms:
            self._watch_norm(name, modules[name])
        self._layers = {k: modules[k] for k in self.sites.layers if k not in self._statistics}
        for name, layer in self._layers.items():
            layer.register_forward_pre_hook(self._hook(name), with_kwargs=True)
        self._functional: _CalledByWeight | None = None
        tensors = [p for p in self._model.parameters() if p.is_floating_point()]
        self._inputs, self._device = tensors[0].dtype, tensors[0].device
        self._dtype = torch.promote_types(self._inputs, torch.float32)
        self._lock = threading.Lock()  # the sums are one client's; clients come in threads

    def _watch_norm(self, name: str, norm: nn.Module) -> None:
        """Let whoever calls batch_norm with the layer's statistics show its input."""
        mean, var = norm.running_mean, norm.running_var
        assert isinstance(mean, Tensor) and isinstance(var, Tensor)
        self._statistics[name] = mean, var

        def observed(
            x: Tensor,
            weight: Tensor | None = None,
            bias: Tensor | None = None,
            training: bool = False,
            momentum: float = 0.1,
            eps: float = 1e-5,
        ) -> Tensor:
            self._channels[name].add(x.detach().transpose(0, 1).flatten(1).T)
            self._whole[name].add(x.detach().reshape(-1, 1))
            return F.batch_norm(x, mean, var, weight, bias, False, momentum, eps)

        norm._buffers["running_mean"] = MarkedMean.of(mean, observed)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def observe(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            # a layer's one input, given by position or by keyword
            if self._functional is not None and name in self._functional.names:
                return
            x = next(v for v in (*inputs, *named.values()) if isinstance(v, Tensor)).detach()
            self._whole[name].add(x.reshape(-1, 1))

        return observe

    @torch.no_grad()
    def __call__(self, batches: Iterable[Any]) -> Profile:
        """Profile one client; see :func:`profile`."""
        with self._lock:
            return self._profile(batches)

    def _profile(self, batches: Iterable[Any]) -> Profile:
        self._channels = {name: _Moments() for name in self.sites.norms}
        self._whole = {name: _Moments() for name in (*self.sites.layers, *self.sites.norms)}
        examples = 0
        for batch in batches:
            x = trees.map_tree(self._cast, inputs_of_batch(batch))
            # A model that draws in evaluation mode draws the same for every client.
            with drawing_from(generators(), 0, self._device):
                self._run(x)
            examples += trees.length(x)
        if examples == 0:
            raise ValueError("there is no example to profile; give at least one batch")
        # What is too large for this dtype becomes infinite here, which is refused below.
        divergence = [self._divergence(name).to(self._dtype) for name in self.sites.norms]
        moments = [self._layer_moments(name).to(self._dtype) for name in self.sites.layers]
        for what, names, values in (
            ("divergence", self.sites.norms, divergence),
            ("moments", self.sites.layers, moments),
        ):
            for name, value in zip(names, values, strict=True):
                if not bool(value.isfinite().all()):
                    raise ValueError(
                        f"{what} of layer {name!r} is not finite in {self._dtype}; the data or the "
                        "model holds NaN, infinity or values too large for it: check both"
                    )
        return Profile(
            torch.stack(divergence) if divergence else self._empty(0),
            torch.stack(moments) if moments else self._empty(0, 2),
            examples,
            self.sites,
        )

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self._device, self._inputs if x.is_floating_point() else x.dtype)

    def _run(self, x: Tree) -> None:
        # Copies, since a model may change its inputs in place, and here they are the caller's.
        if self._functional is not None:
            with self._functional:
                trees.call(self._model, trees.clone(x))
            return
        trees.call(self._model, trees.clone(x))
        silent = {k: m for k, m in self._layers.items() if self._whole[k].count == 0}
        if silent and trees.length(
            x
        ):  # not called as modules: seen by their weights from now on, this batch included
            self._functional = _CalledByWeight(silent, lambda name: self._whole[name])
            whole, channels = self._whole, self._channels
            self._whole = {name: _Moments() for name in whole}
            self._channels = {name: _Moments() for name in channels}
            self._run(x)

    def _empty(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def _divergence(self, name: str) -> Tensor:
        seen = self._channels[name]
        if seen.count == 0:  # a layer that evaluation mode never runs says nothing about the data
            return torch.zeros((), dtype=torch.float64, device=self._device)
        mean, var = self._statistics[name]
        kl = symmetric_kl(mean.double(), var.double() + EPS, seen.mean, seen.variance() + EPS)
        return kl.mean()

    def _layer_moments(self, name: str) -> Tensor:
        seen = self._whole[name]
        if seen.count == 0:
            return torch.tensor([0.0, EPS**0.5], dtype=torch.float64, device=self._device)
        return torch.cat([seen.mean, (seen.variance() + EPS).sqrt()])


def profile(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    sites: Sites | None = None,
) -> Profile:
    """Profile a client's data in one pass through the global model.

    Parameters
    ----------
    model
        The global model, with plain batch-norm. Evaluated in evaluation mode on its own running
        statistics; neither its tensors, its hooks nor its training flags are touched.
    batches
        Batches of inputs, (n, ...) or a dictionary, or tuples whose first entry is such a batch
        (the targets "labels" of a dictionary are left out). How the data is cut into batches does
        not matter, a batch of one example included.
    sites
        Sites that the profile must belong to; by default those of the model.

    Returns
    -------
    Profile
        A layer that never runs in evaluation mode (an auxiliary head, say) gets divergence 0 and
        moments (0, sqrt(eps)).

    Raises
    ------
    ValueError
        If there is no example, a statistic is not finite, or ``sites`` are another model's.

    Notes
    -----
    Per channel, the client's N(m_c, v_c + eps) against the global N(m_g, v_g + eps), eps = 1e-5,
    v_c unbiased over all samples and positions. Sums are kept in float64.
    """
    profiler = Profiler(model)
    if sites is not None and sites != profiler.sites:
        raise ValueError("sites belong to another model: names of layers or parameters differ")
    return profiler(batches)
