"""Several clients on one Flower node: simulations run as many nodes as one likes.

A SuperNode of a real federation is one client, and this file does nothing for it. Flower's
simulation names its nodes by ``partition-id`` and ``num-partitions``; where there are fewer nodes
than clients, every node holds several. They share one message per round and their node's context,
and nothing else: each is answered alone and keeps its own state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid

from fedl2p.data.population import Population
from fedl2p.federation.flower import records as wire

if TYPE_CHECKING:
    from fedl2p.federation.clients.node import Handler

# What clients of one node have in common in a message; everything else carries their position.
_COMMON = (wire.ARRAYS, wire.MODEL)
_ASKED = "asked"
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
) -> Iterator[tuple[str, Reply]]:
    """Send one message per client, those to a shared node together; yield the replies that come.

    Parameters
    ----------
    grid
        Any Flower grid.
    messages
        By client. Those to one node carry the same state.
    shared
        The nodes that said that they are several clients, and the models that each has; kept up to
        date, so that a model travels to a node once, for whichever of its clients.
    timeout
        Seconds to wait for the replies; None to wait for all.
    """
    groups = {message.metadata.group_id for message in messages.values()} | {""}
    asked: dict[int, list[str]] = {}
    for name, message in messages.items():
        asked.setdefault(message.metadata.dst_node_id, []).append(name)
    sent = [
        _together({name: messages[name] for name in own}, shared[node])
        if node in shared
        else messages[own[0]]
        for node, own in asked.items()
    ]
    replies = grid.send_and_receive(sent, timeout=timeout)
    # Known only now: a message has an id when a SuperLink has it.
    by_id = {m.metadata.message_id: m.metadata.dst_node_id for m in sent if m.metadata.message_id}
    for reply in replies:
        node = _answering(reply, by_id)
        if reply.metadata.group_id not in groups:
            continue  # the answer to an earlier question
        # Nobody's question, or a second answer of the same node: it is left out.
        for name, answered in _apart(reply, asked.pop(node, []), several=node in shared):
            if isinstance(answered, Error) and answered.code == wire.MODEL_UNKNOWN:
                shared.get(node, set()).clear()  # a new process, which will be sent it again
            yield name, answered


def _answering(reply: Message, by_id: Mapping[str, int]) -> int:
    """Return which node a reply speaks for, given the nodes by the ids of the messages to them.

    A SuperLink that gives a node up answers in its place, under an id of its own.
    """
    about = reply.metadata
    if reply.has_error() and about.src_node_id == SUPERLINK_NODE_ID:
        return by_id.get(about.reply_to_message_id, about.src_node_id)
    return about.src_node_id


def answer(handler: Handler, message: Message, context: Context) -> Message:
    """Answer a message to a node: that of one client, or one that several share."""
    if _ASKED not in message.content:
        return handler.handle([message], [context])[0]
    names = wire.strings(wire.record_of(message.content, _ASKED, ConfigRecord), "clients")
    own = clients_of(context, handler.population)
    content = RecordDict()
    for position, name in enumerate(names):
        if name not in own:
            raise ValueError(f"client {name!r} is not on this node, which has {', '.join(own)}")
        alone = Context(
            run_id=context.run_id,
            node_id=context.node_id,
            node_config={"client": name},
            state=_taken(context.state, f"{own.index(name)}."),
            run_config=context.run_config,
        )
        reply = handler.handle([_alone(message, position)], [alone])[0]
        for key, record in alone.state.items():
            context.state[f"{own.index(name)}.{key}"] = record
        if reply.has_error():
            why = ConfigRecord({"code": reply.error.code, "reason": reply.error.reason or ""})
            content[f"{position}.{_ERROR}"] = why
        else:
            for key, record in reply.content.items():
                content[f"{position}.{key}"] = record
    return Message(content, reply_to=message)


def _together(messages: Mapping[str, Message], models: set[str]) -> Message:
    """Return one message to a node for several of its clients, with the model if it lacks it."""
    content = RecordDict({_ASKED: ConfigRecord({"clients": list(messages)})})
    for position, message in enumerate(messages.values()):
        for key, record in message.content.items():
            content[key if key in _COMMON else f"{position}.{key}"] = record
    if wire.MODEL in content:
        model = str(wire.record_of(content, f"0.{wire.CONFIG}", ConfigRecord)["model"])
        if model in models:
            del content[wire.MODEL]
        models.add(model)
    first = next(iter(messages.values())).metadata
    return Message(content, first.dst_node_id, first.message_type, group_id=first.group_id)


def _alone(message: Message, position: int) -> Message:
    """Return one client's message out of one for several."""
    content = _taken(message.content, f"{position}.", keep=True)
    content.update({key: message.content[key] for key in _COMMON if key in message.content})
    about = message.metadata
    return Message(content, about.dst_node_id, about.message_type, group_id=about.group_id)


def _apart(reply: Message, names: list[str], *, several: bool) -> Iterator[tuple[str, Reply]]:
    """Yield each client's part of a reply; an error of the node is everybody's."""
    for position, name in enumerate(names):
        if reply.has_error():
            yield name, reply.error
            continue
        own = _taken(reply.content, f"{position}.", keep=True) if several else reply.content
        why = own.get(_ERROR) if several else None
        if isinstance(why, ConfigRecord):
            yield name, Error(int(str(why["code"])), str(why["reason"]))
        elif own or not several:
            yield name, own


def _taken(records: RecordDict, prefix: str, *, keep: bool = False) -> RecordDict:
    """Return the records whose keys have a prefix, without it; take them out unless ``keep``."""
    found = [key for key in records if key.startswith(prefix)]
    return RecordDict(
        {key.removeprefix(prefix): records[key] if keep else records.pop(key) for key in found}
    )
