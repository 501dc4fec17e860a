"""Flower in this process: a Grid that hands cohorts of clients straight to the handler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import count

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedl2p.federation.handlers import Handler, keep, kept
from fedl2p.method import State

_RUN_ID = 1


class InProcessGrid(Grid):
    """A Flower grid whose nodes are the clients of a population, all in this process.

    Messages that ask for the same are grouped into cohorts, and each cohort is one call of the
    handler and so of the method: that is what makes many clients fast.

    Parameters
    ----------
    handler
        The clients' side. Its population says which nodes there are.
    cohort
        Most clients in one call; 0 for no limit.

    Raises
    ------
    ValueError
        If ``cohort`` is negative.
    """

    def __init__(self, handler: Handler, *, cohort: int = 0) -> None:
        if cohort < 0:
            raise ValueError(f"cohort is {cohort}, but must be 0 (all clients at once) or more")
        self.handler = handler
        self.cohort = cohort
        self.contexts = _contexts(handler.population.names)
        self._run = Run.create_empty(_RUN_ID)
        self._ids = count(1)
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """Set the run this grid belongs to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid belongs to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes, in the order of the population."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver messages, and have them answered at once; return an id for each reply."""
        replies = self.send_and_receive(messages)
        ids = [str(next(self._ids)) for _ in replies]
        self._replies.update(zip(ids, replies, strict=True))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies with these ids, each once."""
        return [self._replies.pop(key) for key in message_ids if key in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Deliver messages and return the replies in the same order.

        ``timeout`` is accepted for Flower's sake: a call in this process cannot be given up.
        """
        asked = list(messages)
        groups: dict[tuple[str, str], list[int]] = {}
        for i, message in enumerate(asked):
            key = (message.metadata.message_type, message.metadata.group_id)
            groups.setdefault(key, []).append(i)
        replies: dict[int, Message] = {}
        for group in groups.values():
            size = self.cohort or len(group)
            for start in range(0, len(group), size):
                part = group[start : start + size]
                answered = self.handler.handle(
                    [asked[i] for i in part],
                    [self.contexts[asked[i].metadata.dst_node_id] for i in part],
                )
                replies.update(zip(part, answered, strict=True))
        return [replies[i] for i in range(len(asked))]

    def kept(self, method: str) -> dict[str, State]:
        """Return what each client has kept for a method, for those that have kept something."""
        pairs = zip(self.handler.population.names, self.contexts.values(), strict=True)
        found = ((name, kept(context, method)) for name, context in pairs)
        return {name: state for name, state in found if state}

    def restore(self, method: str, states: Mapping[str, State]) -> None:
        """Set what the clients have kept for a method; a client not named has kept nothing."""
        pairs = zip(self.handler.population.names, self.contexts.values(), strict=True)
        for name, context in pairs:
            keep(context, method, states.get(name, {}), live=self.handler.live)


def _contexts(names: tuple[str, ...]) -> dict[int, Context]:
    return {
        position + 1: Context(
            run_id=_RUN_ID,
            node_id=position + 1,
            node_config={"partition-id": position, "num-partitions": len(names)},
            state=RecordDict(),
            run_config={},
        )
        for position in range(len(names))
    }
