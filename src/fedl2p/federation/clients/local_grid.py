"""A Flower grid whose nodes are clients of one population, whose contexts are in this process."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedl2p.data.pools.names import LazyNames, finder
from fedl2p.federation.clients.node import keep, kept
from fedl2p.federation.clients.spool import Spool
from fedl2p.method import State

_RUN_ID = 1

Part = tuple[list[Message], list[Context]]
"""Messages that are answered in one call, and the contexts of the clients that they go to."""


class LocalGrid(Grid):
    """What grids without a SuperLink share: one node per client, messages cut into cohorts.

    Messages that ask for the same make a group, and a group is cut into parts of ``cohort``
    clients, in the order of the messages. A part is one call of the handler and so of the method.
    How the parts are answered, and by how many workers at a time, is the subclass's business; it
    cannot change a result, since the calls are the same.

    A client costs nothing before it is asked: its node's id is its position plus one, and its
    context is made then.

    Parameters
    ----------
    names
        The clients, in the order of the population. Computed ones are not walked.
    cohort
        Most clients in one call; 0 for no limit.
    live
        True if replies carry the tensors themselves, False if they are encoded.

    Raises
    ------
    ValueError
        If ``cohort`` is negative, or a name occurs twice.
    """

    contexts: Mapping[int, Context]

    def __init__(self, names: Sequence[str], *, cohort: int, live: bool) -> None:
        if cohort < 0:
            raise ValueError(f"cohort is {cohort}, but must be 0 (all clients at once) or more")
        self.names = names if isinstance(names, LazyNames) else tuple(names)
        if isinstance(self.names, tuple) and len(set(self.names)) < len(self.names):
            twice, _ = Counter(self.names).most_common(1)[0]
            raise ValueError(f"two clients are called {twice!r}; give each a name of its own")
        self.cohort = cohort
        self.live = live
        self._find = finder(self.names)
        self.contexts = Contexts(len(self.names))
        self._run = Run.create_empty(_RUN_ID)
        self._ids = count(1)
        self._replies: dict[str, Message] = {}

    @abstractmethod
    def answer(
        self, parts: Sequence[Part], timeout: float | None
    ) -> Iterator[tuple[int, Sequence[Message]]]:
        """Yield place and replies of each part, in any order, but for those that took too long."""

    @abstractmethod
    def remember(self, weights: State) -> str:
        """Let every worker know a global model; return its content hash."""

    def close(self) -> None:
        """Give back what the grid holds: processes, if it has any."""

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
        return self.contexts.keys()

    def node_of(self, name: str) -> int | None:
        """Return the id of a client's node, or None if there is no such client."""
        position = self._find(name)
        return None if position is None else position + 1

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

        As soon as a part is answered, the tensors of its replies that exceed 256 MiB go to a
        temporary file (:class:`~fedl2p.federation.clients.spool.Spool`): memory holds these and
        one part, however many clients are asked.

        Parameters
        ----------
        messages
            To nodes of this grid.
        timeout
            Seconds after which parts without an answer are given up, where that is possible; None
            to wait for all.
        """
        asked = list(messages)
        places = self._cut(asked)
        parts: list[Part] = [
            (
                [asked[i] for i in part],
                [self.contexts[asked[i].metadata.dst_node_id] for i in part],
            )
            for part in places
        ]
        replies: dict[int, Message] = {}
        spool = Spool()
        for place, answered in self.answer(parts, timeout):
            for reply in answered:
                if reply.has_content():
                    spool.put(reply.content)
            replies.update(zip(places[place], answered, strict=True))
        if isinstance(self.contexts, Contexts):
            self.contexts.forget(message.metadata.dst_node_id for message in asked)
        return [replies[i] for i in sorted(replies)]

    def _cut(self, asked: Sequence[Message]) -> list[list[int]]:
        """Return the positions of the messages of each part."""
        groups: dict[tuple[str, str], list[int]] = {}
        for i, message in enumerate(asked):
            key = (message.metadata.message_type, message.metadata.group_id)
            groups.setdefault(key, []).append(i)
        return [
            group[start : start + (self.cohort or len(group))]
            for group in groups.values()
            for start in range(0, len(group), self.cohort or len(group))
        ]

    def kept(self, method: str) -> dict[str, State]:
        """Return what each client has kept for a method, for those that have kept something."""
        found = ((self.names[i - 1], kept(self.contexts[i], method)) for i in self._made())
        return {name: state for name, state in found if state}

    def restore(self, method: str, states: Mapping[str, State]) -> None:
        """Set what the clients have kept for a method; a client not named has kept nothing."""
        own = {node: state for name, state in states.items() if (node := self.node_of(name))}
        for node in {*self._made(), *own}:
            keep(self.contexts[node], method, own.get(node, {}), live=self.live)

    def _made(self) -> list[int]:
        """Return the ids of the nodes that have a context, in the order of the population."""
        made = self.contexts.made if isinstance(self.contexts, Contexts) else self.contexts
        return sorted(made)


class Contexts(Mapping[int, Context]):
    """The contexts of nodes 1 to ``count``, each made when it is first asked for.

    Parameters
    ----------
    count
        How many nodes there are.

    Attributes
    ----------
    made
        The contexts that there are, by node.
    """

    def __init__(self, count: int) -> None:
        self._nodes = range(1, count + 1)
        self.made: dict[int, Context] = {}

    def __getitem__(self, node: int) -> Context:
        if node not in self.made:
            if node not in self._nodes:
                raise KeyError(node)
            self.made[node] = Context(
                run_id=_RUN_ID,
                node_id=node,
                node_config={"partition-id": node - 1, "num-partitions": len(self._nodes)},
                state=RecordDict(),
                run_config={},
            )
        return self.made[node]

    def forget(self, nodes: Iterable[int]) -> None:
        """Drop the contexts of nodes that keep nothing: they can be made again."""
        for node in nodes:
            if node in self.made and not self.made[node].state:
                del self.made[node]

    def __contains__(self, node: object) -> bool:
        return node in self._nodes

    def __iter__(self) -> Iterator[int]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)
