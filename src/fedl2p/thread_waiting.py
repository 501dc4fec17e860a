"""How idle threads of the process wait: asleep, not spinning.

torch's OpenMP threads spin while they wait for one another. On a machine whose cores others use
too, a thread spins for one that has no core, and everything takes three to seven times as long.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# GOMP_SPINCOUNT is read by libgomp, which torch brings along, OMP_WAIT_POLICY by every OpenMP.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


def wait_asleep(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let the threads of this process and of its children wait asleep, unless the user chose.

    It has an effect only before torch is imported: OpenMP reads the variables once.
    """
    if environment.keys().isdisjoint(PASSIVE):
        environment.update(PASSIVE)
