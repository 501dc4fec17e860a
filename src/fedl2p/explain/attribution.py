"""Which entries of a client's profile moved its hyperparameters, and by how much.

Integrated gradients (Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks", ICML 2017,
section 3): along the straight path from a typical profile to the client's, the gradient of an
output with respect to an entry, times the entry's difference. The attributions of one output add up
to its difference (completeness); how far they do not is measured, and bounds the numerical error.

The path is straight in what the nets read (``MetaNets.prepared``), for example in the logarithm of
a divergence, so that a dead channel of thousands of nats does not use up the path. Rates are
explained in log space where the nets write them so: an attribution is then a factor on the rate.
All outputs are explained before their bounds; a bound would hide what moved them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.metanets import MetaNets
from fedl2p.core.profiles import Profile

STEPS = 1024
"""Points of the path. A power of two: Captum keeps the weight of a point, 1 / STEPS, in float32."""
ROWS = 8192
"""Most inputs in memory at once."""
LEAST = 1e-12
"""Movement below this is rounding, in float64: there is nothing to explain."""


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """What moved one client's hyperparameters away from those of a typical client.

    B norms, P parameter tensors and L layers give O = B + P outputs, the mixes before the rates,
    and E = B + 2L profile entries: the divergence of every norm, then mean and standard deviation
    of every layer's input in turn.

    Parameters
    ----------
    hyperparams, typical
        What the nets write for the client's and for the typical profile, within the bounds.
    outputs, typical_outputs
        Shape (O,): the same before the bounds, rates as logarithms if ``log_rates``.
    attributions
        Shape (O, E): what each entry added to each output. A row adds up to the difference of
        ``outputs`` and ``typical_outputs``.
    log_rates
        Whether the attribution of a rate is the logarithm of a factor on it.
    gap
        How far the rows do not add up: the largest over the outputs, as a fraction of the sum of
        the output's absolute attributions.
    """

    hyperparams: Hyperparams
    typical: Hyperparams
    outputs: Tensor
    typical_outputs: Tensor
    attributions: Tensor
    log_rates: bool
    gap: float


def integrated_gradients(
    function: Callable[[Tensor], Tensor], start: Tensor, end: Tensor
) -> tuple[Tensor, float]:
    """Return the integrated gradients of a function's outputs, and how far they do not add up.

    Parameters
    ----------
    function
        Maps inputs (N, E) to outputs (N, O), row by row; differentiable almost everywhere.
    start, end
        The ends of the straight path, shape (E,).

    Returns
    -------
    attributions
        Shape (O, E).
    gap
        The largest over the outputs, as a fraction of the sum of absolute attributions.

    Raises
    ------
    ValueError
        If an output or its gradient is not finite.
    ModuleNotFoundError
        If Captum is not installed.
    """
    from captum.attr import IntegratedGradients

    count = function(start[None]).shape[1]
    attributions, missing = IntegratedGradients(function).attribute(
        end.expand(count, -1),
        start.expand(count, -1),
        target=torch.arange(count),
        n_steps=STEPS,
        method="riemann_middle",
        internal_batch_size=max(ROWS, count),
        return_convergence_delta=True,
    )
    attributions, missing = attributions.detach(), missing.detach().abs()
    if not bool(torch.cat([attributions.flatten(), missing]).isfinite().all()):
        raise ValueError(
            "the outputs or their gradients are not finite between the two profiles; check the "
            "weights of the meta-nets and the profiles"
        )
    movement = attributions.abs().sum(1)
    size = torch.maximum(movement, missing)
    return attributions, float(torch.where(size > LEAST, missing / size, 0.0).max())


def attribute(metanets: MetaNets, profile: Profile, typical: Profile) -> Attribution:
    """Attribute a client's hyperparameters to the entries of its profile.

    Parameters
    ----------
    metanets
        Learned meta-nets; they are only read. Everything is computed by a copy in float64.
    profile
        The client's profile.
    typical
        The profile that it is compared with, e.g. :func:`median_profile` of other clients.

    Raises
    ------
    ValueError
        If the nets leave the profile out (``constant``), a profile is another model's or one of a
        stack, or something is not finite.
    """
    if metanets.config.constant:
        raise ValueError(
            "these meta-nets write the same hyperparameters for every client: no profile moves "
            "them; explain meta-nets that read profiles"
        )
    if profile.divergence.dim() != 1 or typical.divergence.dim() != 1:
        raise ValueError("attribute explains one client against one profile; index the stack")
    nets = copy.deepcopy(metanets).double().cpu().eval()
    norms = len(nets.sites.norms)

    def outputs(inputs: Tensor) -> Tensor:
        return torch.cat(nets.unbounded(inputs[..., :norms], inputs[..., norms:]), dim=-1)

    with torch.no_grad():
        hyperparams, typical_hyperparams = nets(profile), nets(typical)
        end, start = (torch.cat(nets.prepared(p), dim=-1) for p in (profile, typical))
        ours, typical_outputs = outputs(torch.stack([end, start]))
    attributions, gap = integrated_gradients(outputs, start, end)
    return Attribution(
        hyperparams=hyperparams,
        typical=typical_hyperparams,
        outputs=ours,
        typical_outputs=typical_outputs,
        attributions=attributions,
        log_rates=nets.config.form != "published",
        gap=gap,
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
