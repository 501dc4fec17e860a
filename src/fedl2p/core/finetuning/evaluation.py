"""Loss and metric of many clients' models on a part of their data."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan

import torch
from torch import Tensor

from fedl2p.core import trees
from fedl2p.core.clientdata import Examples
from fedl2p.core.finetuning.stacking import fewest_to_stack, grouped, largest_stack
from fedl2p.core.functional.model import FunctionalModel, ModelState

PASS_VALUES = 25_000
"""Input values up to which clients with one model are evaluated together on a CPU: beyond, the
activations leave the cache, and one after another takes less time (3 x 16 x 16 pixels, 32 examples:
half of it)."""


@torch.no_grad()
def evaluate(
    net: FunctionalModel,
    state: ModelState,
    mix: Tensor,
    examples: Sequence[Examples],
    *,
    examples_per_pass: int = 512,
) -> list[tuple[float, float]]:
    """Return loss and accuracy (fraction) of each of C clients in evaluation mode.

    The loss is that of the model's objective; the accuracy its metric, NaN without one.

    Parameters
    ----------
    net
        The model.
    state, mix
        Tensors of C clients, and their mixes of shape (C, B). Where all have one model (tensors
        that are expanded, equal mixes), it runs as one.
    examples
        One part per client; the parts may differ in length. Scores without examples are NaN.
    examples_per_pass
        Examples per client and forward pass.
    """
    scores: dict[int, tuple[float, float]] = {}
    size, objective = net.stack_size, net.objective
    one_model = _is_rowwise(net, examples) and _is_one_model(state, mix)
    keys = [(i // size, e.num, trees.kind(e.x), trees.kind(e.y)) for i, e in enumerate(examples)]
    sizes = [_stack_size(net, e, one_model=one_model) for e in examples]
    for members in grouped(keys, sizes):
        count = examples[members[0]].num
        if count == 0:
            scores.update((i, (nan, nan)) for i in members)
            continue
        together = one_model and len(members) > 1
        rows = members[:1] if together else members
        # a client by itself is most often all there is
        own, own_mix = (state, mix) if len(mix) == 1 else (state.take(rows), mix[rows])
        x = trees.to_device(trees.stack([examples[i].x for i in members]), net.device)
        y = trees.to_device(trees.stack([examples[i].y for i in members]), net.device)
        losses: list[Tensor] = []
        metrics: list[Tensor] = []
        for x_part, y_part in zip(
            trees.split(x, examples_per_pass, 1), trees.split(y, examples_per_pass, 1), strict=True
        ):
            outputs = (
                net.judged(own, own_mix, x_part)
                if together
                else net.logits(own, own_mix, x_part, training=False)[0]
            )
            loss = objective.losses_of_many(outputs, y_part)
            losses.append(loss * objective.count(y_part))
            metric = objective.metrics_of_many(outputs, y_part)
            metrics.append(torch.full_like(loss, nan) if metric is None else metric.sum(1))
        total = objective.count(y)
        loss, metric = torch.stack(losses).sum(0) / total, torch.stack(metrics).sum(0) / total
        pairs = zip(loss.tolist(), metric.tolist(), strict=True)
        scores.update(zip(members, pairs, strict=True))
    return [scores[i] for i in range(len(examples))]


def _stack_size(net: FunctionalModel, part: Examples, *, one_model: bool) -> int:
    """Return how many clients with such a part are evaluated together."""
    largest = largest_stack(net, part.x, net.stack_size) if part.num else 1
    if one_model and largest > 1 and net.device.type == "cpu":
        values = sum(leaf.numel() for leaf in trees.leaves(part.x))
        return max(1, min(largest, PASS_VALUES // max(1, values)))
    pays = one_model or largest == 1 or fewest_to_stack(net, part.x) <= largest
    return largest if pays else 1


def _is_rowwise(net: FunctionalModel, examples: Sequence[Examples]) -> bool:
    """Tell whether examples of several clients may go through one model together."""
    some = next((e for e in examples if e.num), None)
    return some is not None and len(examples) > 1 and net.examine(some.x).rowwise


def _is_one_model(state: ModelState, mix: Tensor) -> bool:
    """Tell whether all clients have the same tensors, by their strides, and the same mix."""
    tensors = (*state.params.values(), *state.stats.values())
    return all(t.stride(0) == 0 for t in tensors) and bool((mix == mix[:1]).all())
