"""Clients on the nodes of a Flower grid: a SuperLink's, or those of Flower's simulation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedl2p.federation.flower import records, shared_nodes
from fedl2p.federation.flower.client_directory import ClientDirectory
from fedl2p.federation.messages import Answer, Question
from fedl2p.method import State

# Most questions in a row of which a silent client is left out.
_LONGEST_SILENCE = 8


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
    grace
        When half of the nodes have answered, the others have as long again as these needed, but at
        least this many seconds; None: they have until the timeout.
    simulation
        Whether a node may be several clients; None for what the grid is.
    keys, settings
        What nodes must have, see
        :class:`~fedl2p.federation.flower.client_directory.ClientDirectory`.

    Raises
    ------
    ValueError
        If ``timeout`` or ``grace`` is not above 0.

    Notes
    -----
    Answers are decoded one by one, as they come. A client that does not answer is left out of its
    next question, then of two, four and at most eight, and then asked again: it costs a grace time
    now and then. To be personalized it is always asked.
    """

    simulated = False

    def __init__(
        self,
        grid: Grid,
        *,
        timeout: float | None = None,
        grace: float | None = None,
        simulation: bool | None = None,
        keys: Mapping[str, bytes] | None = None,
        settings: str = "",
    ) -> None:
        self.directory = ClientDirectory(
            grid,
            timeout=timeout,
            grace=grace,
            simulation=is_simulation(grid) if simulation is None else simulation,
            keys=keys,
            settings=settings,
        )
        self._silences: dict[str, _Silence] = {}

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
        asked = [name for name in question.seeds if not self._left_out(question, name)]
        asked = asked or list(question.seeds)  # nobody to wait for is no round
        for name in question.seeds.keys() - asked:
            self._silences[name].rounds -= 1
            yield replace(sent[name], failure="left out for some rounds: it was silent before")
        left = set(asked)
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
                grace=self.directory.grace,
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
                self._silences.pop(name, None)
                yield _with_bytes(answer, sent[name])
        for name in question.seeds:
            if name in left:
                silence = self._silences.setdefault(name, _Silence())
                silence.begin()
                yield replace(sent[name], failure="no answer in time")

    def _left_out(self, question: Question, name: str) -> bool:
        """Return whether a client that was silent is not asked this time."""
        silence = self._silences.get(name)
        return question.action != "personalize" and silence is not None and silence.rounds > 0

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


def is_simulation(grid: Grid) -> bool:
    """Return whether a grid is that of Flower's simulation, so that all its nodes are here.

    Flower has no public name for it.
    """
    return type(grid).__name__ == "InMemoryGrid"


@dataclass
class _Silence:
    """How often in a row a client has not answered, and of how many questions it is left out."""

    times: int = 0
    rounds: int = 0

    def begin(self) -> None:
        """Note one more question without an answer."""
        self.rounds = min(2**self.times, _LONGEST_SILENCE)
        self.times += 1


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
