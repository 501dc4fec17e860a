"""A model as a pure function of named tensors, for one client or for a cohort at once.

Shapes: C clients, B norm layers, n examples, K classes. Every tensor of a cohort has a leading
dimension C; one client is a cohort with C = 1. With C > 1 the forward pass runs under
``torch.func.vmap``; gradients are taken outside of it, of the sum of the clients' losses, which
leaves each client its own gradient because no client's loss depends on another's parameters.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
class NetState:
    """What fine-tuning changes: parameters and the client's running statistics, by name.

    ``params[name]`` has shape (C, ...). ``stats`` holds ``<norm>.client_mean`` and
    ``<norm>.client_var`` of shape (C, channels) and ``<norm>.client_weight`` of shape (C,).
    """

    params: dict[str, Tensor]
    stats: dict[str, Tensor]

    def detach(self) -> NetState:
        """Return the same values outside of any graph."""
        return NetState(
            {k: v.detach() for k, v in self.params.items()},
            {k: v.detach() for k, v in self.stats.items()},
        )

    def take(self, members: Sequence[int]) -> NetState:
        """Return the tensors of some clients."""
        rows = torch.as_tensor(members, device=next(iter(self.params.values())).device)
        return NetState(
            {k: v.index_select(0, rows) for k, v in self.params.items()},
            {k: v.index_select(0, rows) for k, v in self.stats.items()},
        )

    def squeezed(self) -> NetState:
        """Return one client's tensors without the client dimension."""
        return NetState(
            {k: v.squeeze(0) for k, v in self.params.items()},
            {k: v.squeeze(0) for k, v in self.stats.items()},
        )

    def unsqueezed(self) -> NetState:
        """Return one client's tensors with the client dimension that they lack."""
        return NetState(
            {k: v.unsqueeze(0) for k, v in self.params.items()},
            {k: v.unsqueeze(0) for k, v in self.stats.items()},
        )

    def leaves(self) -> NetState:
        """Return the same values as leaves of a new graph."""
        return NetState(
            {k: v.detach().requires_grad_() for k, v in self.params.items()},
            {k: v.detach().requires_grad_() for k, v in self.stats.items()},
        )


