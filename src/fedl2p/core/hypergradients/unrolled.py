"""Hypergradients that go back through the inner steps: unrolled (all) and truncated (the last T).

See the table of :mod:`fedl2p.core.hypergradients.estimators`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fedl2p.core import trees
from fedl2p.core.finetuning.batches import EpochBatches, StackBatch, step_batches
from fedl2p.core.finetuning.optimizers import Optimizer
from fedl2p.core.finetuning.sgd_step import inner_step
from fedl2p.core.functional.model import FunctionalModel, ModelState
from fedl2p.core.functional.named_tensors import accumulate, gather_clients, inner_products
from fedl2p.core.hypergradients.problem import (
    Hypergradient,
    Problem,
    ValidationGradients,
    validation_gradients,
)
from fedl2p.core.settings import HypergradientConfig

GRAPHS = 2**28
"""Bytes that the graphs of a segment may take together when its length is not given."""


def unrolled(problem: Problem, config: HypergradientConfig) -> Hypergradient:
    """Differentiate through the inner steps: all, or the last ``config.steps`` if truncated.

    Reverse mode with checkpoints: the steps are cut into segments, of which the forward pass keeps
    the first states only; a segment's graph is made again when its turn comes (the last one's is
    kept from the forward pass). Older steps than the last T have the identity as Jacobian: their
    directions, and with them the optimizer's moments before the last T, are constants.
    """
    total = len(problem.batches)
    depth = min(config.steps, total) if config.mode == "truncated" else total
    cuts = _segments(problem, config, depth)
    start = problem.start()
    older = {k: torch.zeros_like(p) for k, p in start.params.items()} if cuts[0] else {}
    checkpoints = []
    with problem.sgd(start) as sgd:
        for k in range(cuts[-2]):
            if k in cuts:
                checkpoints.append(sgd.copy())
            for batch in step_batches(problem.batches, k):
                directions = sgd.step_and_directions(batch)
                if k < cuts[0]:
                    accumulate(older, batch.members, directions)
                del directions
    checkpoints.append(sgd.state)

    mix, rate = problem.mix.clone().requires_grad_(), problem.rate.clone().requires_grad_()
    validation: ValidationGradients | None = None
    for first, end in reversed(list(pairwise(cuts))):
        start = checkpoints.pop().leaves()
        with torch.enable_grad():
            after = _run_segment(problem, start, mix, rate, first, end)
        if validation is None:
            validation = validation_gradients(problem, after, of_stats=True)
            cotangents = validation.params | validation.stats
            d_mix, d_rate = validation.mix, torch.zeros_like(rate)
        outputs = after.params | after.stats | after.moments
        # an output without a graph (a tensor that no step changes) passes nothing back
        attached = [(outputs[k], c) for k, c in cotangents.items() if outputs[k].requires_grad]
        tensors = start.params | start.stats | start.moments
        leaves = {k: t for k, t in tensors.items() if t.requires_grad}
        by_mix, by_rate, *by_start = torch.autograd.grad(
            [o for o, _ in attached],
            [mix, rate, *leaves.values()],
            grad_outputs=[c for _, c in attached],
            allow_unused=True,
            materialize_grads=True,
        )
        cotangents = dict(zip(leaves, by_start, strict=True))
        d_mix, d_rate = d_mix + by_mix, d_rate + by_rate
        del after, outputs, attached  # before the next segment takes memory
    assert validation is not None, "there is always a last segment"
    if cuts[0]:
        d_rate = d_rate - inner_products(cotangents, older)
    return Hypergradient(d_mix, d_rate, validation.loss, validation.accuracy)


def _segments(problem: Problem, config: HypergradientConfig, depth: int) -> list[int]:
    """Return the steps at which the segments of the last ``depth`` steps begin, and the end."""
    total = len(problem.batches)
    if depth == 0:
        return [total, total]
    segment = config.segment
    if segment is None:
        segment = _most_held(problem) if depth > 1 else 1
    # The odd one comes first, since the last segment's graph is not made twice.
    first = total - depth + (depth - 1) % segment + 1
    return [total - depth, *range(first, total + 1, segment)]


def _most_held(problem: Problem) -> int:
    """Return how many steps' graphs fit into :data:`GRAPHS`; measured once per model and shape."""
    batches = problem.batches
    unequal = isinstance(batches, EpochBatches) and batches.unequal_sizes
    step = len(batches) - 1 if unequal else 0  # one that every client takes
    of_step = step_batches(batches, step)
    rows = sum(b.clients * b.length for b in of_step)
    shape = (len(problem.mix), rows, trees.kind(of_step[0].x, skip=2), problem.optimizer)
    known = problem.net.graph_bytes
    if shape not in known:
        held: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            # what is kept must not know its node, which keeps it: neither would ever go
            return t.detach()

        start = problem.start().leaves()
        with torch.enable_grad(), saved_tensors_hooks(pack, lambda t: t):
            mix = problem.mix.clone().requires_grad_()
            _run_segment(problem, start, mix, problem.rate, step, step + 1)
        known[shape] = sum(held.values())
    most = batches.most_rows if isinstance(batches, EpochBatches) else rows
    return max(1, int(GRAPHS / max(1, known[shape]) * rows / most))


def _run_segment(
    problem: Problem, state: ModelState, mix: Tensor, rate: Tensor, first: int, end: int
) -> ModelState:
    """Return the state after differentiable steps ``first`` to ``end`` - 1."""
    net, batches, optimizer = problem.net, problem.batches, problem.optimizer
    if len(mix) > 1:
        for k in range(first, end):
            state = _step(net, state, mix, rate, step_batches(batches, k), optimizer)
        return state
    state, mix, rate = state.squeezed(), mix.squeeze(0), rate.squeeze(0)
    for k in range(first, end):
        (batch,) = step_batches(batches, k)
        xy = trees.rows(batch.x, 0), trees.rows(batch.y, 0)
        state = inner_step(
            net, state, mix, rate, xy, optimizer=optimizer, dropout_seed=batch.dropout_seed
        )
    return state.unsqueezed()


def _step(
    net: FunctionalModel,
    state: ModelState,
    mix: Tensor,
    rate: Tensor,
    batches: Sequence[StackBatch],
    optimizer: Optimizer | None,
) -> ModelState:
    """Take one differentiable step of a stack; clients that have no batch stay as they are."""
    if batches[0].members is None:
        xy = batches[0].x, batches[0].y
        return inner_step(net, state, mix, rate, xy, optimizer=optimizer)
    pieces = []
    waiting = set(range(len(mix)))
    for batch in batches:
        assert batch.members is not None
        rows = torch.tensor(batch.members, device=mix.device)
        members, xy = state.take(batch.members), (batch.x, batch.y)
        member_mix, member_rate = mix.index_select(0, rows), rate.index_select(0, rows)
        after = inner_step(net, members, member_mix, member_rate, xy, optimizer=optimizer)
        pieces.append((batch.members, after))
        waiting -= set(batch.members)
    if waiting:
        others = tuple(sorted(waiting))
        pieces.append((others, state.take(others)))
    return ModelState(
        gather_clients([(members, piece.params) for members, piece in pieces]),
        gather_clients([(members, piece.stats) for members, piece in pieces]),
        gather_clients([(members, piece.moments) for members, piece in pieces]),
    )
