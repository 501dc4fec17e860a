"""The objective that a model is trained and evaluated on, recorded on the model itself.

The record goes along when the model is copied, so that every method uses it. It is not part of the
weights, and personalized models do not carry it.
"""

from __future__ import annotations

from typing import cast

from torch import nn

from fedl2p.core.functional.copies import duplicate
from fedl2p.core.objective import Objective

_ATTRIBUTE = "_fedl2p_objective"
_DEFAULT = Objective()


def with_objective(model: nn.Module, objective: Objective) -> nn.Module:
    """Return a model with an objective recorded on it: a copy, unless it is recorded already."""
    if objective_of(model) == objective:
        return model
    copied = duplicate(model)
    copied.__dict__[_ATTRIBUTE] = objective
    return copied


def objective_of(model: nn.Module) -> Objective:
    """Return the objective that is recorded on a model; cross-entropy without a record."""
    return cast(Objective, model.__dict__.get(_ATTRIBUTE, _DEFAULT))


def remove_objective(model: nn.Module) -> None:
    """Remove the record from a model that leaves this package."""
    model.__dict__.pop(_ATTRIBUTE, None)
