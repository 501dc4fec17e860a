"""The node's side of Flower: a message becomes a question to a client node, its answer a reply."""

from __future__ import annotations

from collections.abc import Sequence

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict

from fedl2p.federation.clients.node import ClientNode
from fedl2p.federation.flower import records
from fedl2p.federation.flower.shared_nodes import (
    ASKED,
    clients_of,
    join_replies,
    split_message,
)
from fedl2p.federation.messages import UnknownModelError, one_line
from fedl2p.method import State


def answer(node: ClientNode, message: Message, context: Context) -> Message:
    """Answer a message of :class:`~fedl2p.federation.flower.clients.OnFlower`.

    Parameters
    ----------
    node
        Opens the data and runs the methods.
    message
        To one client, or to several that share a Flower node.
    context
        The Flower node's: its configuration says which clients it is, its ``state`` holds what they
        keep, and is updated.

    Returns
    -------
    Message
        The reply. A message that cannot be read gets an error reply that says why: whoever runs the
        node must see its answer, not a trace.
    """
    names = clients_of(context, node.population)
    if message.metadata.message_type == records.QUERY:
        return Message(_introduction(node, names), reply_to=message)
    if ASKED not in message.content:
        reply = _answer_one(node, message.metadata.message_type, message.content, context, names)
        return Message(reply, reply_to=message)
    replies = []
    for name, content in split_message(message.content):
        if name not in names:
            raise ValueError(f"client {name!r} is not on this node, which has {', '.join(names)}")
        place = f"{names.index(name)}."
        kind = message.metadata.message_type
        replies.append(_answer_one(node, kind, content, context, (name,), place=place))
    return Message(join_replies(replies), reply_to=message)


def _introduction(node: ClientNode, names: Sequence[str]) -> RecordDict:
    """Return which clients a Flower node is, and which global models it has."""
    known = ConfigRecord({"models": list(node.models)})
    if len(names) == 1:
        known["client"] = names[0]
    else:
        known["clients"] = list(names)
    return RecordDict({records.CONFIG: known})


def _answer_one(
    node: ClientNode,
    kind: str,
    content: RecordDict,
    context: Context,
    names: Sequence[str],
    *,
    place: str = "",
) -> RecordDict | Error:
    """Answer for one client; what it keeps is in the context under keys that begin by ``place``."""
    try:
        if len(names) != 1:
            raise ValueError(
                f"this node is {len(names)} clients, so a message must say which it means"
            )
        question = records.decode_question(kind, content, names[0])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        reason = one_line(f"the message cannot be read: {type(error).__name__}: {error}")
        return Error(records.CLIENT_FAILED, reason)
    key = f"{place}kept.{question.method}"
    kept = {names[0]: _kept(context, key)}
    try:
        (given,) = node.answer(question, kept)
    except UnknownModelError as error:
        return Error(records.MODEL_UNKNOWN, str(error))
    context.state.pop(key, None)
    if kept.get(names[0]):
        context.state[key] = records.encode_state(kept[names[0]])
    reply = records.encode_answer(given)
    return Error(records.CLIENT_FAILED, reply) if isinstance(reply, str) else reply


def _kept(context: Context, key: str) -> State:
    record = context.state.get(key)
    return records.decode_state(record) if isinstance(record, ArrayRecord) else {}
