"""Gradients of the validation loss with respect to a client's hyperparameters.

L_val(theta_K(h); beta) with h = (beta, eta) = (mix, rate): how a client should change its mix and
its rates so that the model fine-tuned with them does better on its validation part. Six estimators,
from exact to cheap. Write v = dL_val/dtheta_K (evaluation mode), g_k for the k-th inner gradient,
"direct" for dL_val/dbeta with theta_K and the running statistics held.

=============  ==========================================  =========================================
mode           d/d eta_p                                   d/d beta
=============  ==========================================  =========================================
published      as the public reference code (below)        the same
last-step      -<v_p, g_{K-1,p}>                           direct
trajectory     -<v_p, sum_k g_{k,p}>                       direct - K d/dbeta <g(theta_K), eta v>
implicit       as trajectory                               direct - d/dbeta <g(theta_K), H^-1 v>
truncated      exact through the last T steps, the older   exact through the last T steps
               ones with identity Jacobian
unrolled       exact                                       exact, running statistics included
=============  ==========================================  =========================================

``published`` is Lee et al., "FedL2P", NeurIPS 2023, section 3.3 (implicit function theorem, Neumann
series of Lorraine et al., AISTATS 2020) as its public code computes it, for comparison only: the
series lacks its closing factor psi, the derivative by the rates has the opposite sign of the true
one where the series converges, and the Hessian is that of the evaluation-mode loss.

Shapes: C clients, B norms, P parameter tensors, K inner steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.innerloop import (
    Batches,
    Step,
    cross_entropy,
    inner_step,
    noise_of,
    on,
    per_tensor,
    start_of,
    train_gradient,
)
from fedl2p.core.net import Net, NetState, Statistics

Mode = Literal["published", "last-step", "trajectory", "implicit", "truncated", "unrolled"]
MODES: tuple[Mode, ...] = get_args(Mode)

Named = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class HypergradientConfig:
    """Which estimator, and its settings.

    Parameters
    ----------
    mode
        The estimator: last-step and trajectory are first-order and cheap, implicit solves with the
        Hessian, truncated goes back through the last steps, unrolled through all (exact), published
        is that of the reference.
    steps
        T of truncated, in inner steps.
    segment
        Inner steps whose graph is held at a time in unrolled and truncated: 1 holds one
        step's graph and every step's weights; larger ones hold fewer weights and larger graphs.
        The result is the same.
    psi
        Step of the Neumann series (published).
    terms
        Terms of the Neumann series after the first (published).
    damping
        Added to the Hessian's diagonal (implicit).
    iterations
        Of conjugate gradients at most (implicit); they stop early at a relative residual of
        1e-10 or at negative curvature, where the inverse means nothing.
    """

    mode: Mode = "unrolled"
    steps: int = 5
    segment: int = 1
    psi: float = 0.1
    terms: int = 3
    damping: float = 0.0
    iterations: int = 10

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}, but must be one of {', '.join(MODES)}")
        for name in ("steps", "segment", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be 1 or more")
        if not (self.terms >= 0 and 0 < self.psi < math.inf and 0 <= self.damping < math.inf):
            raise ValueError(
                f"terms {self.terms} and damping {self.damping} must be 0 or more, psi {self.psi} "
                "above 0, all finite"
            )


@dataclass(frozen=True)
class Hypergradient:
    """The validation loss of C clients and its gradients.

    Parameters
    ----------
    mix, rate
        Shapes (C, B) and (C, P): dL_val/dbeta and dL_val/deta, the rates being absolute ones.
    loss, accuracy
        Shape (C,): on the validation batch, before any change; nats and fraction.
    """

    mix: Tensor
    rate: Tensor
    loss: Tensor
    accuracy: Tensor


@dataclass(frozen=True)
class _End:
    """The end of the inner loop, seen from the validation loss."""

    state: NetState
    v: Named
    direct: Tensor
    loss: Tensor
    accuracy: Tensor


@dataclass(frozen=True)
class _Problem:
    """One bilevel problem of C clients."""

    net: Net
    mix: Tensor
    rate: Tensor
    batches: Batches
    following: tuple[Tensor, Tensor] | None
    validation: tuple[Tensor, Tensor]
    statistics: Statistics


def hypergradient(
    model: nn.Module,
    hyperparams: Hyperparams,
    batches: Sequence[tuple[Tensor, Tensor]],
    validation: tuple[Tensor, Tensor],
    *,
    mode: Mode | None = None,
    config: HypergradientConfig | None = None,
    following: tuple[Tensor, Tensor] | None = None,
    statistics: Statistics = "corrected",
) -> dict[str, dict[str, float]]:
    """Return dL_val/dh of one client by name.

    Parameters
    ----------
    model
        The global model; only read.
    hyperparams
        The client's, mix of shape (B,) and rate of shape (P,).
    batches
        The K training batches (x, y) of the inner steps, in order.
    validation
        The validation batch (x, y).
    mode
        The estimator, see the module's table; None for that of ``config``.
    config
        The estimator and its settings, instead of ``mode``; None for the defaults.
    following
        The training batch after the last inner step, at which ``published`` and ``implicit`` take
        their second derivatives; by default the last inner batch again.
    statistics
        How running statistics start, see :class:`fedl2p.core.innerloop.InnerLoop`.

    Returns
    -------
    dict
        ``{"mix": {norm: value}, "rate": {parameter: value}}``, in nats per unit of the
        hyperparameter.

    Raises
    ------
    ValueError
        If both ``mode`` and ``config`` are given, or the hyperparameters are another model's.
    """
    if mode is not None and config is not None:
        raise ValueError(
            f"mode {mode!r} and a config with mode {config.mode!r} are both given; give one of them"
        )
    if config is None:
        config = HypergradientConfig() if mode is None else HypergradientConfig(mode=mode)
    net = Net(model)
    if hyperparams.sites != net.sites:
        raise ValueError(
            "the hyperparameters were made for another model: their names of norm layers or "
            "parameter tensors differ from this model's"
        )
    result = cohort_hypergradient(
        net,
        on(net, Hyperparams.stack([hyperparams])),
        [(x.unsqueeze(0), y.unsqueeze(0)) for x, y in batches],
        (validation[0].unsqueeze(0), validation[1].unsqueeze(0)),
        config=config,
        following=None if following is None else (following[0][None], following[1][None]),
        statistics=statistics,
    )
    return {
        "mix": dict(zip(net.sites.norms, result.mix[0].tolist(), strict=True)),
        "rate": dict(zip(net.sites.params, result.rate[0].tolist(), strict=True)),
    }


def cohort_hypergradient(
    net: Net,
    hyperparams: Hyperparams,
    batches: Batches,
    validation: tuple[Tensor, Tensor],
    *,
    config: HypergradientConfig,
    following: tuple[Tensor, Tensor] | None = None,
    statistics: Statistics = "corrected",
) -> Hypergradient:
    """Return dL_val/dh of C clients; arguments as in :func:`hypergradient`, stacked."""
    problem = _Problem(
        net,
        hyperparams.mix.detach(),
        hyperparams.rate.detach(),
        batches,
        following,
        validation,
        statistics,
    )
    return _ESTIMATORS[config.mode](problem, config)


def validation_loss(problem: _Problem, state: NetState, mix: Tensor) -> tuple[Tensor, Tensor]:
    """Return loss and accuracy of C clients on the validation batch in evaluation mode, (C,)."""
    x, y = problem.validation
    logits, _ = problem.net.logits(state, mix, x, training=False)
    accuracy = (logits.detach().argmax(-1) == y).to(logits.dtype).mean(1)
    return cross_entropy(logits, y), accuracy


# ---------------------------------------------------------------- first-order and implicit modes


def _last_step(problem: _Problem, config: HypergradientConfig) -> Hypergradient:
    state, last, _ = _descend(problem, keep_sum=False)
    end = _at_end(problem, state)
    return _result(end, rate=-_inner(end.v, last))


def _trajectory(problem: _Problem, config: HypergradientConfig) -> Hypergradient:
    state, _, total = _descend(problem, keep_sum=True)
    end = _at_end(problem, state)
    steps = len(problem.batches)
    if steps == 0 or not problem.net.sites.norms:
        return _result(end, rate=-_inner(end.v, total))
    rates = per_tensor(problem.rate, end.v)
    weighted = {k: rates[k] * v for k, v in end.v.items()}
    mixed = _mixed_product(problem, state, weighted, steps - 1)
    return _result(end, rate=-_inner(end.v, total), mix=-steps * mixed)


def _implicit(problem: _Problem, config: HypergradientConfig) -> Hypergradient:
    state, _, total = _descend(problem, keep_sum=True)
    end = _at_end(problem, state)
    steps = len(problem.batches)
    if steps == 0 or not problem.net.sites.norms:
        return _result(end, rate=-_inner(end.v, total))
    batch = problem.following or problem.batches[steps - 1]
    leaf = NetState({k: p.detach().requires_grad_() for k, p in state.params.items()}, state.stats)
    mix = problem.mix.clone().requires_grad_()
    noise = noise_of(problem.batches, steps)
    grads, _, _ = train_gradient(problem.net, leaf, mix, batch, create_graph=True, noise=noise)

    def hessian_vector(q: Named) -> Named:
        product = _vector_jacobian(grads, leaf.params, q)
        return {k: product[k] + config.damping * q[k] for k in q}

    q = _conjugate_gradients(hessian_vector, end.v, config.iterations)
    mixed = _vector_jacobian(grads, {"mix": mix}, q)["mix"]
    return _result(end, rate=-_inner(end.v, total), mix=-mixed)


def _published(problem: _Problem, config: HypergradientConfig) -> Hypergradient:
    state, last, _ = _descend(problem, keep_sum=False)
    end = _at_end(problem, state)
    steps = len(problem.batches)
    if steps == 0:
        return _result(end, rate=-_inner(end.v, last))
    leaf = NetState({k: p.detach().requires_grad_() for k, p in state.params.items()}, state.stats)
    mix = problem.mix.clone().requires_grad_()
    x, y = problem.following or problem.batches[steps - 1]
    with torch.enable_grad():
        logits, _ = problem.net.logits(leaf, mix, x, training=False)
        grads = _gradient(cross_entropy(logits, y).sum(), leaf.params, create_graph=True)
    term, p = dict(end.v), dict(end.v)
    for _ in range(config.terms):
        curved = _vector_jacobian(grads, leaf.params, term)
        term = {k: term[k] - config.psi * curved[k] for k in term}
        p = {k: p[k] + term[k] for k in p}
    curved = _vector_jacobian(grads, leaf.params, p)
    mixed = _vector_jacobian(grads, {"mix": mix}, p)["mix"]
    return _result(end, rate=_inner(curved, last), mix=-mixed)


def _descend(problem: _Problem, *, keep_sum: bool) -> tuple[NetState, Named, Named]:
    """Run the inner loop; return its end, the last gradients and the sum of all gradients."""
    state = _start(problem)
    last = {k: torch.zeros_like(p) for k, p in state.params.items()}
    total = {k: torch.zeros_like(p) for k, p in state.params.items()} if keep_sum else {}
    for k in range(len(problem.batches)):
        step = _step(problem, state, k)
        state, last = step.state, step.grads
        if keep_sum:
            for name, grad in last.items():
                total[name] += grad
    return state, last, total


def _start(problem: _Problem) -> NetState:
    clients, steps = len(problem.mix), len(problem.batches)
    return start_of(problem.net, clients, problem.statistics, steps=steps)


def _step(problem: _Problem, state: NetState, k: int) -> Step:
    """Take inner step k without a graph."""
    return inner_step(
        problem.net,
        state,
        problem.mix,
        problem.rate,
        problem.batches[k],
        noise=noise_of(problem.batches, k),
    )


def _at_end(problem: _Problem, state: NetState) -> _End:
    """Return v and the direct term at the end of the inner loop, the running statistics held."""
    params = {k: p.detach().requires_grad_() for k, p in state.params.items()}
    mix = problem.mix.clone().requires_grad_()
    with torch.enable_grad():
        losses, accuracy = validation_loss(problem, NetState(params, state.stats), mix)
        grads = _gradient(losses.sum(), {**params, "": mix})
    direct = grads.pop("")
    return _End(state.detach(), grads, direct, losses.detach(), accuracy)


def _mixed_product(problem: _Problem, state: NetState, vector: Named, step: int) -> Tensor:
    """Return d/dbeta <g(theta; beta), vector> on the batch of an inner step, shape (C, B)."""
    leaf = NetState({k: p.detach().requires_grad_() for k, p in state.params.items()}, state.stats)
    mix = problem.mix.clone().requires_grad_()
    batch, noise = problem.batches[step], noise_of(problem.batches, step)
    grads, _, _ = train_gradient(problem.net, leaf, mix, batch, create_graph=True, noise=noise)
    return _vector_jacobian(grads, {"mix": mix}, vector)["mix"]


def _conjugate_gradients(
    matvec: Callable[[Named], Named], b: Named, iterations: int, tolerance: float = 1e-10
) -> Named:
    """Solve matvec(q) = b for each client by itself; a client stops at negative curvature."""
    q = {k: torch.zeros_like(v) for k, v in b.items()}
    residual, direction = dict(b), dict(b)
    square = _inner_all(residual, residual)
    first = square.clone()
    active = square > 0
    for _ in range(iterations):
        product = matvec(direction)
        curvature = _inner_all(direction, product)
        active = active & (curvature > 0) & (square > tolerance**2 * first)
        if not bool(active.any()):
            break
        alpha = torch.where(active, square / curvature, torch.zeros_like(square))
        q = _add(q, alpha, direction)
        residual = _add(residual, -alpha, product)
        new = torch.where(active, _inner_all(residual, residual), square)
        ratio = torch.where(active, new / square, torch.zeros_like(square))
        direction = _add(residual, ratio, direction)
        square = new
    return q


# ---------------------------------------------------------------- through the steps


def _unrolled(problem: _Problem, config: HypergradientConfig) -> Hypergradient:
    return _through_last(problem, len(problem.batches), config.segment)


def _truncated(problem: _Problem, config: HypergradientConfig) -> Hypergradient:
    return _through_last(problem, min(config.steps, len(problem.batches)), config.segment)


def _through_last(problem: _Problem, depth: int, segment: int) -> Hypergradient:
    """Differentiate through the last ``depth`` steps by the adjoint of segments of steps.

    Only segment boundaries are held from the forward pass; a segment's graph is made again when
    its turn comes (the last one's is kept from the forward pass).
    """
    total = len(problem.batches)
    cuts = [*range(total - depth, total, segment), total]
    state = _start(problem)
    older = {k: torch.zeros_like(p) for k, p in state.params.items()}
    for k in range(cuts[0]):
        step = _step(problem, state, k)
        state = step.state
        for name, grad in step.grads.items():
            older[name] += grad
    boundaries = [state]
    for begin, end in pairwise(cuts[:-1]):
        for k in range(begin, end):
            step = _step(problem, state, k)
            state = step.state
        boundaries.append(state)

    mix, rate = problem.mix.clone().requires_grad_(), problem.rate.clone().requires_grad_()
    start = boundaries.pop().leaves()
    with torch.enable_grad():
        last = _unroll(problem, start, mix, rate, cuts[-2] if depth else total, total)
        losses, accuracy = validation_loss(problem, last, mix)
    adjoint = _pull_back([losses], [torch.ones_like(losses)], start, mix, rate)
    d_mix, d_rate = adjoint.mix, adjoint.rate
    for begin, end in zip(reversed(cuts[:-2]), reversed(cuts[1:-1]), strict=True):
        start = boundaries.pop().leaves()
        with torch.enable_grad():
            after = _unroll(problem, start, mix, rate, begin, end)
        outputs = [*after.params.values(), *after.stats.values()]
        adjoint = _pull_back(outputs, adjoint.cotangents, start, mix, rate)
        d_mix, d_rate = d_mix + adjoint.mix, d_rate + adjoint.rate
    if cuts[0]:
        d_rate = d_rate - _inner(dict(zip(start.params, adjoint.cotangents, strict=False)), older)
    return Hypergradient(d_mix, d_rate, losses.detach(), accuracy)


@dataclass(frozen=True)
class _Adjoint:
    """Gradients by mix and rate, and the cotangents of a segment's first state."""

    mix: Tensor
    rate: Tensor
    cotangents: list[Tensor]


def _unroll(
    problem: _Problem, state: NetState, mix: Tensor, rate: Tensor, begin: int, end: int
) -> NetState:
    for k in range(begin, end):
        state = inner_step(
            problem.net,
            state,
            mix,
            rate,
            problem.batches[k],
            create_graph=True,
            noise=noise_of(problem.batches, k),
        ).state
    return state


def _pull_back(
    outputs: list[Tensor], cotangents: list[Tensor], start: NetState, mix: Tensor, rate: Tensor
) -> _Adjoint:
    inputs = [mix, rate, *start.params.values(), *start.stats.values()]
    # an output without a graph (a tensor that no step changes) has nothing to give back
    attached = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in attached],
        inputs,
        grad_outputs=[c for _, c in attached],
        allow_unused=True,
        materialize_grads=True,
    )
    return _Adjoint(grads[0], grads[1], list(grads[2:]))


