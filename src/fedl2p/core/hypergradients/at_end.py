"""Hypergradients from the end of the inner loop: last-step, trajectory, implicit, published.

See the table of :mod:`fedl2p.core.hypergradients.estimators`. v is the gradient of the validation
loss by the weights theta_K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedl2p.core.finetuning.batches import dropout_seed_of, step_batches
from fedl2p.core.finetuning.sgd_step import (
    broadcast_rates,
    differentiable_gradient,
)
from fedl2p.core.functional.model import ModelState
from fedl2p.core.functional.named_tensors import (
    Members,
    NamedTensors,
    accumulate,
    conjugate_gradients,
    gather_clients,
    gradient,
    inner_products,
    vector_jacobian,
)
from fedl2p.core.hypergradients.problem import (
    Hypergradient,
    Problem,
    ValidationGradients,
    validation_gradients,
)
from fedl2p.core.settings import HypergradientConfig


def last_step(problem: Problem, config: HypergradientConfig) -> Hypergradient:
    """Differentiate through the last step alone; the mix by its direct term."""
    state, last = _run_inner_loop(problem, sum_gradients=False)
    end = validation_gradients(problem, state)
    return _hypergradient(end, rate=-inner_products(end.params, last))


def trajectory(problem: Problem, config: HypergradientConfig) -> Hypergradient:
    """Sum the inner gradients of all steps, as if every step acted on theta_K unchanged."""
    state, total = _run_inner_loop(problem, sum_gradients=True)
    end = validation_gradients(problem, state)
    steps = len(problem.batches)
    if steps == 0 or not problem.net.sites.norms:
        return _hypergradient(end, rate=-inner_products(end.params, total))
    rates = broadcast_rates(problem.rate, end.params)
    weighted = {k: rates[k] * v for k, v in end.params.items()}
    # d/dbeta <g(theta_K; beta), eta v> on the batch of the last step, shape (C, B)
    mix = problem.mix.clone().requires_grad_()
    seed = dropout_seed_of(problem.batches, steps - 1)
    grads, _ = differentiable_gradient(
        problem.net, _trainable(state), mix, problem.batches[steps - 1], dropout_seed=seed
    )
    mixed = vector_jacobian(grads, {"mix": mix}, weighted)["mix"]
    return _hypergradient(end, rate=-inner_products(end.params, total), mix=-steps * mixed)


def implicit(problem: Problem, config: HypergradientConfig) -> Hypergradient:
    """Take theta_K for stationary: implicit function theorem, solved by conjugate gradients."""
    state, total = _run_inner_loop(problem, sum_gradients=True)
    end = validation_gradients(problem, state)
    steps = len(problem.batches)
    if steps == 0 or not problem.net.sites.norms:
        return _hypergradient(end, rate=-inner_products(end.params, total))
    batch = problem.following or problem.batches[steps - 1]
    leaf = _trainable(state)
    mix = problem.mix.clone().requires_grad_()
    seed = dropout_seed_of(problem.batches, steps)
    grads, _ = differentiable_gradient(problem.net, leaf, mix, batch, dropout_seed=seed)

    def hessian_vector(q: NamedTensors) -> NamedTensors:
        product = vector_jacobian(grads, leaf.params, q)
        return {k: product[k] + config.damping * q[k] for k in q}

    q = conjugate_gradients(hessian_vector, end.params, config.iterations)
    mixed = vector_jacobian(grads, {"mix": mix}, q)["mix"]
    return _hypergradient(end, rate=-inner_products(end.params, total), mix=-mixed)


def published(problem: Problem, config: HypergradientConfig) -> Hypergradient:
    """Compute what the public reference code computes, its two errors included."""
    state, last = _run_inner_loop(problem, sum_gradients=False)
    end = validation_gradients(problem, state)
    steps = len(problem.batches)
    if steps == 0:
        return _hypergradient(end, rate=-inner_products(end.params, last))
    leaf = _trainable(state)
    mix = problem.mix.clone().requires_grad_()
    x, y = problem.following or problem.batches[steps - 1]
    with torch.enable_grad():
        logits, _ = problem.net.logits(leaf, mix, x, training=False)
        grads = gradient(
            problem.net.objective.losses_of_many(logits, y).sum(), leaf.params, create_graph=True
        )
    problem.net.check_twice_differentiable(grads.values())
    term, p = dict(end.params), dict(end.params)
    for _ in range(config.terms):
        curved = vector_jacobian(grads, leaf.params, term)
        term = {k: term[k] - config.psi * curved[k] for k in term}
        p = {k: p[k] + term[k] for k in p}
    curved = vector_jacobian(grads, leaf.params, p)
    mixed = vector_jacobian(grads, {"mix": mix}, p)["mix"]
    return _hypergradient(end, rate=inner_products(curved, last), mix=-mixed)


def _run_inner_loop(problem: Problem, *, sum_gradients: bool) -> tuple[ModelState, NamedTensors]:
    """Return the end of the inner loop, and the sum of all directions or those of the last step.

    In plain SGD a direction is the gradient.
    """
    start, steps = problem.start(), len(problem.batches)
    if sum_gradients or not steps:
        kept = {k: torch.zeros_like(p) for k, p in start.params.items()}
    with problem.sgd(start) as sgd:
        for k in range(steps):
            pieces: list[tuple[Members, NamedTensors]] = []
            for batch in step_batches(problem.batches, k):
                directions = sgd.step_and_directions(batch)
                if sum_gradients:
                    accumulate(kept, batch.members, directions)
                elif k == steps - 1:  # which every client takes
                    pieces.append((batch.members, directions))
                del directions  # gone before the next ones come
            if pieces:
                kept = gather_clients(pieces)
    return sgd.state, kept


def _trainable(state: ModelState) -> ModelState:
    """Return the state with parameters as leaves of a new graph, the statistics constant."""
    return ModelState(
        {k: p.detach().requires_grad_() for k, p in state.params.items()}, state.stats
    )


def _hypergradient(
    end: ValidationGradients, *, rate: Tensor, mix: Tensor | float = 0.0
) -> Hypergradient:
    """Add the direct term of the mix to what goes through the inner loop."""
    return Hypergradient(end.mix + mix, rate, end.loss, end.accuracy)
