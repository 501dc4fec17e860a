"""What the processes of fedl2p set before torch loads: idle threads sleep, freed memory is kept.

torch's OpenMP threads spin while they wait for one another. On a machine whose cores others use
too, a thread spins for one that has no core, and everything takes three to seven times as long.

glibc gives memory back to the system as soon as a few MB are free, and the next step of training
then gets it page by page. It gives back later the larger the blocks are that a program has freed;
the thresholds here are the largest that it comes to by that rule.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import MutableMapping

# GOMP_SPINCOUNT is read by libgomp, which torch brings along, OMP_WAIT_POLICY by every OpenMP.
_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}

_MMAP_BYTES = 32 * 2**20
_TRIM_BYTES = 2 * _MMAP_BYTES
_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(_MMAP_BYTES),
    "MALLOC_TRIM_THRESHOLD_": str(_TRIM_BYTES),
}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h

VARIABLES = (*_THREADS, *_MEMORY)
"""Names of the environment's variables that may be set."""


def prepare_children(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables for processes that start from now on, but for what the user chose."""
    if environment.keys().isdisjoint(_THREADS):
        environment.update(_THREADS)
    if not _memory_is_chosen(environment):
        environment.update(_MEMORY)


def prepare_process() -> None:
    """Set everything for this process and its children, but for what the user chose.

    Before torch is imported: OpenMP reads its variables once.
    """
    keep = not _memory_is_chosen(os.environ)
    prepare_children()
    if keep and sys.platform == "linux":  # glibc has read its variables when the process began
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
            mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)


def _memory_is_chosen(environment: MutableMapping[str, str]) -> bool:
    tunables = environment.get("GLIBC_TUNABLES", "")
    return "glibc.malloc." in tunables or not environment.keys().isdisjoint(_MEMORY)
