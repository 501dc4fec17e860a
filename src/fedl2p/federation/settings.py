"""The settings of one stage of federated rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Strategy = Literal[
    "fedavg", "fedadam", "fedyogi", "fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan"
]

SERVER_OPTIMIZERS = ("fedadam", "fedyogi")


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
    strategy
        How answers are combined. fedavg: mean weighted by examples; fedadam, fedyogi: that mean's
        difference to the old state is the gradient of a server optimizer (Reddi et al., ICLR 2021);
        fedmedian, fedtrimmedavg, krum, multikrum, bulyan: bear some hostile answers.
    server_rate
        Learning rate of fedadam and fedyogi.
    server_schedule
        How the server's rate changes: constant, or cosine (from server_rate in the first round
        down towards 0 after the last).
    server_beta1
        Decay rate of the first moment in fedadam and fedyogi, in [0, 1).
    server_beta2
        Decay rate of the second moment in fedadam and fedyogi, in [0, 1).
    server_tau
        Added below the fraction's line in fedadam and fedyogi, which sets how far they adapt; > 0.
        Adam's usual epsilon is 1e-8, the published value for federated averages 1e-3.
    trim
        Fraction of answers that fedtrimmedavg cuts off at each end, in [0, 0.5).
    hostile
        Hostile answers that krum, multikrum and bulyan should bear, a number.
    weight_limit
        Largest weight of an answer, as a multiple of the median weight of the round's good answers;
        >= 1. Clients state their own weights (numbers of examples): one above this is taken for
        wrong and its answer rejected, since the average would be that client's alone. It is no
        protection from a client that lies within bounds; the strategies that look at no weight are.
    min_clients
        Fewest good answers that make a new state; with fewer the old one stays.
    give_up
        Rounds in a row without a new state after which the run ends with an error; it can be
        resumed, and then has as many again.
    """

    rounds: int = 20
    clients_per_round: int = 0
    patience: int = 0
    keep: Literal["best", "last", "average"] = "best"
    average_decay: float = 0.9
    strategy: Strategy = "fedavg"
    server_rate: float = 0.1
    server_schedule: Literal["constant", "cosine"] = "constant"
    server_beta1: float = 0.9
    server_beta2: float = 0.99
    server_tau: float = 1e-3
    trim: float = 0.2
    hostile: int = 1
    weight_limit: float = 1000.0
    min_clients: int = 1
    give_up: int = 3

    def __post_init__(self) -> None:
        for name in ("rounds", "clients_per_round", "patience", "hostile"):
            _need(getattr(self, name) >= 0, name, getattr(self, name), "a number >= 0")
        for name in ("min_clients", "give_up"):
            _need(getattr(self, name) >= 1, name, getattr(self, name), "a number >= 1")
        for name in ("server_rate", "server_tau"):
            value = getattr(self, name)
            _need(math.isfinite(value) and value > 0, name, value, "finite and > 0")
        _need(
            math.isfinite(self.weight_limit) and self.weight_limit >= 1,
            *("weight_limit", self.weight_limit, "finite and >= 1"),
        )
        for name in ("server_beta1", "server_beta2"):
            _need(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        _need(0 <= self.trim < 0.5, "trim", self.trim, "in [0, 0.5)")
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
        known = get_args(Strategy)
        _need(self.strategy in known, "strategy", self.strategy, f"one of {', '.join(known)}")

    def server_rate_at(self, step: int) -> float:
        """Return the server's rate at its step ``step``, counted from 0."""
        if self.server_schedule == "constant" or not self.rounds:
            return self.server_rate
        return self.server_rate * (1 + math.cos(math.pi * min(step / self.rounds, 1.0))) / 2


def _need(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}, but must be {wanted}")
