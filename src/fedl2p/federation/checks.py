"""Whether an answer may enter the average: the one place that says no, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedl2p.method import State


def objection(
    shared: State, *, like: State, weight: float, metrics: Mapping[str, float]
) -> str | None:
    """Return why an answer cannot be averaged, in one line, or None if it can.

    Parameters
    ----------
    shared
        The tensors of the answer.
    like
        The state that was sent: the names, shapes and dtypes that the answer must have.
    weight
        Its weight in the average.
    metrics
        Its metrics; a loss must be finite.
    """
    if absent := sorted(like.keys() - shared.keys()):
        return f"tensor {absent[0]!r} is missing ({len(absent)} in all)"
    if extra := sorted(shared.keys() - like.keys()):
        return f"tensor {extra[0]!r} was not asked for ({len(extra)} in all)"
    for name, tensor in shared.items():
        wanted = like[name]
        if tensor.shape != wanted.shape:
            return f"tensor {name!r} has shape {tuple(tensor.shape)}, wanted {tuple(wanted.shape)}"
        if tensor.dtype != wanted.dtype:
            return f"tensor {name!r} is {tensor.dtype}, wanted {wanted.dtype}"
    if (poisoned := not_finite(shared)) is not None:
        return f"tensor {poisoned!r} holds NaN or infinity"
    if not (math.isfinite(weight) and weight > 0):
        return f"its weight is {weight}, wanted a positive number of examples"
    if not math.isfinite(metrics.get("loss", 0.0)):
        return f"its loss is {metrics['loss']}"
    return None


def not_finite(state: State) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity, or None."""
    for name, tensor in state.items():
        if not bool(tensor.isfinite().all()):
            return name
    return None
