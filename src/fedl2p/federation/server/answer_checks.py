"""Whether an answer may enter the mean: the one place that says no, and why."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median_low

from torch import Tensor

from fedl2p.core.functional.named_tensors import norms_within
from fedl2p.method import State, Update

LARGEST = 1e18
"""Largest magnitude of a number in a tensor: squared, a larger one overflows float32, and with it
what a server optimizer remembers."""

MOST_EXAMPLES = 2.0**53
"""Largest weight: beyond it a float is no exact count."""

LARGEST_LOSS = 3.4e38
"""Largest size of a loss, that of float32: sums of larger ones overflow."""

WEIGHT_LIMIT = 1000.0
"""Largest weight that a client elsewhere may state, as a multiple of the round's median weight."""


def objection(update: Update, *, sent: State) -> str | None:
    """Return why an update cannot be averaged, in one line, or None if it can.

    Parameters
    ----------
    update
        A client's: its tensors, its weight (a number of examples), and its metrics, of which a loss
        must be finite and an accuracy in [0, 1].
    sent
        The state that was sent: the names, shapes and dtypes that the tensors must have. Empty
        where none come back.
    """
    shared, weight, metrics = update.shared, update.weight, update.metrics
    if absent := sorted(sent.keys() - shared.keys()):
        return f"tensor {absent[0]!r} is missing ({len(absent)} in all)"
    if extra := sorted(shared.keys() - sent.keys()):
        return f"tensor {extra[0]!r} was not asked for ({len(extra)} in all)"
    for name, tensor in shared.items():
        wanted = sent[name]
        if tensor.shape != wanted.shape:
            return f"tensor {name!r} has shape {tuple(tensor.shape)}, wanted {tuple(wanted.shape)}"
        if tensor.dtype != wanted.dtype:
            return f"tensor {name!r} is {tensor.dtype}, wanted {wanted.dtype}"
    if (fault := _extreme(shared)) is not None:
        return fault
    if not 0 < weight <= MOST_EXAMPLES:
        return f"its weight is {weight}, wanted a positive number of examples"
    loss, accuracy = metrics.get("loss", 0.0), metrics.get("accuracy", 0.0)
    if not abs(loss) <= LARGEST_LOSS:  # a log-likelihood may be negative
        return f"its loss is {loss}, wanted a finite number"
    if not 0 <= accuracy <= 1 + 1e-6:
        return f"its accuracy is {accuracy}, wanted a fraction in [0, 1]"
    return None


def overweight(weights: Mapping[str, float], *, limit: float = WEIGHT_LIMIT) -> dict[str, str]:
    """Return, for the clients whose weight cannot be right beside the others', why.

    Parameters
    ----------
    weights
        Weight by client, of the answers that are otherwise good.
    limit
        Largest multiple of their median (of two middle ones the lower: one client of two cannot
        raise the measure by which it is judged).
    """
    if not weights:
        return {}
    usual = median_low(weights.values())
    return {
        name: f"its weight is {weight:g}, over {limit:g} times the round's median of {usual:g}"
        for name, weight in weights.items()
        if weight > limit * usual
    }


def not_finite(state: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity, or None."""
    for name, tensor in state.items():
        if not bool(tensor.isfinite().all()):
            return name
    return None


def _extreme(state: Mapping[str, Tensor]) -> str | None:
    """Return which tensor holds NaN, infinity or too large a number, in one line, or None."""
    if not any(t.is_complex() for t in state.values()) and norms_within(state.values(), LARGEST):
        return None  # a tensor by itself is looked at only where that fails
    if (poisoned := not_finite(state)) is not None:
        return f"tensor {poisoned!r} holds NaN or infinity"
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel():
            largest = float(tensor.abs().max())
            if largest > LARGEST:
                return f"tensor {name!r} holds {largest:.3g}, wanted at most {LARGEST:g} in size"
    return None
