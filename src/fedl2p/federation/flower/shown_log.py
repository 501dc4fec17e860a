"""What the server does, where ``flwr log`` shows it."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence

from fedl2p.federation.listeners import Listener
from fedl2p.federation.round_records import RoundRecord

log = logging.getLogger("fedl2p")


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Show the package's log on stderr, where ``flwr log`` and the SuperLink take it from."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("fedl2p: %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


class LogListener(Listener):
    """Writes each round to the log."""

    def on_start(self, stage: str, rounds: int, records: Sequence[RoundRecord]) -> None:
        """Say what begins."""
        log.info("%s: %d rounds, %d of them done", stage, rounds, len(records))

    def on_round(self, record: RoundRecord) -> None:
        """Say what came of a round."""
        content = {
            "clients": record.clients,
            "failures": record.failures,
            "loss": round(record.loss, 4),
            "accuracy": round(record.accuracy, 4),
            "seconds": round(record.seconds, 1),
        }
        log.info("%s, round %d: %s", record.stage, record.round, json.dumps(content))

    def on_end(self, stage: str) -> None:
        """Say nothing: the last round has."""
