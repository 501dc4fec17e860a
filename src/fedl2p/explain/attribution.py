"""Which entries of a client's profile moved its hyperparameters, and by how much.

Integrated gradients (Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks", ICML 2017,
section 3): along the straight path from a typical profile to the client's, the gradient of an
output by an entry, times the entry's difference. The parts of one output add up to the whole
difference of that output (completeness), which is measured here and bounds the numerical error.

The path is straight in what the nets read (``MetaNets.prepared``), for example in the logarithm of
a divergence, so that a dead channel of thousands of nats does not use up the path. Each such input
stands for one entry of the profile, so a part belongs to that entry.

Rates are explained in log space where the nets write them so: a part is then a factor on the rate.
All outputs are explained before their bounds; a bound would hide what moved them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.metanets import MetaNets
from fedl2p.core.profiles import Profile

TOLERANCE = 0.01
FEWEST_POINTS, MOST_POINTS = 256, 4096
LEAST = 1e-12
"""Movements below this are rounding, in float64: there is nothing to explain."""


@dataclass(frozen=True)
class Integrated:
    """Integrated gradients of O outputs by E inputs.

    Parameters
    ----------
    parts
        Shape (O, E), in the unit of the outputs: what each input added to each output.
    start, end
        Shape (O,): the outputs at both ends of the path.
    points
        Points of the path at which the gradient was taken.
    gap
        How far the parts fail to add up to ``end - start``: the largest over the outputs, as a
        fraction of the sum of the output's absolute parts.
    """

    parts: Tensor
    start: Tensor
    end: Tensor
    points: int
    gap: float


def integrated_gradients(
    outputs: Callable[[Tensor], Tensor],
    start: Tensor,
    end: Tensor,
    *,
    tolerance: float = TOLERANCE,
    fewest: int = FEWEST_POINTS,
    most: int = MOST_POINTS,
) -> Integrated:
    """Attribute the change of some outputs along a straight path to the inputs.

    Parameters
    ----------
    outputs
        Maps inputs (N, E) to outputs (N, O), row by row; differentiable almost everywhere.
    start, end
        The ends of the path, shape (E,), of one floating type.
    tolerance
        The points are doubled until the gap is at most this fraction.
    fewest, most
        The first number of points, and the number at which doubling stops whatever the gap is: the
        caller finds it in the result.

    Raises
    ------
    ValueError
        If a setting makes no sense, or an output or its gradient is not finite.
    """
    if not (0 < tolerance < 1 and 1 <= fewest <= most):
        raise ValueError(
            f"tolerance {tolerance} must be in (0, 1) and points from {fewest} to {most} a range "
            "that starts at 1 or more"
        )
    with torch.no_grad():
        first, last = outputs(torch.stack([start, end]))
    points = fewest
    while True:
        parts = _mean_gradient(outputs, start, end, points) * (end - start)
        if not bool(torch.stack([parts.sum(1), first, last]).isfinite().all()):
            raise ValueError(
                "the outputs or their gradients are not finite between the two profiles; check the "
                "weights of the meta-nets and the profiles"
            )
        gap = _gap(parts, last - first)
        if gap <= tolerance or 2 * points > most:
            return Integrated(parts, first, last, points, gap)
        points *= 2


def _mean_gradient(
    outputs: Callable[[Tensor], Tensor], start: Tensor, end: Tensor, points: int
) -> Tensor:
    """Return the mean over the midpoints of equal pieces of the path, shape (O, E)."""
    along = (torch.arange(points, dtype=start.dtype, device=start.device) + 0.5) / points
    path = start + along[:, None] * (end - start)
    # A shift common to all points: its gradient is the sum over them.
    shift = torch.zeros_like(start).requires_grad_()
    with torch.enable_grad():
        means = outputs(path + shift).mean(0)
        rows = [
            torch.autograd.grad(one, shift, retain_graph=True, materialize_grads=True)[0]
            for one in means
        ]
    return torch.stack(rows) if rows else start.new_zeros(0, len(start))


def _gap(parts: Tensor, change: Tensor) -> float:
    missing = (parts.sum(1) - change).abs()
    size = torch.maximum(parts.abs().sum(1), change.abs())
    return float(torch.where(size > LEAST, missing / size, 0.0).max()) if len(size) else 0.0


@dataclass(frozen=True)
class Attribution:
    """What moved one client's hyperparameters away from those of a typical client.

    B norms, L layers, P parameter tensors, E = B + 2L profile entries in the order divergence of
    every norm, then mean and standard deviation of every layer's input in turn.

    Parameters
    ----------
    hyperparams, typical
        What the nets write for the client's and for the typical profile, within the bounds.
    mix, typical_mix
        Shape (B,): the mixes before their bounds.
    rate, typical_rate
        Shape (P,): the rates before their bounds, as logarithms if ``scale`` is log.
    mix_parts, rate_parts
        Shapes (B, E) and (P, E): what each entry added; the rows add up to ``mix - typical_mix``
        and ``rate - typical_rate``.
    scale
        log: a part of a rate is the logarithm of a factor. linear: it is a learning rate.
    points, gap
        See :class:`Integrated`.
    """

    hyperparams: Hyperparams
    typical: Hyperparams
    mix: Tensor
    typical_mix: Tensor
    rate: Tensor
    typical_rate: Tensor
    mix_parts: Tensor
    rate_parts: Tensor
    scale: Literal["log", "linear"]
    points: int
    gap: float


def attribute(
    metanets: MetaNets, profile: Profile, typical: Profile, *, tolerance: float = TOLERANCE
) -> Attribution:
    """Attribute a client's hyperparameters to the entries of its profile.

    Parameters
    ----------
    metanets
        Learned meta-nets; they are only read. Everything is computed by a copy in float64.
    profile
        The client's profile.
    typical
        The profile that it is compared with, e.g. :func:`median_profile` of other clients.
    tolerance
        Wanted bound of :attr:`Attribution.gap`.

    Raises
    ------
    ValueError
        If the nets leave the profile out (``constant``), a profile is another model's or one of a
        cohort, or something is not finite.
    """
    if metanets.config.constant:
        raise ValueError(
            "these meta-nets write the same hyperparameters for every client: no profile moves "
            "them; explain meta-nets that read profiles"
        )
    if profile.divergence.dim() != 1 or typical.divergence.dim() != 1:
        raise ValueError("attribute explains one client against one profile; index the cohort")
    nets = copy.deepcopy(metanets).double().cpu().eval()
    norms = len(nets.sites.norms)

    def outputs(read: Tensor) -> Tensor:
        return torch.cat(nets.unbounded(read[..., :norms], read[..., norms:]), dim=-1)

    with torch.no_grad():
        here, there = nets(profile), nets(typical)
        end, start = (torch.cat(nets.prepared(p), dim=-1) for p in (profile, typical))
    found = integrated_gradients(outputs, start, end, tolerance=tolerance)
    return Attribution(
        hyperparams=here,
        typical=there,
        mix=found.end[:norms],
        typical_mix=found.start[:norms],
        rate=found.end[norms:],
        typical_rate=found.start[norms:],
        mix_parts=found.parts[:norms],
        rate_parts=found.parts[norms:],
        scale="linear" if nets.config.form == "published" else "log",
        points=found.points,
        gap=found.gap,
    )


def median_profile(profiles: Sequence[Profile]) -> Profile:
    """Return the profile of a typical client: the median of every entry over clients.

    A mean would follow the one client whose dead channel makes thousands of nats. The median is
    also the same whether divergences are looked at in nats or, as the nets read them, in their
    logarithms (up to the midpoint between the middle two of an even number).

    Raises
    ------
    ValueError
        If there is no profile, or they belong to different models.
    """
    if not profiles:
        raise ValueError("there is no profile to take the median of; give at least one")
    if any(p.sites != profiles[0].sites for p in profiles):
        raise ValueError("the profiles belong to different models; give those of one model")
    many = Profile.stack([Profile(*_on_cpu(p), p.num_examples, p.sites) for p in profiles])
    return Profile(
        _median(many.divergence),
        _median(many.moments),
        round(many.num_examples / len(profiles)),
        many.sites,
    )


def _median(values: Tensor) -> Tensor:
    """Return the median over the first dimension, also of no entries at all."""
    ordered = values.sort(dim=0).values
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2


def _on_cpu(profile: Profile) -> tuple[Tensor, Tensor]:
    return profile.divergence.detach().double().cpu(), profile.moments.detach().double().cpu()
