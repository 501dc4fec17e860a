"""What a worker of Ray's may use, and how many of them there are."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Ray:
    """How the clients of a study share this machine under Ray; no result depends on it.

    A worker answers the clients of one call at a time (the study's ``cohort``) and keeps the model
    and the data for the next ones.

    Parameters
    ----------
    cpus_per_worker
        CPUs that a worker occupies, > 0; a fraction puts several workers on one CPU. A worker
        computes with as many threads, rounded down but at least 1.
    gpus_per_worker
        The same for GPUs, >= 0; with 0 clients compute on the CPU. 0.5 puts two workers on a GPU,
        whose memory they must share.
    workers
        How many workers; 0 for as many as fit.
    """

    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    workers: int = 0

    def __post_init__(self) -> None:
        cpus, gpus = self.cpus_per_worker, self.gpus_per_worker
        if not (math.isfinite(cpus) and cpus > 0):
            raise ValueError(f"ray.cpus_per_worker is {cpus!r}, but must be finite and > 0")
        if not (math.isfinite(gpus) and gpus >= 0):
            raise ValueError(f"ray.gpus_per_worker is {gpus!r}, but must be finite and >= 0")
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(
                f"ray.gpus_per_worker is {gpus!r}, but above 1 it must be a whole number"
            )
        if self.workers < 0:
            raise ValueError(
                f"ray.workers is {self.workers}, but must be 0 (as many as fit) or more"
            )

    @property
    def threads(self) -> int:
        """Threads of one worker."""
        return max(1, int(self.cpus_per_worker))

    def fitting(self, *, cpus: int, gpus: int) -> int:
        """Return how many workers to start on a machine.

        Raises
        ------
        ValueError
            If none fits, or fewer than asked for.
        """
        fit = int(cpus / self.cpus_per_worker)
        if self.gpus_per_worker:
            fit = min(fit, int(gpus / self.gpus_per_worker))
        if fit < max(1, self.workers):
            raise ValueError(
                f"{max(1, self.workers)} workers of {self.cpus_per_worker:g} CPUs and "
                f"{self.gpus_per_worker:g} GPUs do not fit into {cpus} CPUs and {gpus} GPUs; give "
                "ray.cpus_per_worker, ray.gpus_per_worker or ray.workers smaller values"
            )
        return self.workers or fit


def available_cpus() -> int:
    """Return the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
