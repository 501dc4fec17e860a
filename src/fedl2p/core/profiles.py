"""A client's data profile: how its data lie to the global model.

Lee et al., "FedL2P", NeurIPS 2023, section 3.2: the input of BNNet (a divergence per norm layer)
and of LRNet (mean and standard deviation of every layer's input). One pass over the client's clean
training data in evaluation mode yields both; the reference takes two passes over augmented data.

Ours beside them, since these two do not see labels: the same pass yields loss and accuracy of the
global model, entropy, number and agreement of the labels and the number of examples, and with one
backward pass the gradient of every parameter tensor relative to its weights.
:mod:`fedl2p.core.profile_groups` names the entries.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedl2p.core import trees
from fedl2p.core.functional.copies import Modes, eager_copy
from fedl2p.core.functional.mixed_norm import MarkedMean
from fedl2p.core.functional.randomness import drawing_from, generators
from fedl2p.core.functional.recorded_objective import objective_of
from fedl2p.core.labelled_statistics import LabelledStatistics
from fedl2p.core.objective import Loss, Objective, PerExample, Pick, objective
from fedl2p.core.profile_groups import GROUPS
from fedl2p.core.settings import PUBLISHED_PROFILE, ProfileGroup, profile_groups
from fedl2p.core.sites import Sites, find_sites
from fedl2p.core.trees import Tree
from fedl2p.core.user_data import inputs_of_batch, targets_of_batch
from fedl2p.text_table import Words, html_table, short_repr, span

EPS = 1e-5
"""Added to every variance before a logarithm, a ratio or a root is taken, as published."""

READS_TARGETS = frozenset[ProfileGroup](("gradients", "loss", "labels"))
"""Groups that need the targets."""

GRADIENT_BATCH = 64
"""Most examples whose graph is in memory at a time."""


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
    gradients
        Shape (P,): norm of the gradient of the global model's mean loss, relative to the norm of
        the weights, of each parameter tensor. Weights of a root mean square below 0.001 count as
        that large. None if it was not asked for, as the following ones.
    loss
        Shape (2,): mean loss of the global model, in the loss's unit, and its accuracy in [0, 1],
        or metric; 0 where there is none.
    labels
        Shape (3,): entropy of the labels in nats, number of classes among them, and their
        agreement. Those of cross-entropy are its labels, without ignored ones; of bce the mean over
        an example's labels of the entropy and the number of its two values; of a callable loss the
        targets if they are whole numbers. Otherwise both are 0. The agreement is the share of pairs
        of examples of one predicted class that have one label too, with half a pair more on either
        side, so that few pairs say little: about 1 where labels follow from what the model sees,
        under other codes too, and less where some are wrong. 0.5 where no class is predicted, by
        losses other than cross-entropy.
    size
        Shape (1,): number of examples.
    """

    divergence: Tensor
    moments: Tensor
    num_examples: int
    sites: Sites
    gradients: Tensor | None = None
    loss: Tensor | None = None
    labels: Tensor | None = None
    size: Tensor | None = None

    def __rich_repr__(self) -> Iterator[tuple[str, object]]:
        if self.divergence.dim() == 2:
            yield "clients", len(self.divergence)
        yield "num_examples", self.num_examples
        for name, values in self.tensors().items():
            if values.numel():
                yield name, Words(f"[{span(values.detach().flatten().tolist())}]")

    def __repr__(self) -> str:
        return short_repr(self)

    def _repr_html_(self) -> str:
        if self.divergence.dim() == 2:
            return f"<pre>{escape(repr(self))}</pre>"
        rows = [("profile", "value", "unit")]
        for name, group in GROUPS.items():
            if getattr(self, group.field) is None:
                continue
            named = zip(group.names(self.sites), self.entries(name).tolist(), strict=True)
            rows += [(k, f"{v:.3g}", group.unit(i).strip()) for i, (k, v) in enumerate(named)]
        return html_table(rows)

    @classmethod
    def stack(cls, many: Sequence[Profile]) -> Profile:
        """Stack those of C clients along a new first dimension; examples are added up."""
        tensors = [p.tensors() for p in many]
        return cls(
            **{field: torch.stack([t[field] for t in tensors]) for field in tensors[0]},
            num_examples=sum(p.num_examples for p in many),
            sites=many[0].sites,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that there are, by field."""
        held = {group.field: getattr(self, group.field) for group in GROUPS.values()}
        return {field: value for field, value in held.items() if value is not None}

    def entries(self, group: ProfileGroup) -> Tensor:
        """Return the entries of a group as one vector, shape (E,) or (C, E).

        Raises
        ------
        ValueError
            If the profile lacks the group.
        """
        values: Tensor | None = getattr(self, GROUPS[group].field)
        if values is None:
            raise ValueError(
                f"the profile lacks its group {group!r}, which the meta-nets read; make it by "
                "profile(model, batches, groups=metanets.config.profile)"
            )
        return values.flatten(-2) if group == "moments" else values


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
    objective
        What loss and gradients are of; None for what is recorded on the model.
    """

    def __init__(self, model: nn.Module, objective: Objective | None = None) -> None:
        self.sites = find_sites(model)
        self._objective = objective_of(model) if objective is None else objective
        self._model = eager_copy(model)
        Modes(self._model).set(False)
        for module in self._model.modules():
            if isinstance(module, nn.RNNBase):  # cuDNN has gradients in training mode only
                module.dropout = 0.0
                module.training = True
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
    def __call__(
        self, batches: Iterable[Any], groups: Collection[str] = PUBLISHED_PROFILE
    ) -> Profile:
        """Profile one client; see :func:`profile`."""
        chosen = profile_groups(groups) if groups else ()
        with self._lock:
            return self._profile(batches, chosen)

    def _profile(self, batches: Iterable[Any], groups: Collection[ProfileGroup]) -> Profile:
        self._channels = {name: _Moments() for name in self.sites.norms}
        self._whole = {name: _Moments() for name in (*self.sites.layers, *self.sites.norms)}
        wants_gradients = "gradients" in groups
        parameters = dict(self._model.named_parameters()) if wants_gradients else {}
        labelled = LabelledStatistics(
            self._objective,
            {k: parameters[k] for k in self.sites.params if k in parameters},
            self._dtype,
        )
        reads_targets = not READS_TARGETS.isdisjoint(groups)
        examples = 0
        for batch in batches:
            inputs = inputs_of_batch(batch)
            examples += trees.length(inputs)
            if not reads_targets:
                self._run(trees.map_tree(self._cast, inputs))
                continue
            targets = trees.to_device(targets_of_batch(batch), self._device)
            size = GRADIENT_BATCH if wants_gradients else max(trees.length(inputs), 1)
            pieces = (trees.split(inputs, size), trees.split(targets, size))
            for x, y in zip(*pieces, strict=True):
                with torch.set_grad_enabled(wants_gradients):
                    labelled.add(self._run(trees.map_tree(self._cast, x), judged=True), y)
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
                    raise self._not_finite(f"{what} of layer {name!r}")
        made: dict[ProfileGroup, Callable[[], Tensor]] = {
            "gradients": labelled.gradients,
            "loss": labelled.loss,
            "labels": labelled.labels,
            "size": lambda: torch.full((1,), float(examples)),
        }
        more = {
            GROUPS[group].field: make().to(self._device, self._dtype)
            for group, make in made.items()
            if group in groups
        }
        for group, described in GROUPS.items():
            if group in PUBLISHED_PROFILE or group not in groups:
                continue
            entries = more[described.field].tolist()
            for name, entry in zip(described.names(self.sites), entries, strict=True):
                if not math.isfinite(entry):
                    raise self._not_finite(name)
        return Profile(
            torch.stack(divergence) if divergence else self._empty(0),
            torch.stack(moments) if moments else self._empty(0, 2),
            examples,
            self.sites,
            **more,
        )

    def _not_finite(self, what: str) -> ValueError:
        return ValueError(
            f"{what} is not finite in {self._dtype}; the data or the model holds NaN, infinity or "
            "values too large for it: check both"
        )

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self._device, self._inputs if x.is_floating_point() else x.dtype)

    def _run(self, x: Tree, *, judged: bool = False) -> Any:
        """Run the model; return its outputs, if they are to be judged as the loss takes them."""
        # A model that draws in evaluation mode draws the same for every client.
        with drawing_from(generators(), 0, self._device):
            return self._seen(x, judged)

    def _seen(self, x: Tree, judged: bool) -> Any:
        def run() -> Any:
            # Copies, since a model may change its inputs in place, and here they are the caller's.
            if judged:
                return self._objective.forward(self._model, trees.clone(x))
            return trees.call(self._model, trees.clone(x))

        if self._functional is not None:
            with self._functional:
                return run()
        outputs = run()
        silent = {k: m for k, m in self._layers.items() if self._whole[k].count == 0}
        if silent and trees.length(
            x
        ):  # not called as modules: seen by their weights from now on, this batch included
            self._functional = _CalledByWeight(silent, lambda name: self._whole[name])
            whole, channels = self._whole, self._channels
            self._whole = {name: _Moments() for name in whole}
            self._channels = {name: _Moments() for name in channels}
            return self._seen(x, judged)
        return outputs

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
    groups: Collection[str] = PUBLISHED_PROFILE,
    loss: Loss = "cross-entropy",
    ignore_index: int | None = None,
    metric: str | PerExample | None = None,
    outputs: Pick | None = None,
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
    groups
        What to make beside divergences and moments, which are made always: ``full``, ``published``
        (nothing), ``gradients``, ``loss``, ``labels``, ``size``, in a tuple. All but ``size`` need
        batches with targets. What each reveals:
        :class:`~fedl2p.core.settings.MetaNetsConfig`.
    loss, ignore_index, metric, outputs
        What loss, accuracy and gradients are of, see :mod:`fedl2p.core.objective`.
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
        If there is no example, a statistic is not finite, targets are missing, or ``sites`` are
        another model's.

    Notes
    -----
    Per channel, the client's N(m_c, v_c + eps) against the global N(m_g, v_g + eps), eps = 1e-5,
    v_c unbiased over all samples and positions. Sums are kept in float64.
    """
    aim = objective(loss, ignore_index=ignore_index, metric=metric, outputs=outputs)
    profiler = Profiler(model, aim)
    if sites is not None and sites != profiler.sites:
        raise ValueError("sites belong to another model: names of layers or parameters differ")
    return profiler(batches, groups)
