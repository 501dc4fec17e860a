"""A copy of a model into which named tensors are put for a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.batchnorm import _BatchNorm

from fedl2p.core.functional.copies import Modes, eager_copy
from fedl2p.core.functional.mixed_norm import Fused, MixedNorm
from fedl2p.core.objective import Objective
from fedl2p.core.sites import Sites

_Place = tuple[dict[str, Any], str]
"""A dictionary of a module's parameters or buffers, and a key of it."""

_Before = tuple[list[tuple[dict[str, Any], str, Any]], list[tuple[Tensor, Tensor, Tensor, Tensor]]]


@dataclass
class Findings:
    """What one model does when it runs.

    Parameters
    ----------
    draws, draws_in_evaluation
        The generators that a training pass, and one in evaluation mode, draw from.
    carried
        Names of the buffers, other than batch-norm's, that a training pass changes.
    frozen
        Names of the norms that a training pass calls with running statistics.
    attention
        Whether it calls torch's fused attention.
    recurrent
        Whether it calls a recurrent layer of torch (LSTM, GRU, RNN).
    writes_inputs
        Whether it changes its inputs in place, so that it must be given copies.
    writes_parameters
        Whether it changes its trainable parameters in place (norms of embeddings, bounds).
    head
        Name of the linear layer that is called last in evaluation mode; None without one.
    rowwise
        Whether in evaluation mode an example's outputs do not depend on the others of its batch.
    batchable
        Whether vmap runs several clients at once; None before it was tried.
    differentiable
        Whether a training gradient was seen to have a derivative.
    """

    draws: frozenset[str] = frozenset()
    draws_in_evaluation: frozenset[str] = frozenset()
    carried: tuple[str, ...] = ()
    frozen: frozenset[str] = frozenset()
    attention: bool = False
    recurrent: bool = False
    writes_inputs: bool = False
    writes_parameters: bool = False
    head: str | None = None
    rowwise: bool = False
    batchable: bool | None = None
    differentiable: bool = False


