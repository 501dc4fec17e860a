"""Nets as users have them, by name."""

from __future__ import annotations

from foreign.nets import (
    attention,
    convolutional,
    dtypes,
    randomness,
    recurrent,
    stateful,
    structure,
)
from foreign.nets.case import Case

CASES: dict[str, Case] = {
    **convolutional.CASES,
    **recurrent.CASES,
    **attention.CASES,
    **structure.CASES,
    **stateful.CASES,
    **randomness.CASES,
    **dtypes.CASES,
}
