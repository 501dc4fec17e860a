"""A torch.nn.Module as a function of named tensors, for one client or for a stack of clients.

Shapes: C clients, B norm layers, n examples, K classes. Every tensor of a stack has a leading
dimension C; one client is a stack with C = 1. With C > 1 the forward pass runs under
``torch.func.vmap``; gradients are taken outside of it, of the sum of the clients' losses, which
leaves each client its own gradient because no client's loss depends on another's parameters.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fedl2p.core import trees
from fedl2p.core.functional.copies import Modes, duplicate, eager_copy
from fedl2p.core.functional.inspection import (
    ROWS,
    check_graph,
    check_settled,
    examine,
    known,
    last_linear,
    remember,
)
from fedl2p.core.functional.kernels import (
    attention_in_plain_operations,
    check_twice_differentiable,
    without_cudnn,
)
from fedl2p.core.functional.mixed_norm import client_statistics
from fedl2p.core.functional.precision import autocast, compute_of
from fedl2p.core.functional.randomness import drawing_from, watched
from fedl2p.core.functional.recorded_objective import objective_of
from fedl2p.core.functional.state_tensors import state_tensors
from fedl2p.core.functional.workspace import Findings, Workspace, in_stack, join
from fedl2p.core.objective import Objective
from fedl2p.core.settings import Statistics
from fedl2p.core.sites import find_sites
from fedl2p.core.trees import Tree

SMALL = 1_000_000
"""Parameters of a small model."""

FEW_ROWS = 4
"""Examples per client on which stacking is tried."""

_NEAR = 1e-3, 1e-5
"""Relative and absolute error of two computations of the same outputs."""

_NOTHING = nullcontext()

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelState:
    """What fine-tuning changes: parameters and the client's running statistics, by name.

    ``params[name]`` has shape (C, ...). ``stats`` holds ``<norm>.client_mean`` and
    ``<norm>.client_var`` of shape (C, channels) and ``<norm>.client_weight`` of shape (C,), and
    under their own names the other buffers that training changes, which are constants to every
    derivative. ``moments`` is the state of the inner loop's optimizer, if it has one.
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
        """Return the same values as leaves of a new graph; other buffers stay constants."""
        return ModelState(
            {k: v.detach().requires_grad_() for k, v in self.params.items()},
            {k: _leaf(k, v) for k, v in self.stats.items()},
            {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in self.moments.items()},
        )


