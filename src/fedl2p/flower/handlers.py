"""FedL2P's handlers in a ClientApp of one's own: its model, its data, its own handlers besides."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from typing import Any

from flwr.app import ArrayRecord, Context, Error, Message
from flwr.clientapp import ClientApp
from torch import nn

from fedl2p import methods
from fedl2p.core.clientdata import ClientData
from fedl2p.core.finetuning.inner_loop import as_client_data
from fedl2p.core.functional.recorded_objective import with_objective
from fedl2p.core.objective import Loss, PerExample, Pick, objective
from fedl2p.data.population import Population
from fedl2p.federation.clients.node import ClientNode
from fedl2p.federation.flower import records
from fedl2p.federation.flower.client_app import answer, register, without_paths
from fedl2p.federation.privacy.settings import Privacy
from fedl2p.method import Outcome, State
from fedl2p.methods.base.settings import Settings
from fedl2p.runs.validation import to_plain

log = logging.getLogger("fedl2p")

# Where a context keeps the global model, which a node's next process would have forgotten.
_MODEL = "fedl2p.model"


def add_fedl2p(
    app: ClientApp,
    *,
    model: Callable[[], nn.Module],
    data: Callable[[Context], Any],
    on_personalized: Callable[[Outcome, Context], object] | None = None,
    settings: Settings | None = None,
    privacy: Privacy | None = None,
    device: str = "cpu",
    loss: Loss = "cross-entropy",
    ignore_index: int | None = None,
    metric: str | PerExample | None = None,
    outputs: Pick | None = None,
) -> None:
    """Have a ClientApp answer :class:`~fedl2p.flower.strategy.FedL2P` too.

    Handlers ``query.fedl2p``, ``train.fedl2p``, ``evaluate.fedl2p_validate`` and
    ``evaluate.fedl2p_personalize`` are registered; those of the app's owner stay as they are.

    Parameters
    ----------
    app
        The ClientApp.
    model
        Returns the model; its weights arrive with the first question.
    data
        Returns the client's data: :class:`~fedl2p.ClientData` with a training part, a validation
        part, on which the meta-nets are learned, and for scores a test part.
    on_personalized
        Called on the node with the :class:`~fedl2p.Outcome` of a personalized client: its ``model``
        (plain batch-norm), ``hyperparams``, ``profile`` and scores. They do not leave the node.
    settings
        Inner and outer loop, the same as the server's.
    privacy
        What local privacy updates get before they leave; the server cannot switch it off.
    device
        Where the client computes.
    loss, ignore_index, metric, outputs
        What it is trained and evaluated on, see :mod:`fedl2p.core.objective`.

    Notes
    -----
    The client is called as the node's configuration says (``client``), in a simulation by its
    ``partition-id``, otherwise by its node's id.
    """
    method = methods.build(methods.METANETS, settings or Settings())
    aim = objective(loss, ignore_index=ignore_index, metric=metric, outputs=outputs)
    digest = hash_of(settings or Settings())

    def handle(message: Message, context: Context) -> Message:
        def personalized(name: str, net: nn.Module, state: State, outcome: Outcome) -> None:
            if on_personalized is not None:
                on_personalized(outcome, context)

        name = client_name(context)
        try:
            node = ClientNode(
                build=lambda: with_objective(model(), aim),
                population=_OneClient(name, lambda: as_client_data(data(context))),
                methods={method.name: method},
                device=device,
                on_personalized=personalized,
                wants_models=True,
                privacy={} if privacy is None else {method.name: privacy},
            )
            record = context.state.get(_MODEL)
            if isinstance(record, ArrayRecord):
                node.models.add(records.decode_state(record))
            known = set(node.models)
            reply = answer(node, message, context, client=name, settings=digest)
            if new := [key for key in node.models if key not in known]:
                weights = node.models.get(new[-1])
                assert weights is not None
                context.state[_MODEL] = records.encode_state(weights)
        # Flower would send the whole text, with what it says of the node's files.
        except Exception as error:
            log.exception("a message cannot be answered")
            reason = without_paths(f"{type(error).__name__}: {error}")
            return Message(Error(records.CLIENT_FAILED, reason), reply_to=message)
        return reply

    register(app, handle)


def client_name(context: Context) -> str:
    """Return what a node's client is called."""
    config = context.node_config
    if "client" in config:
        return str(config["client"])
    if "partition-id" in config:
        width = len(str(int(config.get("num-partitions", 1)) - 1))
        return f"client-{int(config['partition-id']):0{width}d}"
    return f"node-{context.node_id}"


def hash_of(settings: Settings) -> str:
    """Return a hash by which server and clients see whether they have the same settings."""
    text = json.dumps(to_plain(settings), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class _OneClient(Population):
    """A population of one client, whose data are read when they are opened."""

    def __init__(self, name: str, load: Callable[[], ClientData]) -> None:
        self.seen, self.unseen = (name,), ()
        self._load = load

    def open(self, name: str) -> ClientData:
        """Return the client's data."""
        if name not in self.seen:
            raise KeyError(f"there is no client {name!r}; this node is {self.seen[0]!r}")
        return self._load()