# ---------------------------------------------------------------- small tensor algebra by name


def _gradient(total: Tensor, inputs: Named, *, create_graph: bool = False) -> Named:
    grads = torch.autograd.grad(
        total,
        list(inputs.values()),
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(inputs, grads, strict=True))


def _vector_jacobian(outputs: Named, inputs: Named, vector: Named) -> Named:
    """Return vector^T d outputs / d inputs; the graph is kept."""
    attached = [k for k, o in outputs.items() if o.requires_grad]
    if not attached:
        return {k: torch.zeros_like(v) for k, v in inputs.items()}
    grads = torch.autograd.grad(
        [outputs[k] for k in attached],
        list(inputs.values()),
        grad_outputs=[vector[k].detach() for k in attached],
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(inputs, grads, strict=True))


def _inner(a: Named, b: Named) -> Tensor:
    """Return the inner product of each client and parameter tensor, shape (C, P)."""
    # a last dimension of 1 first: a scalar tensor of C clients has shape (C,)
    return torch.stack([(a[k] * b[k]).unsqueeze(-1).flatten(1).sum(1) for k in b], dim=1)


def _inner_all(a: Named, b: Named) -> Tensor:
    """Return the inner product of each client over all tensors, shape (C,)."""
    return _inner(a, b).sum(1)


def _add(a: Named, scale: Tensor, b: Named) -> Named:
    """Return a + scale b with one scale per client, shape (C,)."""
    return {k: a[k] + scale.view(-1, *(1,) * (a[k].dim() - 1)) * b[k] for k in a}


def _result(end: _End, *, rate: Tensor, mix: Tensor | float = 0.0) -> Hypergradient:
    return Hypergradient(end.direct + mix, rate, end.loss, end.accuracy)


_ESTIMATORS: dict[str, Callable[[_Problem, HypergradientConfig], Hypergradient]] = {
    "published": _published,
    "last-step": _last_step,
    "trajectory": _trajectory,
    "implicit": _implicit,
    "truncated": _truncated,
    "unrolled": _unrolled,
}
