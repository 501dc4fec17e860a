"""Settings of federated rounds, and of the workers that may share their clients."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from fedl2p.core.settings import check_whole
from fedl2p.federation.privacy.settings import Privacy

Strategy = Literal["fedavg", "fedavgm", "fedadagrad", "fedadam"]

Robust = Literal[
    "none", "fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan", "normclipping"
]

Weighting = Literal["examples", "clients"]


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How many rounds, with whom, and how their answers become the next state.

    Parameters
    ----------
    rounds
        Most rounds; 0 for none.
    clients_per_round
        Clients drawn from the seen ones in each round; 0 for all of them.
    patience
        Rounds without a lower validation loss before stopping early; 0 for never.
    keep
        Which state is the result: best (the lowest validation loss), last, or average (a moving
        average of the states, which a noisy loss cannot mislead; the last pass judges it).
    average_decay
        How much of the average stays per round, in [0, 1); 0.9 averages about the last ten states.
    weighting
        What an answer counts in means, of states and of validation losses: examples (as many as the
        client's, published; in learning meta-nets those of its validation part) or clients (each
        the same, so that those with little data are learned for too).
    strategy
        How answers become the next state. fedavg: their mean, see weighting. The others step from
        the old state, with the old state minus that mean as the gradient (Reddi et al., ICLR 2021):
        fedavgm: SGD with momentum; fedadagrad: Adagrad; fedadam: Adam.
    robust
        What takes the place of the mean, so that some hostile answers do no harm; none looks at a
        client's weight. none; fedmedian and fedtrimmedavg: entry by entry (Yin et al., ICML 2018);
        krum, multikrum: the answers closest to their neighbours (Blanchard et al., NeurIPS 2017);
        bulyan: both (El Mhamdi et al., ICML 2018); normclipping: the mean of updates shortened to
        clip_norm (Sun et al., 2019, arXiv 1911.07963). The strategy goes on from there.
    server_rate
        Learning rate of the server's optimizer; 1 with fedavgm and server_beta1 0 is fedavg.
    server_schedule
        How the server's rate changes: constant, or cosine (from server_rate in the first round
        down towards 0 after the last).
    server_beta1
        Momentum of fedavgm and decay rate of fedadam's first moment, in [0, 1).
    server_beta2
        Decay rate of fedadam's second moment, in [0, 1).
    server_tau
        Epsilon of fedadagrad and fedadam, which sets how far they adapt; > 0. Adam's usual epsilon
        is 1e-8, the published value for federated averages 1e-3.
    trim
        Fraction of answers that fedtrimmedavg cuts off at each end, in [0, 0.5).
    hostile
        Hostile answers that krum, multikrum and bulyan should bear, a number. krum and multikrum
        need 2 hostile + 3 good answers in a round, bulyan 4 hostile + 3.
    clip_norm
        Largest L2 norm of a client's update (its answer minus the state), over all tensors; longer
        ones are shortened first, under whatever robust says. 0 for no bound; under normclipping
        for the median norm of the round's updates.
    min_clients
        Fewest good answers that make a new state; with fewer the old one stays.
    give_up
        Rounds in a row without a new state after which the run ends with an error; it can be
        resumed, and then has as many again.
    privacy
        Differential privacy.
    """

    rounds: int = 20
    clients_per_round: int = 0
    patience: int = 0
    keep: Literal["best", "last", "average"] = "best"
    average_decay: float = 0.9
    weighting: Weighting = "examples"
    strategy: Strategy = "fedavg"
    server_rate: float = 0.1
    server_schedule: Literal["constant", "cosine"] = "constant"
    server_beta1: float = 0.9
    server_beta2: float = 0.99
    server_tau: float = 1e-3
    robust: Robust = "none"
    trim: float = 0.2
    hostile: int = 1
    clip_norm: float = 0.0
    min_clients: int = 1
    give_up: int = 3
    privacy: Privacy = field(default_factory=Privacy)

    def __post_init__(self) -> None:
        for name in ("rounds", "clients_per_round", "patience", "hostile"):
            check_whole(0, **{name: getattr(self, name)})
        check_whole(1, min_clients=self.min_clients, give_up=self.give_up)
        for name in ("server_rate", "server_tau"):
            value = getattr(self, name)
            _need(math.isfinite(value) and value > 0, name, value, "finite and > 0")
        for name in ("server_beta1", "server_beta2"):
            _need(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        _need(0 <= self.trim < 0.5, "trim", self.trim, "in [0, 0.5)")
        _need(
            math.isfinite(self.clip_norm) and self.clip_norm >= 0,
            *("clip_norm", self.clip_norm, "finite and >= 0"),
        )
        _need(
            self.keep in ("best", "last", "average"),
            "keep",
            self.keep,
            "'best', 'last' or 'average'",
        )
        _need(0 <= self.average_decay < 1, "average_decay", self.average_decay, "in [0, 1)")
        schedules = ("constant", "cosine")
        wanted = f"one of {', '.join(schedules)}"
        _need(self.server_schedule in schedules, "server_schedule", self.server_schedule, wanted)
        kinds = (("strategy", Strategy), ("robust", Robust), ("weighting", Weighting))
        for name, kind in kinds:
            value, known = getattr(self, name), get_args(kind)
            _need(value in known, name, value, f"one of {', '.join(known)}")
        if self.privacy.on:
            self._check_private()

    def _check_private(self) -> None:
        """Refuse what differential privacy does not cover."""
        if self.keep == "best" or self.patience:
            name, value = ("keep", "best") if self.keep == "best" else ("patience", self.patience)
            raise ValueError(
                f"{name} is {value!r}, which chooses a state by the clients' losses, and privacy "
                "does not cover these; use keep 'last' or 'average', and patience 0"
            )
        if self.privacy.central and self.robust != "none":
            raise ValueError(
                f"robust is {self.robust!r}, but what one client can change there is not bounded "
                "by its clipped update; under central privacy use 'none'"
            )
        if self.privacy.central and self.clip_norm:
            raise ValueError(
                f"clip_norm is {self.clip_norm:g}, but under central privacy privacy.clip is the "
                "bound; leave clip_norm at 0"
            )

    @property
    def fewest(self) -> int:
        """Fewest good answers of which a new state can be made."""
        match self.robust:
            case "krum" | "multikrum":
                needed = 2 * self.hostile + 3
            case "bulyan":
                needed = 4 * self.hostile + 3
            case "fedmedian" | "normclipping":
                needed = 3
            case "fedtrimmedavg" if self.trim:
                needed = math.ceil(1 / self.trim)
                while int(self.trim * needed) < 1:  # Flower cuts off that many at each end
                    needed += 1
            case _:
                needed = 1
        return max(needed, self.min_clients)

    def cohort(self, seen: int) -> int:
        """Return how many clients a round has (under central privacy on average), of so many.

        Raises
        ------
        ValueError
            If there are too few clients for these settings.
        """
        if self.clients_per_round > seen:
            raise ValueError(
                f"clients_per_round is {self.clients_per_round}, but there are only "
                f"{seen} seen clients; use at most these, or 0 for all"
            )
        size = self.clients_per_round or seen
        if self.robust != "none" and size < self.fewest:
            raise ValueError(
                f"robust {self.robust!r} needs {self.fewest} good answers in a round"
                f"{self._because}, but a round has {size} clients; ask more, or use 'fedmedian'"
            )
        if self.robust == "fedtrimmedavg" and not self.trim:
            raise ValueError("trim is 0, so that fedtrimmedavg bears nobody; use e.g. 0.2")
        return size

    @property
    def _because(self) -> str:
        if self.min_clients == self.fewest:
            return f" (min_clients is {self.min_clients})"
        if self.robust == "fedtrimmedavg":
            return f" (trim is {self.trim:g})"
        if self.robust in ("krum", "multikrum", "bulyan"):
            return f" (hostile is {self.hostile})"
        return ""

    def server_rate_at(self, step: int) -> float:
        """Return the server's rate at its step ``step``, counted from 0."""
        if self.server_schedule == "constant" or not self.rounds:
            return self.server_rate
        return self.server_rate * (1 + math.cos(math.pi * min(step / self.rounds, 1.0))) / 2


TIMEOUT = 600.0
"""Seconds to wait for the replies to one question, if nobody says otherwise."""

GRACE = 60.0
"""Seconds that the others have when half of the nodes have answered, if nobody says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Ray:
    """How the clients of a study share this machine under Ray; no result depends on it.

    A worker answers one stack of clients at a time and keeps the model and the data for the next.

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


def _need(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}, but must be {wanted}")


DEFAULT_ROUNDS = Rounds(
    rounds=30,
    strategy="fedadam",
    server_rate=0.0075,
    server_schedule="cosine",
    server_tau=1e-8,
    keep="last",
)
"""Of learning, in recipes and in ``learn``: clients send clipped hypergradients, the server takes
Adam steps."""