class _Copy:
    """A copy of the model with mixed norms, into which named tensors are put for a call.

    It is changed during a call, so that every thread has its own.
    """

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        self.module = with_mixed_norms(model)
        modules = dict(self.module.named_modules())
        self.norms: dict[str, MixedBatchNorm] = {}
        for name in sites.norms:
            norm = modules[name]
            assert isinstance(norm, MixedBatchNorm)
            self.norms[name] = norm
        self._norms_run: tuple[Fused, bool] | None = None
        by_id = {id(p): name for name, p in self.module.named_parameters()}
        ours = {id(b) for norm in self.norms.values() for b in norm.buffers()}
        self._others = {k: b for k, b in self.module.named_buffers() if id(b) not in ours}
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

    def set(self, training: bool, fused: Fused, *, once: bool) -> None:
        """Set how the next calls run; ``once``: gradients will be taken once only."""
        if self.module.training != training:
            self.module.train(training)
        if self._norms_run != (fused, once):
            self._norms_run = fused, once
            for norm in self.norms.values():
                norm.fused, norm.once = fused, once

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
        """Put tensors in place; return what was there."""
        # What torch.func.functional_call does, at places looked up once: for a small net that call
        # takes a tenth of a step.
        before = [(values, leaf, values[leaf]) for values, leaf in self._places]
        for name, places in self._params.items():
            for values, leaf in places:
                values[leaf] = params[name]
        self._renew()
        for norm, part in zip(self.norms.values(), mix.unbind(0), strict=True):
            norm._buffers["mix"] = part.to(norm.running_mean.dtype)
        for name, (values, leaf) in self._stats.items():
            values[leaf] = stats[name]
        return before

    def _renew(self) -> None:
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
        """Return the running statistics that are in place."""
        return {k: values[leaf] for k, (values, leaf) in self._stats.items()}

    @contextmanager
    def holding(
        self, params: dict[str, Tensor], stats: dict[str, Tensor], mix: Tensor
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        """Leave one client's tensors in place for many calls, which return logits.

        The running statistics go on from call to call (:meth:`stats`), outside of any graph. Other
        calls may come in between: they put back what they found.
        """
        before = self._put(params, stats, mix)

        def call(x: Tensor) -> Tensor:
            self._renew()
            logits: Tensor = self.module(x)
            for values, leaf in self._stats.values():
                if values[leaf].requires_grad:  # where the norm could not run fused
                    values[leaf] = values[leaf].detach()
            return logits

        try:
            yield call
        finally:
            self._put_back(before)


class Net:
    """A private copy of a model with mixed norms, called as a function of its named tensors.

    Several threads may call one net at a time.

    Parameters
    ----------
    model
        The global model. It is copied; the caller's is never touched.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sites = find_sites(model)
        self.plain = copy.deepcopy(model)
        self._compute = compute_of(model)
        self._inputs = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self._draws = any(
            isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules()
        )
        # torch's vmap does not autocast convolutions (pytorch/functorch issue 305)
        self.stackable = self._compute.precision == "full" and not self._draws
        own = _Copy(model, self.sites)
        self._copies = threading.local()
        self._copies.own = own
        self._norms = own.norms
        wanted = set(self.sites.params)
        self._theta = {k: p.detach() for k, p in own.module.named_parameters() if k in wanted}
        self.graph_bytes: dict[tuple[int, ...], int] = {}
        """Bytes that the graph of one inner step holds, by the shape of its inputs."""

    @property
    def num_parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(p.numel() for p in self._theta.values())

    @property
    def small(self) -> bool:
        """Whether several of it at a time leave room: at most a million parameters."""
        return self.num_parameters <= SMALL

    @property
    def _copy(self) -> _Copy:
        made: _Copy | None = getattr(self._copies, "own", None)
        if made is None:
            made = self._copies.own = _Copy(self.plain, self.sites)
        return made

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(iter(self._theta.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first trainable parameter."""
        return next(iter(self._theta.values())).dtype

    def start(self, clients: int, statistics: Statistics = "corrected") -> NetState:
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
        return NetState(params, stats)

    def logits(
        self,
        state: NetState,
        mix: Tensor,
        x: Tensor,
        *,
        training: bool,
        noise: int = 0,
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
        # squeezed, not indexed: the way back through an index fills and copies every tensor
        one, mix, x = state.squeezed(), mix.squeeze(0), x.squeeze(0)
        y, stats = self.single(one.params, one.stats, mix, x, training=training, noise=noise)
        return y.unsqueeze(0), {k: v.unsqueeze(0) for k, v in stats.items()}

    def single(
        self,
        params: dict[str, Tensor],
        stats: dict[str, Tensor],
        mix: Tensor,
        x: Tensor,
        *,
        training: bool,
        noise: int = 0,
        first_order: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the model for one client: as :meth:`logits`, without the client dimension.

        ``first_order`` says that gradients will be taken once at most, and only of the logits, so
        that the norms may save time.
        """
        run = self._copy
        run.set(training, "single", once=first_order)
        if training and self._draws:
            with _drawing_from(noise, x.device), autocast(self._compute, x.device):
                y, stats = run(params, stats, mix, self._cast(x))
        else:
            with autocast(self._compute, x.device):
                y, stats = run(params, stats, mix, self._cast(x))
        return y.to(self.dtype), stats

    @contextmanager
    def holding(
        self, params: dict[str, Tensor], stats: dict[str, Tensor], mix: Tensor
    ) -> Iterator[Held]:
        """Leave one client's tensors in place for many training calls, in this thread.

        ``params`` may be changed in place between the calls; no tensor has a client dimension.
        """
        copied = self._copy
        with copied.holding(params, stats, mix) as call:
            yield Held(self, copied, call)

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
        if training and self._draws:
            raise ValueError(
                f"the model has dropout, whose masks belong to one client, but {len(x)} "
                "clients came stacked; run them one at a time"
            )
        run = self._copy
        run.set(training, "stacked", once=first_order)
        y, stats = vmap(run)(params, stats, mix, self._cast(x))
        return y, stats

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


class Held:
    """One client's tensors in place; see :meth:`Net.holding`."""

    def __init__(self, net: Net, copied: _Copy, call: Callable[[Tensor], Tensor]) -> None:
        self._net, self._copied, self._call = net, copied, call

    def logits(self, x: Tensor, *, noise: int = 0) -> Tensor:
        """Return logits, for gradients of first order; the batch enters the statistics."""
        self._copied.set(True, "single", once=True)
        net = self._net
        if not net._draws:
            with autocast(net._compute, x.device):
                y = self._call(net._cast(x))
        else:
            with _drawing_from(noise, x.device), autocast(net._compute, x.device):
                y = self._call(net._cast(x))
        return y.to(net.dtype)

    def stats(self) -> dict[str, Tensor]:
        """Return the running statistics so far."""
        return self._copied.stats()


@contextmanager
def _drawing_from(seed: int, device: torch.device) -> Iterator[None]:
    """Let layers that use the global generators draw from a seed; then put these back."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        yield


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
