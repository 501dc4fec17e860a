"""The proximal term (weight / 2) ||w - anchor||^2, in a form that is stable for every weight.

An explicit step of rate eta on loss and term diverges as soon as eta weight > 2. So the term is
taken at the end of the step instead of at its start (a proximal gradient step): ::

    w+ = argmin_u <g, u> + ||u - w||^2 / (2 eta) + (weight / 2) ||u - anchor||^2
       = w - eta / (1 + eta weight) (g + weight (w - anchor))

which is the explicit step at a damped rate. Both have the same resting points and agree to first
order in eta; weight 0 is the plain step, and weight -> infinity gives w+ = anchor.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from fedl2p.core.finetuning.in_place_sgd import Gradient
from fedl2p.core.functional.model import ModelState


def pulled(gradient: Gradient, anchor: dict[str, Tensor], weight: float) -> Gradient:
    """Return ``gradient`` plus that of the proximal term, weight (w - anchor)."""

    def with_term(
        state: ModelState, step: int, trainable: Collection[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        grads, stats = gradient(state, step, trainable)
        return {k: g + weight * (state.params[k] - anchor[k]) for k, g in grads.items()}, stats

    return with_term


def damped(rate: float, weight: float) -> float:
    """Return the rate at which a step down :func:`pulled` is the proximal step of ``rate``."""
    return rate / (1 + rate * weight)
