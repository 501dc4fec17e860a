"""A client's answer after all checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedl2p.method import State


@dataclass(frozen=True)
class Reply:
    """A client's accepted answer: its tensors, its weight and its metrics."""

    client: str
    shared: State
    weight: float
    metrics: Mapping[str, float]
