"""Loss and accuracy of many clients' models on a part of their data."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan

import torch
from torch import Tensor

from fedl2p.core.clientdata import Examples
from fedl2p.core.finetuning.sgd_step import cross_entropy
from fedl2p.core.finetuning.stacking import grouped, largest_stack
from fedl2p.core.functional.model import FunctionalModel, ModelState


@torch.no_grad()
def evaluate(
    net: FunctionalModel,
    state: ModelState,
    mix: Tensor,
    examples: Sequence[Examples],
    *,
    examples_per_pass: int = 512,
) -> list[tuple[float, float]]:
    """Return loss (nats) and accuracy (fraction) of each of C clients in evaluation mode.

    Parameters
    ----------
    net
        The model.
    state, mix
        Tensors of C clients, and their mixes of shape (C, B).
    examples
        One part per client; the parts may differ in length. Scores without examples are NaN.
    examples_per_pass
        Examples per client and forward pass.
    """
    scores: dict[int, tuple[float, float]] = {}
    size = net.stack_size
    keys = [(i // size, e.x.shape) for i, e in enumerate(examples)]
    for members in grouped(keys, [largest_stack(net, e.x, size) for e in examples]):
        count = len(examples[members[0]].y)
        if count == 0:
            scores.update((i, (nan, nan)) for i in members)
            continue
        own = ModelState(
            {k: v[members] for k, v in state.params.items()},
            {k: v[members] for k, v in state.stats.items()},
        )
        x = torch.stack([examples[i].x for i in members]).to(net.device)
        y = torch.stack([examples[i].y for i in members]).to(net.device)
        losses, rights = [], []
        for begin in range(0, count, examples_per_pass):
            part = slice(begin, begin + examples_per_pass)
            logits, _ = net.logits(own, mix[members], x[:, part], training=False)
            losses.append(cross_entropy(logits, y[:, part]) * len(y[0, part]))
            rights.append((logits.argmax(-1) == y[:, part]).sum(1))
        loss, right = torch.stack(losses).sum(0) / count, torch.stack(rights).sum(0) / count
        pairs = zip(loss.tolist(), right.tolist(), strict=True)
        scores.update(zip(members, pairs, strict=True))
    return [scores[i] for i in range(len(examples))]