def _gradient(values: Tensor, at: list[Tensor], *, create_graph: bool = False) -> Tensor:
    """Return the gradient of the sum of squares of C clients' values, one vector per client."""
    grads = torch.autograd.grad(
        values.square().sum(),
        at,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    # a last dimension of 1 first: a scalar tensor of C clients has shape (C,)
    return torch.cat([g.unsqueeze(-1).flatten(1).to(values.dtype) for g in grads], 1)


def _flat(outputs: Any) -> Tensor:
    """Return the outputs of C clients as one vector each."""
    return torch.cat([t.unsqueeze(-1).flatten(1) for t in trees.leaves(outputs)], 1)


def _leaf(name: str, value: Tensor) -> Tensor:
    ours = name.rpartition(".")[2] in ("client_mean", "client_var", "client_weight")
    return value.detach().requires_grad_(ours)


class FunctionalModel:
    """A private copy of a model with mixed norms, called as a function of its named tensors.

    Several threads may call one net at a time.

    Parameters
    ----------
    model
        The global model. It is copied; the caller's is never touched.
    objective
        What it is trained and evaluated on; None for what is recorded on the model.
    """

    def __init__(self, model: nn.Module, objective: Objective | None = None) -> None:
        self.sites = find_sites(model)
        self.objective = objective_of(model) if objective is None else objective
        self.plain = duplicate(model)
        self._original = weakref.ref(model)
        self._compute = compute_of(model)
        self.stack_size = self._compute.stack_size
        self.stacking = self._compute.stacking
        self._inputs = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self._findings = known(model)
        self._foreseen: str | None = None
        self._lock = threading.Lock()
        self._per_thread = threading.local()
        own = self._workspace
        self._norms, self._buffers = own.norms, own.buffers
        wanted = set(self.sites.params)
        self._theta = {k: p.detach() for k, p in own.module.named_parameters() if k in wanted}
        self.dtype = torch.float32
        """Of hyperparameters, outputs and losses: the widest of the parameters', or float32."""
        for p in self._theta.values():
            self.dtype = torch.promote_types(self.dtype, p.dtype)
        self.graph_bytes: dict[Hashable, int] = {}
        """Bytes that the graph of one inner step holds, by its inputs' kind and its optimizer."""
        self.stacks_pay: dict[Hashable, bool] = {}
        """Whether stacks take less time than clients one by one, by what that depends on."""
        self.classes: dict[Hashable, int | None] = {}
        """Classes of the outputs, by the kinds of inputs and targets that were seen to fit."""

    def examine(self, x: Tree) -> Findings:
        """Return what the model does when it runs, found on inputs (n, ...) of a client.

        Done once: a model that is built the same is known from then on.

        Raises
        ------
        ValueError
            If the model cannot be fine-tuned right, see
            :func:`~fedl2p.core.functional.inspection.examine`.
        """
        if self._findings is not None:
            return self._findings
        with self._lock:
            if self._findings is None:
                with self._exactly():
                    self._findings = self._examined(trees.rows(x, slice(ROWS)))
                original = self._original()
                for model in (self.plain, *(() if original is None else (original,))):
                    remember(model, self._findings)
        return self._findings

    def _exactly(self) -> AbstractContextManager[object]:
        """Return a context in which ways to compute the same can be compared."""
        return without_cudnn() if self.device.type == "cuda" else _NOTHING

    def _examined(self, x: Tree) -> Findings:
        work, x = self._workspace, self._cast(trees.to_device(x, self.device))
        state = self.start(1, "global").squeezed()
        mix = torch.zeros(len(self._norms), dtype=self.dtype, device=self.device)
        # torch counts a tensor's version up when it is changed in place
        versions: list[int] = []
        written: set[str] = set()

        def run(training: bool, watch: AbstractContextManager[object]) -> Any:
            work.set_mode(training, "single", first_order=True)
            params = {k: p.clone() for k, p in state.params.items()}
            with (
                work.bind(params, state.stats, mix) as call,
                autocast(self._compute, self.device),
            ):
                own = trees.clone(x)
                with watch:
                    outputs = call(own)
                versions.extend(t._version for t in trees.leaves(own))
                written.update(k for k, p in params.items() if p._version)
                after = work.stats()
                check_settled({k: params[k] for k in written}, lambda: call(trees.clone(x)))
                return outputs, after

        def reference(model: nn.Module) -> Any:
            with autocast(self._compute, self.device):
                return self.objective.forward(model, trees.clone(x))

        found = examine(
            work, run, self.plain, reference, original=self._original(), device=self.device
        )
        found.writes_inputs, found.writes_parameters = any(versions), bool(written)
        found.rowwise = not found.draws_in_evaluation and self._is_rowwise(state, mix, x)
        with torch.enable_grad(), watched(self.device):
            work.set_mode(True, "single", first_order=True)
            leaves = state.leaves()
            with (
                work.bind(leaves.params, leaves.stats, mix) as call,
                autocast(self._compute, self.device),
            ):
                check_graph(call(trees.clone(x)))
        return found

    def _is_rowwise(self, state: ModelState, mix: Tensor, x: Tree) -> bool:
        """Tell whether an example alone has the outputs that it has beside another one."""
        if trees.length(x) < 2:
            return False
        work = self._workspace
        work.set_mode(False, "single", first_order=True)
        outputs = []
        try:
            with torch.no_grad(), watched(self.device), autocast(self._compute, self.device):
                for count in (1, 2):
                    few = trees.clone(trees.rows(x, slice(count)))
                    outputs.append(work(state.params, state.stats, mix, few)[0])
        except Exception:  # of any kind: it is the user's model that runs
            log.debug("the model does not run on a single example", exc_info=True)
            return False
        alone, both = ([*trees.leaves(o)] for o in outputs)
        return len(alone) == len(both) and all(
            a.shape == (1, *b.shape[1:]) and len(b) == 2 and torch.allclose(a[0], b[0], *_NEAR)
            for a, b in zip(alone, both, strict=True)
        )

    def check_twice_differentiable(self, grads: Iterable[Tensor]) -> None:
        """Refuse a gradient that cannot be differentiated, once for each model."""
        found = self._findings
        if found is not None and not found.differentiable:
            check_twice_differentiable(grads)
            found.differentiable = True

    @property
    def head(self) -> tuple[str, ...]:
        """Names of the trainable tensors of the linear layer that a forward pass calls last.

        Before a forward pass was seen (:meth:`examine`, :meth:`foresee`), of the one that is
        registered last.
        """
        if self._findings is None and self._foreseen is None:
            return self.sites.head
        name = self._findings.head if self._findings else self._foreseen
        return () if name is None else self.tensors_in(name)

    def tensors_in(self, name: str) -> tuple[str, ...]:
        """Return the names of the trainable tensors of a module; none if there is no such."""
        module = dict(self.plain.named_modules()).get(name)
        held = {id(p) for p in module.parameters()} if module is not None else set()
        named = dict(self.plain.named_parameters())
        return tuple(k for k in self.sites.params if id(named[k]) in held)

    def foresee(self, shape: tuple[int, ...]) -> None:
        """Look for the head on zeros of the shape of one example, where no data is at hand.

        Nothing is found where the model does not take them.
        """
        if self._findings is not None:
            return
        work = eager_copy(self.plain)
        Modes(work).set(False)
        for dtype in (self._inputs, torch.long):
            zeros = torch.zeros(2, *shape, dtype=dtype, device=self.device)
            try:
                with torch.no_grad(), watched(self.device), last_linear(work) as called:
                    work(zeros)
            except Exception:  # of any kind: it is the user's model that runs
                log.debug("the model does not run on zeros of %s", dtype, exc_info=True)
            else:
                self._foreseen = called[-1] if called else None
                return

    def stackable(self, x: Tree) -> bool:
        """Tell whether several clients with inputs like ``x``, shape (n, ...), can run at once.

        Not a model that draws random numbers, which belong to one client; not one that computes in
        bfloat16 (torch's vmap does not autocast convolutions, pytorch/functorch issue 305); not one
        that vmap cannot run, which is tried once and logged.
        """
        found = self.examine(x)
        if self._compute.precision != "full" or found.draws or found.draws_in_evaluation:
            return False
        if found.batchable is None:
            try:
                few = trees.rows(x, slice(FEW_ROWS))
                with self._exactly():
                    self._try_stack(trees.to_device(few, self.device))
                found.batchable = True
            except Exception as error:  # of any kind: it is the user's model that runs
                found.batchable = False
                line = str(error).splitlines()[0] if str(error) else type(error).__name__
                log.warning(
                    "clients run one by one, since torch.func.vmap cannot run several copies of "
                    "the model (%s) at once: %s",
                    type(self.plain).__name__,
                    line,
                )
        return found.batchable

    def _try_stack(self, x: Tree) -> None:
        """Run two clients at once, twice differentiated, and compare each with itself alone."""
        both = trees.stack([x, trees.map_tree(lambda t: t.flip(0), x)])
        start = self.start(2, "global")
        other = torch.tensor([1.0, 1.01], device=self.device)
        params = {
            k: p * other.to(p.dtype).view(-1, *(1,) * (p.dim() - 1))
            for k, p in start.params.items()
        }
        mix = torch.full((2, len(self._norms)), 0.5, dtype=self.dtype, device=self.device)
        # as far as second derivatives are exact in the narrowest dtype of the parameters
        dtypes = [p.dtype for p in self.plain.parameters() if p.is_floating_point()]
        near = 10 * max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
        together = self._derivatives(ModelState(params, start.stats), mix, both)
        for i in range(2):
            one = ModelState(params, start.stats).take([i])
            alone = self._derivatives(one, mix[i : i + 1], trees.rows(both, slice(i, i + 1)))
            for a, b in zip(alone, together, strict=True):
                # what is not finite is compared as such
                size = float(b.nan_to_num(0.0, 0.0, 0.0).abs().max()) if b.numel() else 0.0
                if not torch.allclose(a[0], b[i], rtol=near, atol=near * size, equal_nan=True):
                    raise RuntimeError("in a stack it computes something else than alone")

    def _derivatives(self, state: ModelState, mix: Tensor, x: Tree) -> list[Tensor]:
        """Return outputs in both modes, and first and second derivatives, of C clients: (C, ...).

        Every gradient as one vector per client.
        """
        state, mix = state.leaves(), mix.detach().requires_grad_()
        inputs = list(state.params.values())
        with torch.enable_grad():
            judged = _flat(self.logits(state, mix, x, training=False)[0])
            first = _gradient(judged, inputs)
            trained = _flat(self.logits(state, mix, x, training=True)[0])
            grad = _gradient(trained, inputs, create_graph=True)
            second = [_gradient(grad, [*inputs, mix])] if grad.requires_grad else []
        return [t.detach() for t in (judged, trained, first, grad, *second)]

    @cached_property
    def saved(self) -> dict[str, Tensor]:
        """The global model's tensors as ``state_dict`` names them."""
        return state_tensors(self.plain)

    @cached_property
    def num_parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(p.numel() for p in self._theta.values())

    @property
    def small(self) -> bool:
        """Whether several of it at a time leave room: at most a million parameters."""
        return self.num_parameters <= SMALL

    @property
    def _workspace(self) -> Workspace:
        work: Workspace | None = getattr(self._per_thread, "workspace", None)
        if work is None:
            work = Workspace(self.plain, self.sites, self.objective)
            self._per_thread.workspace = work
        if work.findings is not self._findings:
            work.learn(self._findings)
        return work

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(iter(self._theta.values())).device

    def start(self, clients: int, statistics: Statistics = "corrected") -> ModelState:
        """Return the global model's parameters and fresh client statistics for C clients.

        Other buffers that training changes are among them once the model was examined; before,
        they are the global model's wherever they are missing.

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
                stats[join(name, f"client_{part}")] = value.expand(clients, *value.shape)
        for name in self._findings.carried if self._findings else ():
            stats[name] = self._buffers[name].expand(clients, *self._buffers[name].shape)
        params = {k: v.expand(clients, *v.shape) for k, v in self._theta.items()}
        if self._findings and self._findings.writes_parameters:
            params = {k: v.clone() for k, v in params.items()}
        return ModelState(params, stats)

    def logits(
        self,
        state: ModelState,
        mix: Tensor,
        x: Tree,
        *,
        training: bool,
        dropout_seed: int = 0,
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run the model.

        Parameters
        ----------
        state
            Tensors of C clients.
        mix
            Shape (C, B).
        x
            Inputs, a tree of tensors (C, n, ...); floating ones are cast to the model's dtype.
        training
            Training mode: batch statistics are mixed and enter the running ones. Otherwise the
            running ones are mixed.
        dropout_seed
            Seed of all random numbers that the pass draws.

        Returns
        -------
        logits, stats
            Outputs as the objective picks them, usually of shape (C, n, K), and the running
            statistics afterwards.

        Raises
        ------
        ValueError
            If several clients come for a model with dropout in training, or for one that computes
            in bfloat16.
        """
        if len(mix) > 1:
            return self.stacked(state.params, state.stats, mix, x, training=training)
        # squeezed, not indexed: the backward of an index fills and copies every tensor
        one, mix, x = state.squeezed(), mix.squeeze(0), trees.rows(x, 0)
        y, stats = self.single(
            one.params, one.stats, mix, x, training=training, dropout_seed=dropout_seed
        )
        y = trees.map_tree(lambda t: t.unsqueeze(0), y)
        return y, {k: v.unsqueeze(0) for k, v in stats.items()}

    def single(
        self,
        params: dict[str, Tensor],
        stats: dict[str, Tensor],
        mix: Tensor,
        x: Tree,
        *,
        training: bool,
        dropout_seed: int = 0,
        first_order: bool = False,
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run the model for one client: as :meth:`logits`, without the client dimension.

        ``first_order`` says that gradients will be taken once at most, and only of the logits, so
        that the norms may save time.
        """
        if self._findings is None:
            self.examine(x)
        work = self._workspace
        work.set_mode(training, "single", first_order=first_order)
        twice = not first_order and torch.is_grad_enabled()
        with self._running(training, dropout_seed, twice):
            y, stats = work(params, stats, mix, self._cast(x))
        return self._widened(y), stats

    def _running(self, training: bool, seed: int, twice: bool) -> AbstractContextManager[object]:
        """Return a context for a pass; ``twice``: it is under vmap, or differentiated twice."""
        found = self._findings
        assert found is not None
        draws = found.draws if training else found.draws_in_evaluation
        attention = twice and found.attention
        differentiated = twice or (not training and torch.is_grad_enabled())
        recurrent = found.recurrent and differentiated and self.device.type == "cuda"
        if not (draws or attention or recurrent) and self._compute.precision == "full":
            return _NOTHING
        context = ExitStack()
        if draws:
            context.enter_context(drawing_from(draws, seed, self.device))
        if recurrent:
            context.enter_context(without_cudnn())
        if attention:
            context.enter_context(attention_in_plain_operations())
        context.enter_context(autocast(self._compute, self.device))
        return context

    @contextmanager
    def bind(
        self, params: dict[str, Tensor], stats: dict[str, Tensor], mix: Tensor
    ) -> Iterator[BoundModel]:
        """Leave one client's tensors in place for many training calls, in this thread.

        ``params`` may be changed in place between the calls, and the calls may change ``stats`` in
        place; no tensor has a client dimension.
        """
        work = self._workspace
        with work.bind(params, stats, mix) as call:
            yield BoundModel(self, work, call)

    def stacked(
        self,
        params: dict[str, Tensor],
        stats: dict[str, Tensor],
        mix: Tensor,
        x: Tree,
        *,
        training: bool,
        first_order: bool = False,
        pure: Sequence[float | None] | None = None,
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run the model for several clients under vmap, as :meth:`logits`.

        ``first_order`` is as in :meth:`single`; with it, ``pure`` may be what
        :func:`~fedl2p.core.functional.workspace.pure_mixes` says of ``mix``, a constant then.
        """
        if self._compute.precision != "full":
            raise ValueError(
                f"{len(mix)} clients came stacked, but in {self._compute.precision} clients "
                "run one at a time"
            )
        found = self._findings or self.examine(trees.rows(x, 0))
        if found.draws if training else found.draws_in_evaluation:
            raise ValueError(
                f"the model draws random numbers, which belong to one client, but {len(mix)} "
                "clients came stacked; run them one at a time"
            )
        work = self._workspace
        work.set_mode(training, "stacked", first_order=first_order)
        # a layer that writes its buffers, from a client's data, then writes that client's
        own = {k: b.expand(len(mix), *b.shape) for k, b in self._buffers.items()}
        stats = {**own, **stats}
        # fused attention has no rule for vmap
        known = _NOTHING if pure is None else work.knowing(pure)
        with self._running(training, 0, twice=True), known:
            y, stats = in_stack(work, params, stats, mix, self._cast(x))
        return self._widened(y), stats

    def judged(self, state: ModelState, mix: Tensor, x: Tree) -> Any:
        """Return the outputs of one model in evaluation mode on the inputs of C clients.

        ``state`` and ``mix`` hold one client's tensors, (1, ...); ``x`` has leaves (C, n, ...) and
        the outputs too. The same as :meth:`logits` with these tensors repeated, in one pass of the
        model over all examples: it must be :attr:`~Findings.rowwise`.
        """
        assert self.examine(trees.rows(x, 0)).rowwise
        clients = trees.length(x)
        one = state.squeezed()
        rows = trees.map_tree(lambda t: t.flatten(0, 1), x)
        y, _ = self.single(one.params, one.stats, mix.squeeze(0), rows, training=False)
        return trees.map_tree(lambda t: t.unflatten(0, (clients, -1)), y)

    def _cast(self, x: Tree) -> Tree:
        if self._findings is not None and self._findings.writes_inputs:
            x = trees.clone(x)
        if isinstance(x, Tensor):
            return x.to(self._inputs) if x.is_floating_point() else x
        return trees.map_tree(lambda t: t.to(self._inputs) if t.is_floating_point() else t, x)

    def _widened(self, y: Any) -> Any:
        """Return outputs in the dtype of losses."""
        if isinstance(y, Tensor):
            return y.to(self.dtype)
        return trees.map_tree(lambda t: t.to(self.dtype) if t.is_floating_point() else t, y)

    def client_stats(
        self, stats: dict[str, Tensor], client: int
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return one client's mean and variance of each norm layer, for folding."""
        frozen = self._findings.frozen if self._findings else ()
        folded = {}
        for name, norm in self._norms.items():
            mean, var, weight = (
                stats[join(name, f"client_{part}")][client].detach()
                for part in ("mean", "var", "weight")
            )
            unseen = norm.running_mean, norm.running_var
            folded[name] = (
                unseen if name in frozen else client_statistics(mean, var, weight, unseen)
            )
        return folded

    def buffers_of(self, stats: dict[str, Tensor], client: int) -> dict[str, Tensor]:
        """Return one client's buffers, other than batch-norm's, that are among its statistics."""
        return {k: v[client].detach() for k, v in stats.items() if k in self._buffers}

    @property
    def other_buffers(self) -> tuple[str, ...]:
        """Names of the buffers that do not belong to the norms of ``sites``."""
        return tuple(self._buffers)


class BoundModel:
    """One client's tensors in place; see :meth:`FunctionalModel.bind`."""

    def __init__(self, net: FunctionalModel, work: Workspace, call: Callable[[Tree], Any]) -> None:
        self._net, self._work, self._call = net, work, call

    def logits(self, x: Tree, *, dropout_seed: int = 0) -> Any:
        """Return outputs, for gradients of first order; the batch enters the statistics."""
        net = self._net
        if net._findings is None:
            net.examine(x)
            self._work.learn(net._findings)
        self._work.set_mode(True, "single", first_order=True)
        with net._running(True, dropout_seed, twice=False):
            y = self._call(net._cast(x))
        return net._widened(y)

    def stats(self) -> dict[str, Tensor]:
        """Return the running statistics so far."""
        return self._work.stats()
