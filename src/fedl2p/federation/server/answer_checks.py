"""Whether an answer may enter the average: the one place that says no, and why."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median_low

from torch import Tensor

from fedl2p.method import State

LARGEST = 1e18
"""Largest magnitude of a number in a tensor: squared, a larger one overflows float32, and with it
the sums of the average and what a server optimizer remembers."""

MOST_EXAMPLES = 2.0**53
"""Largest weight: beyond it a float is no exact count."""

LARGEST_LOSS = 3.4e38
"""Largest loss, that of float32: sums of larger ones overflow."""


def objection(
    shared: Mapping[str, Tensor], *, like: State, weight: float, metrics: Mapping[str, float]
) -> str | None:
    """Return why an answer cannot be averaged, in one line, or None if it can.

    Parameters
    ----------
    shared
        The tensors of the answer.
    like
        The state that was sent: the names, shapes and dtypes that the answer must have.
    weight
        Its weight in the average, a number of examples.
    metrics
        Its metrics; a loss must be finite and >= 0, an accuracy in [0, 1].
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
    for name, tensor in shared.items():
        if tensor.is_floating_point() and tensor.numel():
            largest = float(tensor.abs().max())
            if largest > LARGEST:
                return f"tensor {name!r} holds {largest:.3g}, wanted at most {LARGEST:g} in size"
    if not 0 < weight <= MOST_EXAMPLES:
        return f"its weight is {weight}, wanted a positive number of examples"
    loss, accuracy = metrics.get("loss", 0.0), metrics.get("accuracy", 0.0)
    if not 0 <= loss <= LARGEST_LOSS:
        return f"its loss is {loss}, wanted a finite number >= 0"
    if not 0 <= accuracy <= 1 + 1e-6:
        return f"its accuracy is {accuracy}, wanted a fraction in [0, 1]"
    return None


def overweight(weights: Mapping[str, float], *, limit: float) -> dict[str, str]:
    """Return, for the clients whose weight cannot be right beside the others', why.

    Parameters
    ----------
    weights
        Weight by client, of the answers that are otherwise good.
    limit
        Largest multiple of their median (of two middle ones the lower: one client of two cannot
        raise the measure that it is held against).
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


def one_line(reason: str, *, most: int = 300) -> str:
    """Return a reason as it may stand in a log: printable, in one line, not longer than ``most``.

    Reasons come from other machines.
    """
    text = "".join(c if c.isprintable() else " " for c in reason[: 8 * most])
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."
