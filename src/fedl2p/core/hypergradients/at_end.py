"""Hypergradients from the end of the inner loop: last-step, trajectory, implicit, published.

See the table of :mod:`fedl2p.core.hypergradients.estimators`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedl2p.core.finetuning.batches import noise_of, parts_of
from fedl2p.core.finetuning.sgd_step import cross_entropy, per_tensor, train_gradient
from fedl2p.core.functional.model import NetState
from fedl2p.core.functional.named_tensors import (
    Members,
    Named,
    accumulate,
    conjugate_gradients,
    gradient,
    in_rows,
    inner,
    vector_jacobian,
)
from fedl2p.core.hypergradients.problem import Hypergradient, Problem, begin, descending, validated
from fedl2p.core.settings import HypergradientConfig


def last_step(problem: Problem, config: HypergradientConfig) -> Hypergradient:
    """Differentiate through the last step alone; the mix by its direct term."""
    state, last = _descend(problem, keep_sum=False)
    end = _at_end(problem, state)
    return _result(end, rate=-inner(end.v, last))


def trajectory(problem: Problem, config: HypergradientConfig) -> Hypergradient:
    """Sum the inner gradients along the way, as if every step acted on theta_K unchanged."""
    state, total = _descend(problem, keep_sum=True)
    end = _at_end(problem, state)
    steps = len(problem.batches)
    if steps == 0 or not problem.net.sites.norms:
        return _result(end, rate=-inner(end.v, total))
    rates = per_tensor(problem.rate, end.v)
    weighted = {k: rates[k] * v for k, v in end.v.items()}
    mixed = _mixed_product(problem, state, weighted, steps - 1)
    return _result(end, rate=-inner(end.v, total), mix=-steps * mixed)


def implicit(problem: Problem, config: HypergradientConfig) -> Hypergradient:
    """Take theta_K for stationary: implicit function theorem, solved by conjugate gradients."""
    state, total = _descend(problem, keep_sum=True)
    end = _at_end(problem, state)
    steps = len(problem.batches)
    if steps == 0 or not problem.net.sites.norms:
        return _result(end, rate=-inner(end.v, total))
    batch = problem.following or problem.batches[steps - 1]
    leaf = NetState({k: p.detach().requires_grad_() for k, p in state.params.items()}, state.stats)
    mix = problem.mix.clone().requires_grad_()
    noise = noise_of(problem.batches, steps)
    grads, _ = train_gradient(problem.net, leaf, mix, batch, noise=noise)

    def hessian_vector(q: Named) -> Named:
        product = vector_jacobian(grads, leaf.params, q)
        return {k: product[k] + config.damping * q[k] for k in q}

    q = conjugate_gradients(hessian_vector, end.v, config.iterations)
    mixed = vector_jacobian(grads, {"mix": mix}, q)["mix"]
    return _result(end, rate=-inner(end.v, total), mix=-mixed)


def published(problem: Problem, config: HypergradientConfig) -> Hypergradient:
    """Compute what the public reference code computes, its two errors included."""
    state, last = _descend(problem, keep_sum=False)
    end = _at_end(problem, state)
    steps = len(problem.batches)
    if steps == 0:
        return _result(end, rate=-inner(end.v, last))
    leaf = NetState({k: p.detach().requires_grad_() for k, p in state.params.items()}, state.stats)
    mix = problem.mix.clone().requires_grad_()
    x, y = problem.following or problem.batches[steps - 1]
    with torch.enable_grad():
        logits, _ = problem.net.logits(leaf, mix, x, training=False)
        grads = gradient(cross_entropy(logits, y).sum(), leaf.params, create_graph=True)
    problem.net.check_twice_differentiable(grads.values())
    term, p = dict(end.v), dict(end.v)
    for _ in range(config.terms):
        curved = vector_jacobian(grads, leaf.params, term)
        term = {k: term[k] - config.psi * curved[k] for k in term}
        p = {k: p[k] + term[k] for k in p}
    curved = vector_jacobian(grads, leaf.params, p)
    mixed = vector_jacobian(grads, {"mix": mix}, p)["mix"]
    return _result(end, rate=inner(curved, last), mix=-mixed)


def _descend(problem: Problem, *, keep_sum: bool) -> tuple[NetState, Named]:
    """Run the inner loop; return its end, and the sum of all gradients or the last ones."""
    start, steps = begin(problem), len(problem.batches)
    if keep_sum or not steps:
        kept = {k: torch.zeros_like(p) for k, p in start.params.items()}
    with descending(problem, start) as way:
        for k in range(steps):
            pieces: list[tuple[Members, Named]] = []
            for part in parts_of(problem.batches, k):
                grads = way.step(part)
                if keep_sum:
                    accumulate(kept, part.members, grads)
                elif k == steps - 1:  # which every client takes
                    pieces.append((part.members, grads))
                del grads  # gone before the next ones come
            if pieces:
                kept = in_rows(pieces)
    return way.state, kept


@dataclass(frozen=True)
class _End:
    """The end of the inner loop, seen from the validation loss."""

    state: NetState
    v: Named
    direct: Tensor
    loss: Tensor
    accuracy: Tensor


def _at_end(problem: Problem, state: NetState) -> _End:
    """Return v and the direct term at the end of the inner loop, the running statistics held."""
    seen = validated(problem, state)
    return _End(state.detach(), seen.params, seen.mix, seen.loss, seen.accuracy)


def _mixed_product(problem: Problem, state: NetState, vector: Named, step: int) -> Tensor:
    """Return d/dbeta <g(theta; beta), vector> on the batch of an inner step, shape (C, B)."""
    leaf = NetState({k: p.detach().requires_grad_() for k, p in state.params.items()}, state.stats)
    mix = problem.mix.clone().requires_grad_()
    batch, noise = problem.batches[step], noise_of(problem.batches, step)
    grads, _ = train_gradient(problem.net, leaf, mix, batch, noise=noise)
    return vector_jacobian(grads, {"mix": mix}, vector)["mix"]


def _result(end: _End, *, rate: Tensor, mix: Tensor | float = 0.0) -> Hypergradient:
    return Hypergradient(end.direct + mix, rate, end.loss, end.accuracy)
