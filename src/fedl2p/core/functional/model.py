"""A torch.nn.Module as a function of named tensors, for one client or for a stack of clients.

Shapes: C clients, B norm layers, n examples, K classes. Every tensor of a stack has a leading
dimension C; one client is a stack with C = 1. With C > 1 the forward pass runs under
``torch.func.vmap``; gradients are taken outside of it, of the sum of the clients' losses, which
leaves each client its own gradient because no client's loss depends on another's parameters.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from fedl2p.core.functional.mixed_norm import (
    Fused,
    MixedBatchNorm,
    client_statistics,
    with_mixed_norms,
)
from fedl2p.core.functional.precision import autocast, compute_of
from fedl2p.core.settings import Statistics
from fedl2p.core.sites import Sites, find_sites

SMALL = 1_000_000
"""Parameters of a small model."""

_Place = tuple[dict[str, Any], str]
"""A dictionary of a module's parameters or buffers, and a key of it."""


@dataclass(frozen=True)
class ModelState:
    """What fine-tuning changes: parameters and the client's running statistics, by name.

    ``params[name]`` has shape (C, ...). ``stats`` holds ``<norm>.client_mean`` and
    ``<norm>.client_var`` of shape (C, channels) and ``<norm>.client_weight`` of shape (C,).
    ``moments`` is the state of the inner loop's optimizer, if it has one.
    """

    params: dict[str, Tensor]
    stats: dict[str, Tensor]
    moments: dict[str, Tensor] = field(default_factory=dict)

    def detach(self) -> ModelState:
        """Return the same values outside of any graph."""
        return ModelState(
            {k: v.detach() for k, v in self.params.items()},
            {k: v.detach() for k, v in self.stats.items()},
            {k: v.detach() for k, v in self.moments.items()},
        )

    def take(self, members: Sequence[int]) -> ModelState:
        """Return the tensors of some clients."""
        rows = torch.as_tensor(members, device=next(iter(self.params.values())).device)
        return ModelState(
            {k: v.index_select(0, rows) for k, v in self.params.items()},
            {k: v.index_select(0, rows) for k, v in self.stats.items()},
            {k: v.index_select(0, rows) for k, v in self.moments.items()},
        )

    def squeezed(self) -> ModelState:
        """Return one client's tensors without the client dimension."""
        return ModelState(
            {k: v.squeeze(0) for k, v in self.params.items()},
            {k: v.squeeze(0) for k, v in self.stats.items()},
            {k: v.squeeze(0) for k, v in self.moments.items()},
        )

    def unsqueezed(self) -> ModelState:
        """Return one client's tensors with the client dimension that they lack."""
        return ModelState(
            {k: v.unsqueeze(0) for k, v in self.params.items()},
            {k: v.unsqueeze(0) for k, v in self.stats.items()},
            {k: v.unsqueeze(0) for k, v in self.moments.items()},
        )

    def leaves(self) -> ModelState:
        """Return the same values as leaves of a new graph."""
        return ModelState(
            {k: v.detach().requires_grad_() for k, v in self.params.items()},
            {k: v.detach().requires_grad_() for k, v in self.stats.items()},
            {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in self.moments.items()},
        )


