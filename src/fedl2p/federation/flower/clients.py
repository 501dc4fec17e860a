"""Clients on the nodes of a Flower grid: a SuperLink's, or those of Flower's simulation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedl2p.federation.flower import records, shared_nodes
from fedl2p.federation.flower.client_directory import ClientDirectory
from fedl2p.federation.messages import Answer, Question
from fedl2p.method import State


class OnFlower:
    """Asks clients by Flower messages.

    What clients keep stays on their nodes, and nodes say themselves which models they have.

    Parameters
    ----------
    grid
        The one that a ServerApp gets.
    timeout
        Seconds to wait for the answers to one question; None to wait for all. A client without an
        answer by then has failed in that round.

    Raises
    ------
    ValueError
        If ``timeout`` is not above 0.

    Notes
    -----
    Flower's grid hands over all replies of a question at once, encoded: memory must hold them. They
    are decoded one by one.
    """

    simulated = False

    def __init__(self, grid: Grid, *, timeout: float | None = None) -> None:
        self.directory = ClientDirectory(grid, timeout=timeout)

    def ask(self, question: Question) -> Iterator[Answer]:
        """Yield one answer per client, as they come.

        Raises
        ------
        ValueError
            If no node is one of the clients.
        """
        nodes = self.directory.nodes_of(question.seeds)
        encoded = _Encoded(question)
        sent = {name: Answer(client=name) for name in question.seeds}
        left = set(question.seeds)
        asked = list(question.seeds)
        for attempt in range(2):
            if not asked:
                break
            messages = {}
            for name in asked:
                has = self.directory.has_model(name, question.model.key)
                messages[name], sent[name] = encoded.message(nodes[name], sent[name], model=not has)
                self.directory.note_model(name, question.model.key, has=True)
            asked = []
            replies = shared_nodes.exchange(
                self.directory.grid,
                messages,
                shared=self.directory.shared,
                timeout=self.directory.timeout,
            )
            for name, reply in replies:
                if isinstance(reply, RecordDict):
                    answer = replace(
                        records.decode_answer(question, name, reply),
                        bytes_up=records.count_bytes(reply),
                    )
                elif reply.code != records.MODEL_UNKNOWN:
                    answer = Answer(client=name, failure=reply.reason or f"error {reply.code}")
                elif attempt == 0:
                    # A node may have forgotten a model (a new process); it is sent it again.
                    self.directory.note_model(name, question.model.key, has=False)
                    asked.append(name)
                    continue
                else:
                    reason = f"does not accept the weights of model {question.model.key}"
                    answer = Answer(client=name, failure=reason)
                left.discard(name)
                yield _with_bytes(answer, sent[name])
        timeout = self.directory.timeout
        within = "" if timeout is None else f" within {timeout:g} s"
        for name in question.seeds:
            if name in left:
                yield replace(sent[name], failure=f"no answer{within}")

    def kept(self, method: str) -> dict[str, State]:
        """Return nothing: what clients keep stays on their nodes."""
        return {}

    def restore(self, method: str, kept: Mapping[str, State]) -> None:
        """Do nothing: what clients keep stays on their nodes."""

    def has_model(self, key: str) -> list[str]:
        """Return the clients that are known to have a model, sorted."""
        return self.directory.clients_with(key)

    def set_has_model(self, key: str, names: Sequence[str] | None) -> None:
        """Do nothing: nodes say themselves which models they have."""

    def close(self) -> None:
        """Do nothing: the grid is its giver's."""


class _Encoded:
    """A question whose state and frozen model are encoded once for all clients."""

    def __init__(self, question: Question) -> None:
        self._question = question
        self._state = records.encode_state(question.state)
        self._state_bytes = records.count_bytes(RecordDict({records.ARRAYS: self._state}))
        self._model: RecordDict | None = None
        # The replies to one question are told from late ones to an earlier by its group.
        self._group = f"{question.stage}.{question.round}"

    def message(self, node: int, sent: Answer, *, model: bool) -> tuple[Message, Answer]:
        """Return the message to a client, and ``sent`` with its bytes added."""
        question = self._question
        config = records.encode_config(question, question.seeds[sent.client])
        down = self._state_bytes + config.count_bytes()
        content = RecordDict({records.ARRAYS: self._state, records.CONFIG: config})
        brought = 0
        if model:
            if self._model is None:
                assert question.model.weights is not None
                weights = records.encode_state(question.model.weights)
                self._model = RecordDict({records.MODEL: weights})
            content.update(self._model)
            brought = records.count_bytes(self._model)
        sent = replace(
            sent,
            bytes_down=sent.bytes_down + down + brought,
            bytes_model=sent.bytes_model + brought,
        )
        kind = records.MESSAGE_TYPES[question.action]
        return Message(content, node, kind, group_id=self._group), sent


def _with_bytes(answer: Answer, sent: Answer) -> Answer:
    return replace(answer, bytes_down=sent.bytes_down, bytes_model=sent.bytes_model)
