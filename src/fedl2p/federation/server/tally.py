"""The answers of one round: checked, counted, and added to the mean in the order of names."""

from __future__ import annotations

import logging
from dataclasses import replace
from math import nan
from statistics import median

from fedl2p.federation.messages import Answer, Question, one_line
from fedl2p.federation.round_records import BYTES, RoundRecord
from fedl2p.federation.server.aggregation import Mean
from fedl2p.federation.server.answer_checks import objection, overweight
from fedl2p.federation.settings import Rounds
from fedl2p.method import Update

log = logging.getLogger("fedl2p")


class Tally:
    """The answers of one round, as they come.

    An answer that comes before its turn waits. The weights that clients elsewhere state are
    compared with one another, so there all answers wait until the last has come.

    Parameters
    ----------
    question
        What was asked.
    rounds
        The stage's settings.
    mean
        What becomes of the updates; None where none come back.
    trusted
        Whether the answers are those of this package's own nodes, which have checked them.

    Attributes
    ----------
    failures
        Clients without a usable answer, and why.
    """

    def __init__(
        self, question: Question, rounds: Rounds, mean: Mean | None, *, trusted: bool
    ) -> None:
        self._question, self._rounds, self.mean, self._trusted = question, rounds, mean, trusted
        self._sent = question.state if question.action == "train" else {}
        # No weight counts under these, so none can be too large.
        self._equal = rounds.weighting == "clients"
        unweighted = rounds.privacy.central or rounds.robust != "none" or self._equal
        self._compares = not (trusted or unweighted)
        self._order = iter(sorted(question.seeds))
        self._next = next(self._order, None)
        self._waiting: dict[str, Answer] = {}
        self._compared: list[Update] = []
        self._good: list[tuple[float, dict[str, float]]] = []
        self.failures: dict[str, str] = {}
        self._bytes = dict.fromkeys(BYTES, 0)

    def add(self, answer: Answer) -> None:
        """Take an answer, and with it those that have waited for it."""
        for name in self._bytes:
            self._bytes[name] += getattr(answer, name)
        self._waiting[answer.client] = answer
        while self._next is not None and self._next in self._waiting:
            self._check(self._waiting.pop(self._next))
            self._next = next(self._order, None)

    def close(self) -> None:
        """Add the updates that have waited for the last one."""
        assert self._next is None
        assert not self._waiting
        heavy = overweight({update.client: update.weight for update in self._compared})
        self._fail(heavy)
        compared, self._compared = self._compared, []
        for update in compared:
            if update.client not in heavy:
                self._count(update)

    @property
    def good(self) -> int:
        """How many updates were added."""
        return len(self._good)

    @property
    def stage(self) -> str:
        """The stage that the round is part of."""
        return self._question.stage

    @property
    def asked(self) -> int:
        """How many clients were asked."""
        return len(self._question.seeds)

    @property
    def loss(self) -> float:
        """Loss of the state that was sent: weighted mean or, under a robust rule, median."""
        return self._typical("loss")

    def record(self, *, seconds: float) -> RoundRecord:
        """Return the round's record."""
        return RoundRecord(
            stage=self.stage,
            round=self._question.round,
            clients=self.asked,
            loss=self.loss,
            accuracy=self._typical("accuracy"),
            seconds=seconds,
            failures=len(self.failures),
            reasons=dict(sorted(self.failures.items())),
            **self._bytes,
        )

    def _check(self, answer: Answer) -> None:
        update, reason = answer.update, answer.failure
        if reason is None:
            assert update is not None
            if not self._trusted:
                reason = objection(update, sent=self._sent)
            if self._rounds.privacy.mechanism == "local" and update.metrics:
                reason = "its answer has metrics, so it was not made under local privacy"
        if reason is not None or update is None:
            self._fail({answer.client: one_line(reason or "")})
        elif self._compares:
            self._compared.append(update)
        else:
            self._count(update)

    def _count(self, update: Update) -> None:
        if self._equal:
            update = replace(update, weight=1.0)
        self._good.append((update.weight, update.metrics))
        if self.mean is not None:
            self.mean.add(update)

    def _fail(self, reasons: dict[str, str]) -> None:
        self.failures |= reasons
        for name, reason in reasons.items():
            number = self._question.round
            log.warning("%s, round %d: client %s failed: %s", self.stage, number, name, reason)

    def _typical(self, metric: str) -> float:
        """Return the mean of a metric over the answers that have it; NaN if none has.

        A client may state any loss, and the choice of the best round must not be its own: under a
        robust rule it is the median, whatever the weights.
        """
        pairs = [(weight, metrics[metric]) for weight, metrics in self._good if metric in metrics]
        if not pairs:
            return nan
        if self._rounds.robust != "none":
            return median(value for _, value in pairs)
        return sum(weight * value for weight, value in pairs) / sum(weight for weight, _ in pairs)