class Workspace:
    """A copy of the model whose norms mix, into which named tensors are put for a call.

    It is changed during a call, so that every thread has its own.

    Parameters
    ----------
    model
        It is copied.
    sites
        Its places that hyperparameters address.
    objective
        Picks the outputs from what it returns.
    """

    def __init__(self, model: nn.Module, sites: Sites, objective: Objective) -> None:
        self.module = eager_copy(model)
        self._objective = objective
        self.modes = Modes(self.module)
        modules = dict(self.module.named_modules())
        by_id = {id(p): name for name, p in self.module.named_parameters()}
        self.norms: dict[str, MixedNorm] = {}
        of_norms: set[int] = set()
        for name in sites.norms:
            norm = modules[name]
            assert isinstance(norm, _BatchNorm)
            kept = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
            of_norms.update(id(b) for b in kept if b is not None)
            self.norms[name] = MixedNorm(norm)
            of_norms.add(id(norm._buffers["running_mean"]))
        self.findings: Findings | None = None
        self._carried: tuple[str, ...] = ()
        self._norm_mode: tuple[Fused, bool] | None = None
        self.buffers = {k: b for k, b in self.module.named_buffers() if id(b) not in of_norms}
        other = {id(b): name for name, b in self.buffers.items()}
        # A tensor that several layers share has one name in sites.params but several places.
        self._params: dict[str, list[_Place]] = {name: [] for name in sites.params}
        self._buffers: dict[str, list[_Place]] = {name: [] for name in self.buffers}
        for module in self.module.modules():
            for name, p in module._parameters.items():
                if p is not None and by_id[id(p)] in self._params:
                    self._params[by_id[id(p)]].append((module._parameters, name))
            for name, buffer in module._buffers.items():
                if buffer is not None and id(buffer) in other:
                    self._buffers[other[id(buffer)]].append((module._buffers, name))
        self._places = [
            *(place for places in self._params.values() for place in places),
            *(place for places in self._buffers.values() for place in places),
        ]
        self.replaced = {
            id(values[leaf]): name
            for name, places in {**self._params, **self._buffers}.items()
            for values, leaf in places
        }
        """Names of the copy's own tensors that others are put in place of, by their ids."""
        self._stats = [
            (norm, tuple(join(name, f"client_{part}") for part in ("mean", "var", "weight")))
            for name, norm in self.norms.items()
        ]
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)

    def learn(self, findings: Findings | None) -> None:
        """Take up what an examination has found."""
        self.findings = findings
        self._carried = findings.carried if findings else ()
        for name, norm in self.norms.items():
            norm.frozen = findings is not None and name in findings.frozen

    def set_mode(self, training: bool, fused: Fused, *, first_order: bool) -> None:
        """Set how the next calls run; ``first_order``: no gradient of a gradient will be taken."""
        self.modes.set(training)
        if self._norm_mode != (fused, first_order):
            self._norm_mode = fused, first_order
            for norm in self.norms.values():
                norm.fused, norm.first_order = fused, first_order

    def __call__(
        self, params: Mapping[str, Tensor], stats: Mapping[str, Tensor], mix: Tensor, x: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run one client; also under vmap."""
        before = self._put(params, stats, mix)
        try:
            return self._objective.forward(self.module, x), self.stats()
        finally:
            self._put_back(before)

    def _put(
        self, params: Mapping[str, Tensor], stats: Mapping[str, Tensor], mix: Tensor
    ) -> _Before:
        """Put tensors in place; return what was there."""
        # What torch.func.functional_call does, at places looked up once: for a small net that call
        # takes a tenth of a step.
        places = [(values, leaf, values[leaf]) for values, leaf in self._places]
        norms = [norm.values for norm, _ in self._stats]
        for name, own in self._params.items():
            for values, leaf in own:
                values[leaf] = params[name]
        for name, own in self._buffers.items():
            # Copies: a layer that writes its buffers must not let one call change the next, nor
            # one client another.
            given = stats.get(name)
            copied = (self.buffers[name] if given is None else given).clone()
            for values, leaf in own:
                values[leaf] = copied
        for (norm, (mean, var, weight)), part in zip(self._stats, mix.unbind(0), strict=True):
            norm.values = (
                part.to(norm.running_mean.dtype),
                stats[mean],
                stats[var],
                stats[weight],
            )
        return places, norms

    def _put_back(self, before: _Before) -> None:
        places, norms = before
        for values, leaf, value in places:
            values[leaf] = value
        for (norm, _), held in zip(self._stats, norms, strict=True):
            norm.values = held

    @contextmanager
    def knowing(self, pure: Sequence[float | None]) -> Iterator[None]:
        """Let the norms know which mix is 0 or 1 (:func:`pure_mixes`), for calls in here.

        Their gradients are of first order, and none is taken by the mix.
        """
        for (norm, _), share in zip(self._stats, pure, strict=True):
            norm.pure = share
        try:
            yield
        finally:
            for norm, _ in self._stats:
                norm.pure = None

    def stats(self) -> dict[str, Tensor]:
        """Return the running statistics in place, and the other buffers that training changes."""
        stats = {}
        for norm, names in self._stats:
            _, stats[names[0]], stats[names[1]], stats[names[2]] = norm.values
        for name in self._carried:
            values, leaf = self._buffers[name][0]
            stats[name] = values[leaf].detach()
        return stats

    @contextmanager
    def bind(
        self, params: Mapping[str, Tensor], stats: Mapping[str, Tensor], mix: Tensor
    ) -> Iterator[Callable[[Any], Any]]:
        """Leave one client's tensors in place for many calls, whose gradients are of first order.

        Running statistics and other buffers go on from call to call (:meth:`stats`), outside of any
        graph; ``stats`` may be changed in place. Other calls may come in between: they put back
        what they found.
        """
        before = self._put(params, stats, mix)
        pure = pure_mixes(mix.unsqueeze(0))

        def call(x: Any) -> Any:
            with self.knowing(pure):  # another call may come before the next of these
                outputs = self._objective.forward(self.module, x)
            for norm, _ in self._stats:
                if norm.values[1].requires_grad:  # where the norm could not run fused
                    mix, *client = norm.values
                    mean, var, weight = (t.detach() for t in client)
                    norm.values = mix, mean, var, weight
            return outputs

        try:
            yield call
        finally:
            self._put_back(before)


def pure_mixes(mix: Tensor) -> list[float | None]:
    """Return for each norm the mix of all C clients where that is 0 or 1, else None.

    ``mix`` has shape (C, B).
    """
    shares = [set(of_clients) for of_clients in mix.t().tolist()]
    return [next(iter(s)) if s in ({0.0}, {1.0}) else None for s in shares]


def join(prefix: str, name: str) -> str:
    """Return the name of a tensor of a module; the root's name is empty."""
    return f"{prefix}.{name}" if prefix else name


in_stack = vmap(Workspace.__call__, in_dims=(None, 0, 0, 0, 0))
"""Runs a workspace for several clients; made once, which costs as much as some operations."""
