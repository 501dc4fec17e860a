"""Flower nodes in this process: a grid whose messages go straight to a client node."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedl2p.federation.clients.node import ClientNode
from fedl2p.federation.flower import records
from fedl2p.federation.flower.client_app import answer

# Flower's Message refuses to exist before a runtime has named the process. Not public in 1.41.
if getattr(TaskIdentity, "_task_id", None) is None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


class NodeGrid:
    """What :class:`~fedl2p.federation.flower.clients.OnFlower` needs of a Flower grid.

    ``nodes`` nodes, by default one per client; node i has the id ``7 * i + 3``.
    """

    def __init__(self, node: ClientNode, *, nodes: int | None = None) -> None:
        self.node = node
        count = len(node.population.names) if nodes is None else nodes
        self.contexts = {
            7 * i + 3: Context(
                run_id=1,
                node_id=7 * i + 3,
                node_config={"partition-id": i, "num-partitions": count},
                state=RecordDict(),
                run_config={},
            )
            for i in range(count)
        }
        self.sent: list[Message] = []
        self._numbers = itertools.count()
        self._arrived: list[Message] = []
        self._pulls = 0

    def id_of(self, client: str) -> int:
        """Return the id of a client's node, where each has its own."""
        return 7 * list(self.node.population.names).index(client) + 3

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer at once; tests change what comes back by :meth:`send_and_receive`."""
        asked = list(messages)
        for message in asked:
            message.metadata.__dict__["_message_id"] = str(next(self._numbers))
        self._arrived = list(self.send_and_receive(asked))
        return [message.metadata.message_id for message in asked]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        arrived, self._arrived = self._arrived, []
        self._pulls = 0 if arrived else self._pulls + 1
        assert self._pulls < 20, "nothing more will come; give OnFlower a timeout"
        return arrived

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        asked = list(messages)
        self.sent += asked
        assert len({m.metadata.dst_node_id for m in asked}) == len(asked), "one message per node"
        return [answer(self.node, m, self.contexts[m.metadata.dst_node_id]) for m in asked]


def is_query(message: Message) -> bool:
    return message.metadata.message_type == records.QUERY
