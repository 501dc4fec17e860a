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
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedl2p.core.metanets import MetaNets
from fedl2p.core.profile_groups import GROUPS
from fedl2p.core.profiles import Profile
from fedl2p.core.settings import ProfileGroup

STEPS = 1024
"""Points of the path. A power of two: Captum keeps the weight of a point, 1 / STEPS, in float32."""
ROWS = 8192
"""Most inputs in memory at once."""
LEAST = 1e-12
"""Movement below this is rounding, in float64: there is nothing to explain."""


@dataclass(frozen=True)
class Entry:
    """One entry of a profile, e.g. ``divergence of norm1``, of the client and of a typical one."""

    name: str
    value: float
    typical: float
    unit: str = ""


@dataclass(frozen=True)
class Explained:
    """One hyperparameter, or the mean of one kind, and its attributions.

    Parameters
    ----------
    kind, name
        mix and a norm layer, or rate and a parameter tensor.
    log
        Whether outputs and attributions are natural logarithms of rates.
    value, typical
        Of the client and of the typical client, within the bounds.
    output, typical_output
        Of the meta-nets, before the bounds.
    attributions
        What each profile entry added to ``output - typical_output``.
    """

    kind: Literal["mix", "rate"]
    name: str
    log: bool
    value: float
    typical: float
    output: float
    typical_output: float
    attributions: Sequence[float]

    @property
    def change(self) -> float:
        """The difference that the attributions add up to."""
        return self.output - self.typical_output

    @property
    def movement(self) -> float:
        """The sum of the absolute attributions."""
        return math.fsum(map(abs, self.attributions))

    @property
    def at_bound(self) -> bool:
        """Whether the client's value is not what the nets put out, but a bound."""
        output = self.unbounded(self.output)
        return not math.isclose(self.value, output, rel_tol=1e-9, abs_tol=1e-12)

    def unbounded(self, output: float) -> float:
        """Return an output as a mix or a learning rate."""
        if not self.log:
            return output
        return math.exp(output) if output < 700 else math.inf


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """What moved one client's hyperparameters away from those of a typical client.

    Parameters
    ----------
    entries
        What the nets read of the profile, group by group (:mod:`fedl2p.core.profile_groups`).
    mixes, rates
        One per norm and per parameter tensor; their attributions are in the order of the entries.
    gap
        How far attributions do not add up: the largest over the hyperparameters, as a fraction of
        the sum of its absolute attributions.
    """

    entries: Sequence[Entry]
    mixes: Sequence[Explained]
    rates: Sequence[Explained]
    gap: float


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
    sites = nets.sites

    def outputs(inputs: Tensor) -> Tensor:
        return torch.cat(nets.unbounded(inputs), dim=-1)

    with torch.no_grad():
        values = [torch.cat([h.mix, h.rate]) for h in (nets(profile), nets(typical))]
        end, start = (nets.prepared(p) for p in (profile, typical))
        values += outputs(torch.stack([end, start]))
    attributions, gap = integrated_gradients(outputs, start, end)
    rows = zip(*(column.tolist() for column in (*values, attributions)), strict=True)
    log = nets.config.form != "published"
    return Attribution(
        entries=_entries(nets.config.groups, profile, typical),
        mixes=[Explained("mix", name, False, *next(rows)) for name in sites.norms],
        rates=[Explained("rate", name, log, *next(rows)) for name in sites.params],
        gap=gap,
    )


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
        See :class:`Attribution`.

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
    size = torch.maximum(attributions.abs().sum(1), missing)
    return attributions, float(torch.where(size > LEAST, missing / size, 0.0).max())


def median_profile(profiles: Sequence[Profile]) -> Profile:
    """Return the profile of a typical client: the median of every entry over clients.

    A mean would follow the one client whose dead channel makes thousands of nats.

    Raises
    ------
    ValueError
        If there is no profile, or they belong to different models or have different groups.
    """
    if not profiles:
        raise ValueError("there is no profile to take the median of; give at least one")
    if any(p.sites != profiles[0].sites for p in profiles):
        raise ValueError("the profiles belong to different models; give those of one model")
    tensors = [p.tensors() for p in profiles]
    if any(t.keys() != tensors[0].keys() for t in tensors):
        raise ValueError("the profiles have different groups; make all of them with the same ones")
    return Profile(
        **{field: _median([t[field] for t in tensors]) for field in tensors[0]},
        num_examples=round(sum(p.num_examples for p in profiles) / len(profiles)),
        sites=profiles[0].sites,
    )


def _median(many: Sequence[Tensor]) -> Tensor:
    """Return the median in float64, the mean of the middle two of an even number."""
    values = torch.stack([one.detach().double().cpu() for one in many]).sort(dim=0).values
    return (values[(len(many) - 1) // 2] + values[len(many) // 2]) / 2


def _entries(groups: Sequence[ProfileGroup], profile: Profile, typical: Profile) -> list[Entry]:
    entries = []
    for group in groups:
        names = GROUPS[group].names(profile.sites)
        values = (p.entries(group).tolist() for p in (profile, typical))
        for i, (name, value, other) in enumerate(zip(names, *values, strict=True)):
            entries.append(Entry(name, value, other, GROUPS[group].unit(i)))
    return entries
