"""The node's side of Flower: a message becomes a question to a client node, its answer a reply."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence

from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedl2p.federation.clients.node import ClientNode
from fedl2p.federation.flower import records
from fedl2p.federation.flower.introductions import Introduction
from fedl2p.federation.flower.shared_nodes import (
    ASKED,
    clients_of,
    join_replies,
    split_message,
)
from fedl2p.federation.messages import UnknownModelError, one_line
from fedl2p.method import State

log = logging.getLogger("fedl2p")

# /a/b, ~/a, C:\a; a lone slash, as in 3/4, is none. Quoted ones may hold spaces.
_ROOT = r"(?:~?/|[A-Za-z]:\\)"
_PATH = re.compile(rf"""(?<=['"]){_ROOT}[^'"]+(?=['"])|(?<![\w.]){_ROOT}[^\s'",;:)]+""")


def answer(
    node: ClientNode,
    message: Message,
    context: Context,
    *,
    client: str | None = None,
    settings: str = "",
) -> Message:
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
    client
        The client that this node is; None for what its configuration says.
    settings
        Hash of the settings that it trains with, where it has them from elsewhere than the server.

    Returns
    -------
    Message
        The reply. A message that cannot be read gets an error reply that says why: whoever runs the
        node must see its answer, not a trace. No path of the node's file system is in it.
    """
    if client is None and "client" in context.node_config:
        client = str(context.node_config["client"])
    names = clients_of(context, node.population) if client is None else (client,)
    kind = message.metadata.message_type
    if kind == records.QUERY:
        fault = None if client is None else node.fault(client)
        said = Introduction(
            clients=tuple(names),
            several=len(names) != 1,
            models=tuple(node.models),
            settings=settings,
            fault=without_paths(fault or ""),
        )
        return Message(said.encode(), reply_to=message)
    log.info("%s for %s", kind, names[0] if len(names) == 1 else f"{len(names)} clients")
    if ASKED not in message.content:
        reply = _answer_one(node, kind, message.content, context, names)
        failed = reply.reason if isinstance(reply, Error) else None
        log.info("%s: %s", kind, f"failed: {failed}" if failed else "answered")
        return Message(reply, reply_to=message)
    replies = []
    for name, content in split_message(message.content):
        if name not in names:
            raise ValueError(f"client {name!r} is not on this node, which has {', '.join(names)}")
        place = f"{names.index(name)}."
        replies.append(_answer_one(node, kind, content, context, (name,), place=place))
    return Message(join_replies(replies), reply_to=message)


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
        return _failed(f"the message cannot be read: {type(error).__name__}: {error}")
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
    return _failed(reply) if isinstance(reply, str) else reply


def register(app: ClientApp, handle: Callable[[Message, Context], Message]) -> None:
    """Register a function for all messages of this package."""
    of = {"query": app.query, "train": app.train, "evaluate": app.evaluate}
    for message_type in (records.QUERY, *records.ACTIONS):
        category, name = message_type.split(".")
        of[category](name)(handle)


def without_paths(reason: str) -> str:
    """Return a reason that may leave the node: one line, and no path of its file system in it."""
    return one_line(_PATH.sub("<path>", reason))


def _failed(reason: str) -> Error:
    left = without_paths(reason)
    if left != reason:
        log.warning("%s", one_line(reason))  # the node's own log keeps the path
    return Error(records.CLIENT_FAILED, left)


def _kept(context: Context, key: str) -> State:
    record = context.state.get(key)
    return records.decode_state(record) if isinstance(record, ArrayRecord) else {}
