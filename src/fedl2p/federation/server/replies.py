"""A client's answer after all checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Reply:
    """A client's accepted answer: its tensors, its weight and its metrics.

    Its tensors may lie in a file until they are asked for.
    """

    client: str
    shared: Mapping[str, Tensor]
    weight: float
    metrics: Mapping[str, float]