class _Workspace:
    """A copy of the model with mixed norms, into which named tensors are put for a call.

    It is changed during a call, so every thread has its own.
    """

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        self.module = with_mixed_norms(model)
        modules = dict(self.module.named_modules())
        self.norms: dict[str, MixedBatchNorm] = {}
        for name in sites.norms:
            norm = modules[name]
            assert isinstance(norm, MixedBatchNorm)
            self.norms[name] = norm
        self._norm_mode: tuple[Fused, bool] | None = None
        by_id = {id(p): name for name, p in self.module.named_parameters()}
        of_norms = {id(b) for norm in self.norms.values() for b in norm.buffers()}
        self._others = {k: b for k, b in self.module.named_buffers() if id(b) not in of_norms}
        other = {id(b): name for name, b in self._others.items()}
        # A tensor that several layers share has one name in sites.params but several places.
        self._params: dict[str, list[_Place]] = {name: [] for name in sites.params}
        self._buffers: dict[str, list[_Place]] = {name: [] for name in self._others}
        for module in self.module.modules():
            for name, p in module._parameters.items():
                if p is not None and by_id[id(p)] in self._params:
                    self._params[by_id[id(p)]].append((module._parameters, name))
            for name, buffer in module._buffers.items():
                if buffer is not None and id(buffer) in other:
                    self._buffers[other[id(buffer)]].append((module._buffers, name))
        self._stats: dict[str, _Place] = {
            _join(name, part): (norm._buffers, part)
            for name, norm in self.norms.items()
            for part in ("client_mean", "client_var", "client_weight")
        }
        self._places = [
            *(place for places in self._params.values() for place in places),
            *(place for places in self._buffers.values() for place in places),
            *self._stats.values(),
            *((norm._buffers, "mix") for norm in self.norms.values()),
        ]
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)

    def set_mode(self, training: bool, fused: Fused, *, first_order: bool) -> None:
        """Set how the next calls run; ``first_order``: no gradient of a gradient will be taken."""
        if self.module.training != training:
            self.module.train(training)
        if self._norm_mode != (fused, first_order):
            self._norm_mode = fused, first_order
            for norm in self.norms.values():
                norm.fused, norm.first_order = fused, first_order

    def __call__(
        self, params: dict[str, Tensor], stats: dict[str, Tensor], mix: Tensor, x: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run one client; also under vmap."""
        before = self._put(params, stats, mix)
        try:
            return self.module(x), self.stats()
        finally:
            self._put_back(before)

    def _put(
        self, params: dict[str, Tensor], stats: dict[str, Tensor], mix: Tensor
    ) -> list[tuple[dict[str, Any], str, Any]]:
        """Put tensors into the module; return those that were in their places."""
        # What torch.func.functional_call does, at places looked up once: for a small net that call
        # takes a tenth of a step.
        before = [(values, leaf, values[leaf]) for values, leaf in self._places]
        for name, places in self._params.items():
            for values, leaf in places:
                values[leaf] = params[name]
        self._renew_buffers()
        for norm, part in zip(self.norms.values(), mix.unbind(0), strict=True):
            norm._buffers["mix"] = part.to(norm.running_mean.dtype)
        for name, (values, leaf) in self._stats.items():
            values[leaf] = stats[name]
        return before

    def _renew_buffers(self) -> None:
        # Copies: a layer that writes its buffers in training (spectral norm, say) must not let
        # one call change the next, nor one client another.
        for name, places in self._buffers.items():
            copied = self._others[name].clone()
            for values, leaf in places:
                values[leaf] = copied

    @staticmethod
    def _put_back(before: list[tuple[dict[str, Any], str, Any]]) -> None:
        for values, leaf, value in before:
            values[leaf] = value

    def stats(self) -> dict[str, Tensor]:
        """Return the running statistics in the module."""
        return {k: values[leaf] for k, (values, leaf) in self._stats.items()}

    @contextmanager
    def bind(
        self, params: dict[str, Tensor], stats: dict[str, Tensor], mix: Tensor
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        """Leave one client's tensors in the module for many calls, which return logits.

        The running statistics go on from call to call (:meth:`stats`), outside of any graph. Other
        calls may come in between: they put back the tensors that they replaced.
        """
        before = self._put(params, stats, mix)

        def call(x: Tensor) -> Tensor:
            self._renew_buffers()
            logits: Tensor = self.module(x)
            for values, leaf in self._stats.values():
                if values[leaf].requires_grad:  # where the norm could not run fused
                    values[leaf] = values[leaf].detach()
            return logits

        try:
            yield call
        finally:
            self._put_back(before)


class FunctionalModel:
    """A private copy of a model with mixed norms, called as a function of its named tensors.

    Several threads may call it at a time.

    Parameters
    ----------
    model
        The global model. It is copied; the caller's is never touched.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sites = find_sites(model)
        self.plain = copy.deepcopy(model)
        self._compute = compute_of(model)
        self.stack_size = self._compute.stack_size
        self._inputs = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self._has_dropout = any(
            isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules()
        )
        # torch's vmap does not autocast convolutions (pytorch/functorch issue 305)
        self.stackable = self._compute.precision == "full" and not self._has_dropout
        workspace = _Workspace(model, self.sites)
        self._per_thread = threading.local()
        self._per_thread.workspace = workspace
        self._norms = workspace.norms
        names = set(self.sites.params)
        parameters = workspace.module.named_parameters()
        self._theta = {k: p.detach() for k, p in parameters if k in names}
        self.graph_bytes: dict[Hashable, int] = {}
        """Bytes that the graph of one inner step holds, by its inputs' shape and its optimizer."""

    @property
    def num_parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(p.numel() for p in self._theta.values())

    @property
    def small(self) -> bool:
        """Whether several of it at a time leave room: at most a million parameters."""
        return self.num_parameters <= SMALL

    @property
    def _workspace(self) -> _Workspace:
        """The workspace of the current thread."""
        made: _Workspace | None = getattr(self._per_thread, "workspace", None)
        if made is None:
            made = self._per_thread.workspace = _Workspace(self.plain, self.sites)
        return made

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(iter(self._theta.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first trainable parameter."""
        return next(iter(self._theta.values())).dtype

    def start(self, clients: int, statistics: Statistics = "corrected") -> ModelState:
        """Return the global model's parameters and fresh client statistics for C clients.

        Parameters
        ----------
        clients
            C.
        statistics
            How running statistics start: ``corrected`` with weight 0 (no bias), ``published`` at
            mean 0 and variance 1, ``global`` at the global model's (what plain batch-norm does
            when training goes on).
        """
        stats: dict[str, Tensor] = {}
        for name, norm in self._norms.items():
            mean, var = norm.running_mean, norm.running_var
            zero, one = mean.new_zeros(()), mean.new_ones(())
            first = {
                "corrected": (torch.zeros_like(mean), torch.zeros_like(var), zero),
                "published": (torch.zeros_like(mean), torch.ones_like(var), one),
                "global": (mean, var, one),
            }[statistics]
            for part, value in zip(("mean", "var", "weight"), first, strict=True):
                stats[_join(name, f"client_{part}")] = value.expand(clients, *value.shape)
        params = {k: v.expand(clients, *v.shape) for k, v in self._theta.items()}
        return ModelState(params, stats)

    def logits(
        self,
        state: ModelState,
        mix: Tensor,
        x: Tensor,
        *,
        training: bool,
        dropout_seed: int = 0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the model.

        Parameters
        ----------
        state
            Tensors of C clients.
        mix
            Shape (C, B).
        x
            Inputs, shape (C, n, ...); floating ones are cast to the model's dtype.
        training
            Training mode: batch statistics are mixed and enter the running ones. Otherwise the
            running ones are mixed.
        noise
            Seed of dropout's masks in training mode.

        Returns
        -------
        logits, stats
            Shape (C, n, K), and the running statistics afterwards.

        Raises
        ------
        ValueError
            If several clients come for a model with dropout in training, or for one that computes
            in bfloat16.
        """
        if len(x) > 1:
            return self.stacked(state.params, state.stats, mix, x, training=training)
        # squeezed, not indexed: the backward of an index fills and copies every tensor
        one, mix, x = state.squeezed(), mix.squeeze(0), x.squeeze(0)
        y, stats = self.single(
            one.params, one.stats, mix, x, training=training, dropout_seed=dropout_seed
        )
        return y.unsqueeze(0), {k: v.unsqueeze(0) for k, v in stats.items()}

    def single(
        self,
        params: dict[str, Tensor],
        stats: dict[str, Tensor],
        mix: Tensor,
        x: Tensor,
        *,
        training: bool,
        dropout_seed: int = 0,
        first_order: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the model for one client: as :meth:`logits`, without the client dimension.

        ``first_order`` says that gradients will be taken once at most, and only of the logits, so
        that the norms may save time.
        """
        workspace = self._workspace
        workspace.set_mode(training, "single", first_order=first_order)
        with self._context(x.device, dropout_seed if training else None):
            y, stats = workspace(params, stats, mix, self._cast(x))
        return y.to(self.dtype), stats

    @contextmanager
    def bind(
        self, params: dict[str, Tensor], stats: dict[str, Tensor], mix: Tensor
    ) -> Iterator[BoundModel]:
        """Leave one client's tensors in the model for many training calls, in this thread.

        ``params`` may be changed in place between the calls; no tensor has a client dimension.
        """
        workspace = self._workspace
        with workspace.bind(params, stats, mix) as call:
            yield BoundModel(self, workspace, call)

    def stacked(
        self,
        params: dict[str, Tensor],
        stats: dict[str, Tensor],
        mix: Tensor,
        x: Tensor,
        *,
        training: bool,
        first_order: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the model for several clients under vmap, as :meth:`logits`."""
        if self._compute.precision != "full":
            raise ValueError(
                f"{len(x)} clients came stacked, but in {self._compute.precision} clients "
                "run one at a time"
            )
        if training and self._has_dropout:
            raise ValueError(
                f"the model has dropout, whose masks belong to one client, but {len(x)} "
                "clients came stacked; run them one at a time"
            )
        workspace = self._workspace
        workspace.set_mode(training, "stacked", first_order=first_order)
        y, stats = vmap(workspace)(params, stats, mix, self._cast(x))
        return y, stats

    def _context(
        self, device: torch.device, dropout_seed: int | None
    ) -> AbstractContextManager[object]:
        """Return the context of a call: its precision and, given a seed, its dropout masks."""
        precision = autocast(self._compute, device)
        if dropout_seed is None or not self._has_dropout:
            return precision
        return _seeded(dropout_seed, device, precision)

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self._inputs) if x.is_floating_point() else x

    def client_stats(
        self, stats: dict[str, Tensor], client: int
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return one client's mean and variance of each norm layer, for folding."""
        folded = {}
        for name, norm in self._norms.items():
            mean, var, weight = (
                stats[_join(name, f"client_{part}")][client].detach()
                for part in ("mean", "var", "weight")
            )
            folded[name] = client_statistics(
                mean, var, weight, (norm.running_mean, norm.running_var)
            )
        return folded


class BoundModel:
    """A model with one client's tensors in it; see :meth:`FunctionalModel.bind`."""

    def __init__(
        self, net: FunctionalModel, workspace: _Workspace, call: Callable[[Tensor], Tensor]
    ) -> None:
        self._net, self._workspace, self._call = net, workspace, call

    def logits(self, x: Tensor, *, dropout_seed: int = 0) -> Tensor:
        """Return logits, for gradients of first order; the batch enters the statistics."""
        self._workspace.set_mode(True, "single", first_order=True)
        net = self._net
        with net._context(x.device, dropout_seed):
            y = self._call(net._cast(x))
        return y.to(net.dtype)

    def stats(self) -> dict[str, Tensor]:
        """Return the current running statistics."""
        return self._workspace.stats()


@contextmanager
def _seeded(
    seed: int, device: torch.device, inner: AbstractContextManager[object]
) -> Iterator[None]:
    """Let layers that use the global generators draw from a seed; then put these back."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        with inner:
            yield


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
