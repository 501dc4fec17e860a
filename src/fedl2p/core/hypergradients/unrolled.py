"""Hypergradients that go back through the inner steps: unrolled (all) and truncated (the last T).

See the table of :mod:`fedl2p.core.hypergradients.estimators`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fedl2p.core.finetuning.batches import EpochBatches, Part, parts_of
from fedl2p.core.finetuning.sgd_step import inner_step
from fedl2p.core.functional.model import Net, NetState
from fedl2p.core.functional.named_tensors import Named, accumulate, in_rows, inner
from fedl2p.core.hypergradients.problem import Hypergradient, Problem, begin, descending, validated
from fedl2p.core.settings import HypergradientConfig

GRAPHS = 2**28
"""Bytes that the graphs of a segment may take together when its length is not given."""


def unrolled(problem: Problem, config: HypergradientConfig) -> Hypergradient:
    """Differentiate through every inner step."""
    return _through_last(problem, len(problem.batches), config.segment)


def truncated(problem: Problem, config: HypergradientConfig) -> Hypergradient:
    """Differentiate through the last ``config.steps`` inner steps."""
    return _through_last(problem, min(config.steps, len(problem.batches)), config.segment)


def _through_last(problem: Problem, depth: int, segment: int | None) -> Hypergradient:
    """Differentiate through the last ``depth`` steps by the adjoint of segments of steps.

    Only segment boundaries are held from the forward pass; a segment's graph is made again when
    its turn comes (the last one's is kept from the forward pass).
    """
    total = len(problem.batches)
    if segment is None:
        segment = _most_held(problem) if depth > 1 else 1
    # The odd one comes first, since the last segment's graph is not made twice.
    first = total - depth + (depth - 1) % segment + 1
    cuts = [total - depth, *range(first, total + 1, segment)] if depth else [total]
    start = begin(problem)
    older = {k: torch.zeros_like(p) for k, p in start.params.items()} if cuts[0] else {}
    boundaries = []
    with descending(problem, start) as way:
        for k in range(cuts[-2] if depth else total):
            if k in cuts:
                boundaries.append(way.copy())
            for part in parts_of(problem.batches, k):
                grads = way.step(part)
                if k < cuts[0]:
                    accumulate(older, part.members, grads)
                del grads
    boundaries.append(way.state)

    mix, rate = problem.mix.clone().requires_grad_(), problem.rate.clone().requires_grad_()
    if depth:
        start = boundaries.pop().leaves()
        with torch.enable_grad():
            last = _unroll(problem, start, mix, rate, cuts[-2], total)
        seen = validated(problem, last, by_stats=True)
        adjoint = _pull_back(last, seen.params | seen.stats, start, mix, rate)
        d_mix, d_rate = seen.mix + adjoint.mix, adjoint.rate
    else:
        seen = validated(problem, boundaries.pop())
        adjoint = _Adjoint(seen.mix, torch.zeros_like(rate), seen.params)
        d_mix, d_rate = adjoint.mix, adjoint.rate
    for first, end in zip(reversed(cuts[:-2]), reversed(cuts[1:-1]), strict=True):
        start = boundaries.pop().leaves()
        with torch.enable_grad():
            after = _unroll(problem, start, mix, rate, first, end)
        adjoint = _pull_back(after, adjoint.cotangents, start, mix, rate)
        d_mix, d_rate = d_mix + adjoint.mix, d_rate + adjoint.rate
    if cuts[0]:
        d_rate = d_rate - inner(adjoint.cotangents, older)
    return Hypergradient(d_mix, d_rate, seen.loss, seen.accuracy)


def _most_held(problem: Problem) -> int:
    """Return how many steps' graphs fit into :data:`GRAPHS`; measured once per net and shape."""
    batches = problem.batches
    ragged = isinstance(batches, EpochBatches) and batches.ragged
    step = len(batches) - 1 if ragged else 0  # one that every client takes
    parts = parts_of(batches, step)
    rows = sum(p.y.numel() for p in parts)
    shape = (len(problem.mix), rows, *parts[0].x.shape[2:])
    known = problem.net.graph_bytes
    if shape not in known:
        held: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            # what is kept must not know its node, which keeps it: neither would ever go
            return t.detach()

        start = begin(problem).leaves()
        with torch.enable_grad(), saved_tensors_hooks(pack, lambda t: t):
            mix = problem.mix.clone().requires_grad_()
            _unroll(problem, start, mix, problem.rate, step, step + 1)
        known[shape] = sum(held.values())
    most = batches.most_rows if isinstance(batches, EpochBatches) else rows
    return max(1, int(GRAPHS / max(1, known[shape]) * rows / most))


@dataclass(frozen=True)
class _Adjoint:
    """Gradients by mix and rate, and by the tensors of a segment's first state, by name."""

    mix: Tensor
    rate: Tensor
    cotangents: Named


def _unroll(
    problem: Problem, state: NetState, mix: Tensor, rate: Tensor, first: int, end: int
) -> NetState:
    if len(mix) > 1:
        for k in range(first, end):
            state = _stepped(problem.net, state, mix, rate, parts_of(problem.batches, k))
        return state
    state, mix, rate = state.squeezed(), mix.squeeze(0), rate.squeeze(0)
    for k in range(first, end):
        (part,) = parts_of(problem.batches, k)
        batch = part.x.squeeze(0), part.y.squeeze(0)
        state = inner_step(problem.net, state, mix, rate, batch, noise=part.noise)
    return state.unsqueezed()


def _stepped(
    net: Net, state: NetState, mix: Tensor, rate: Tensor, parts: Sequence[Part]
) -> NetState:
    """Take a differentiable step; clients that have no batch stay as they are."""
    if parts[0].members is None:
        return _differentiable(net, state, mix, rate, parts[0])
    pieces = []
    waiting = set(range(len(mix)))
    for part in parts:
        assert part.members is not None
        rows = torch.tensor(part.members, device=mix.device)
        own = mix.index_select(0, rows), rate.index_select(0, rows)
        after = _differentiable(net, state.take(part.members), *own, part)
        pieces.append((part.members, after))
        waiting -= set(part.members)
    if waiting:
        others = tuple(sorted(waiting))
        pieces.append((others, state.take(others)))
    return NetState(
        in_rows([(members, piece.params) for members, piece in pieces]),
        in_rows([(members, piece.stats) for members, piece in pieces]),
    )


def _differentiable(net: Net, state: NetState, mix: Tensor, rate: Tensor, part: Part) -> NetState:
    return inner_step(net, state, mix, rate, (part.x, part.y), noise=part.noise)


def _pull_back(
    end: NetState, cotangents: Named, start: NetState, mix: Tensor, rate: Tensor
) -> _Adjoint:
    leaves = {k: t for k, t in (start.params | start.stats).items() if t.requires_grad}
    inputs = [mix, rate, *leaves.values()]
    # an output without a graph (a tensor that no step changes) has nothing to give back
    outputs = end.params | end.stats
    attached = [(outputs[k], c) for k, c in cotangents.items() if outputs[k].requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in attached],
        inputs,
        grad_outputs=[c for _, c in attached],
        allow_unused=True,
        materialize_grads=True,
    )
    return _Adjoint(grads[0], grads[1], dict(zip(leaves, grads[2:], strict=True)))
