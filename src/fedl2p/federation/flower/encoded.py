"""Clients whose questions and answers are encoded and decoded as on a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from flwr.app import RecordDict

from fedl2p.federation.clients.in_process import InProcess
from fedl2p.federation.flower import records
from fedl2p.federation.messages import Answer, Question
from fedl2p.method import State


class Encoded:
    """The clients of this process, by way of Flower's records: what travels loses no bit.

    Parameters
    ----------
    clients
        Who answers.
    """

    simulated = True

    def __init__(self, clients: InProcess) -> None:
        self.clients = clients

    def ask(self, question: Question) -> Iterator[Answer]:
        """Yield one answer per client."""
        state = records.decode_state(records.encode_state(question.state))
        for answer in self.clients.ask(replace(question, state=state)):
            content = records.encode_answer(answer)
            if isinstance(content, RecordDict):
                decoded = records.decode_answer(question, answer.client, content)
                answer = replace(answer, update=decoded.update, outcome=decoded.outcome)
            yield answer

    def kept(self, method: str) -> dict[str, State]:
        """Return what clients keep for a method."""
        return self.clients.kept(method)

    def restore(self, method: str, kept: Mapping[str, State]) -> None:
        """Set what clients keep for a method."""
        self.clients.restore(method, kept)

    def has_model(self, key: str) -> list[str] | None:
        """Return the clients that have a model."""
        return self.clients.has_model(key)

    def set_has_model(self, key: str, names: Sequence[str] | None) -> None:
        """Set which clients have a model."""
        self.clients.set_has_model(key, names)

    def close(self) -> None:
        """Do nothing: nothing was started."""
