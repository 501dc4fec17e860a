"""Several clients on one Flower node: simulations run as many nodes as one likes.

A SuperNode of a real federation is one client. Flower's simulation names its nodes by
``partition-id`` and ``num-partitions``; where there are fewer nodes than clients, every node has
several. They share one message per question and their node's context, and nothing else: each is
answered alone and keeps its own state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid

from fedl2p.data.population import Population
from fedl2p.federation.flower import records
from fedl2p.federation.flower.waiting import send_and_receive

# What clients of one node have in common in a message; everything else carries their position.
_COMMON = (records.ARRAYS, records.MODEL)
ASKED = "asked"
_ERROR = "error"

Reply = RecordDict | Error
"""What one client answered."""


def clients_of(context: Context, population: Population) -> Sequence[str]:
    """Return which clients a node is.

    Its configuration says ``client`` (a SuperNode of its own) or ``partition-id`` and
    ``num-partitions`` (simulation). With a node for everybody, the partition is the position in the
    population; with fewer nodes each takes every num-partitions-th client; a node too many is none.
    """
    name = context.node_config.get("client")
    if name is not None:
        return (str(name),)
    position = int(context.node_config["partition-id"])
    seen, unseen = population.seen, population.unseen
    count = len(seen) + len(unseen)
    nodes = int(context.node_config.get("num-partitions", count))
    if nodes < count:
        return population.names[position::nodes]
    if not 0 <= position < count:
        return ()
    # All names together could be a copy of as many, for every message.
    return (seen[position] if position < len(seen) else unseen[position - len(seen)],)


def exchange(
    grid: Grid,
    messages: Mapping[str, Message],
    *,
    shared: Mapping[int, set[str]],
    timeout: float | None,
    grace: float | None = None,
) -> Iterator[tuple[str, Reply]]:
    """Send one message per client, those to a shared node together; yield the replies that come.

    Parameters
    ----------
    grid
        Any Flower grid.
    messages
        By client. Those to one node carry the same state.
    shared
        The nodes that are several clients, and the models that each has; kept up to date, so that a
        model travels to a node once, for whichever of its clients.
    timeout, grace
        How long to wait, see :func:`~fedl2p.federation.flower.waiting.send_and_receive`.
    """
    groups = {message.metadata.group_id for message in messages.values()} | {""}
    asked: dict[int, list[str]] = {}
    for name, message in messages.items():
        asked.setdefault(message.metadata.dst_node_id, []).append(name)
    sent = [
        _joined({name: messages[name] for name in names}, shared[node])
        if node in shared
        else messages[names[0]]
        for node, names in asked.items()
    ]
    by_id: dict[str, int] = {}
    for reply in send_and_receive(grid, sent, timeout=timeout, grace=grace):
        if not by_id:  # a message has an id when a SuperLink has it
            by_id = {m.metadata.message_id: m.metadata.dst_node_id for m in sent}
        node = _answering(reply, by_id)
        if reply.metadata.group_id not in groups:
            continue  # the answer to an earlier question
        # A reply to nobody's question, or a second one of the same node, is left out.
        for name, answered in _split(reply, asked.pop(node, []), several=node in shared):
            if isinstance(answered, Error) and answered.code == records.MODEL_UNKNOWN:
                shared.get(node, set()).clear()  # a new process, which will be sent it again
            yield name, answered


def split_message(content: RecordDict) -> Iterator[tuple[str, RecordDict]]:
    """Yield each client's name and content out of a message to a shared node."""
    asked = records.strings(records.record_of(content, ASKED, ConfigRecord), "clients")
    common = {key: content[key] for key in _COMMON if key in content}
    for position, name in enumerate(asked):
        yield name, RecordDict({**_with_prefix(content, f"{position}."), **common})


def join_replies(replies: Sequence[Reply]) -> RecordDict:
    """Return one content for the replies of the clients of a node, in the order of the message."""
    content = RecordDict()
    for position, reply in enumerate(replies):
        if isinstance(reply, Error):
            why = ConfigRecord({"code": reply.code, "reason": reply.reason or ""})
            content[f"{position}.{_ERROR}"] = why
        else:
            for key, record in reply.items():
                content[f"{position}.{key}"] = record
    return content


def _answering(reply: Message, by_id: Mapping[str, int]) -> int:
    """Return which node a reply speaks for, given the nodes by the ids of the messages to them.

    A SuperLink that gives a node up answers in its place, under an id of its own.
    """
    about = reply.metadata
    if reply.has_error() and about.src_node_id == SUPERLINK_NODE_ID:
        return by_id.get(about.reply_to_message_id, about.src_node_id)
    return about.src_node_id


def _joined(messages: Mapping[str, Message], models: set[str]) -> Message:
    """Return one message to a node for several of its clients, with the model if it lacks it."""
    content = RecordDict({ASKED: ConfigRecord({"clients": list(messages)})})
    for position, message in enumerate(messages.values()):
        for key, record in message.content.items():
            content[key if key in _COMMON else f"{position}.{key}"] = record
    if records.MODEL in content:
        model = str(records.record_of(content, f"0.{records.CONFIG}", ConfigRecord)["model"])
        if model in models:
            del content[records.MODEL]
        models.add(model)
    first = next(iter(messages.values())).metadata
    return Message(content, first.dst_node_id, first.message_type, group_id=first.group_id)


def _split(reply: Message, names: list[str], *, several: bool) -> Iterator[tuple[str, Reply]]:
    """Yield each client's part of a reply; an error of the node is everybody's."""
    for position, name in enumerate(names):
        if reply.has_error():
            yield name, reply.error
            continue
        content = _with_prefix(reply.content, f"{position}.") if several else reply.content
        why = content.get(_ERROR) if several else None
        if isinstance(why, ConfigRecord):
            yield name, Error(int(str(why["code"])), str(why["reason"]))
        elif content or not several:
            yield name, content


def _with_prefix(content: RecordDict, prefix: str) -> RecordDict:
    """Return the records whose keys have a prefix, without it."""
    return RecordDict(
        {key.removeprefix(prefix): content[key] for key in content if key.startswith(prefix)}
    )
