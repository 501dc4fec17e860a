"""Flower nodes that are several clients: fewer nodes change no number, and no client another."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from torch import nn

from fedl2p.federation.clients.in_process import InProcess
from fedl2p.federation.clients.node import ClientNode
from fedl2p.federation.flower import records as wire
from fedl2p.federation.flower import shared_nodes
from fedl2p.federation.flower.client_app import answer
from fedl2p.federation.flower.clients import OnFlower
from fedl2p.federation.messages import Clients
from fedl2p.federation.personalizing import personalize_all
from fedl2p.federation.rounds import federate
from fedl2p.federation.settings import Rounds
from fedl2p.method import Client, State, Update
from support.federation_toys import Line, Toward, model, same
from support.flower_grid import NodeGrid, is_query

TRAIN = wire.MESSAGE_TYPES["train"]


def node_of(population: Line, *methods: Toward) -> ClientNode:
    return ClientNode(build=model, population=population, methods={m.name: m for m in methods})


class FewNodes(NodeGrid):
    """Messages come back in any order."""

    def send_and_receive(self, messages: Iterable[Message], **options: Any) -> list[Message]:
        return super().send_and_receive(messages, **options)[::-1]


def few(population: Line, *methods: Toward, nodes: int) -> tuple[OnFlower, FewNodes]:
    grid = FewNodes(node_of(population, *methods), nodes=nodes)
    return OnFlower(grid, simulation=True, timeout=0.2), grid  # type: ignore[arg-type]


def go(method: Toward, population: Line, clients: Clients, **rounds: Any) -> Any:
    settings = Rounds(**{"rounds": 3, "clients_per_round": 4, **rounds})
    return federate(
        method, model(1), population, rounds=settings, seed=0, stage="learn", clients=clients
    )


@pytest.mark.parametrize("count", [1, 2, 5, 7, 9])
def test_any_number_of_nodes_gives_the_same_numbers(count: int) -> None:
    population, method = Line(seen=6, unseen=1), Toward(noise=0.5, use_kept=True)
    clients, grid = few(population, method, nodes=count)
    here = InProcess(node_of(population, method))
    a, b = go(method, population, clients), go(method, population, here)
    assert same(a.state, b.state)
    # The bytes are those of a federation in which every client is a node.
    assert [dataclasses.replace(r, seconds=0) for r in a.records] == [
        dataclasses.replace(r, seconds=0) for r in b.records
    ]
    outcomes = [
        personalize_all(method, model(1), end.state, population, seed=0, clients=where)
        for end, where in ((a, clients), (b, here))
    ]
    assert outcomes[0] == outcomes[1]
    journeys = [m.metadata.dst_node_id for m in grid.sent if wire.MODEL in m.content]
    assert len(journeys) == len(set(journeys)) == min(count, 7), "once for all clients of a node"


def test_a_shared_node_that_forgot_the_model_is_sent_it_again() -> None:
    population, method = Line(seen=4), Toward()
    clients, grid = few(population, method, nodes=2)
    go(method, population, clients)
    grid.node.models.known.clear()
    grid.node._loaded = ""
    done = go(method, population, clients)
    assert [r.failures for r in done.records] == [0] * 4
    assert sum(wire.MODEL in m.content for m in grid.sent) == 2 + 2


def test_partitions() -> None:
    population = Line(seen=4, unseen=1)

    def clients(position: int, nodes: int) -> tuple[str, ...]:
        config = {"partition-id": position, "num-partitions": nodes}
        return shared_nodes.clients_of(context(**config), population)

    for nodes in (1, 2, 3, 5, 8):
        shared_out = [name for i in range(nodes) for name in clients(i, nodes)]
        assert sorted(shared_out) == sorted(population.names)
    assert clients(1, 2) == ("c1", "c3")
    assert clients(4, 5) == ("c4",)
    assert clients(7, 8) == ()
    named = context(**{"client": "me", "partition-id": 0, "num-partitions": 1})
    assert shared_nodes.clients_of(named, population) == ("me",)


def context(**config: Any) -> Context:
    return Context(run_id=1, node_id=1, node_config=config, state=RecordDict(), run_config={})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Raising(Toward):
    def train(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        if clients[0].name == "c2":
            raise ArithmeticError("it exploded")
        return super().train(model, state, clients)


def test_one_client_of_a_node_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    population, method = Line(seen=4), Raising()
    clients, _ = few(population, method, nodes=2)
    with caplog.at_level(logging.WARNING, logger="fedl2p"):
        done = go(method, population, clients, keep="last")
    assert [r.failures for r in done.records] == [1, 1, 1, 0]
    assert "client c2 failed: ArithmeticError: it exploded" in caplog.text
    assert same({"p": done.state["point"]}, {"p": population.weighted_mean(["c0", "c1", "c3"])})


def test_clients_of_a_node_keep_their_own() -> None:
    population, method = Line(seen=4), Toward()
    clients, grid = few(population, method, nodes=2)
    go(method, population, clients, rounds=3, clients_per_round=2)
    visits = {}
    for node in grid.contexts.values():
        own = shared_nodes.clients_of(node, population)
        for position, name in enumerate(own):
            state = RecordDict(
                {
                    key.removeprefix(f"{position}."): record
                    for key, record in node.state.items()
                    if key.startswith(f"{position}.")
                }
            )
            kept = wire.decode_state(state.array_records.get("kept.toward", ArrayRecord()))
            visits[name] = int(kept.get("visits", 0))
    assert sum(visits.values()) == 3 * 2
    assert len(visits) == 4


def test_a_node_that_does_not_answer_is_no_answer_of_its_clients() -> None:
    population, method = Line(seen=4), Toward()
    clients, grid = few(population, method, nodes=2)
    clients.directory.refresh()
    whole = grid.send_and_receive
    grid.send_and_receive = lambda messages, **o: whole(messages, **o)[:1]  # type: ignore
    done = go(method, population, clients, rounds=1)
    assert done.records[0].failures == 2


def test_a_superlink_that_gives_a_node_up_speaks_for_it() -> None:
    """As Flower 1.41 does it: an error under the SuperLink's own id, for the message's id."""

    class SuperLink(NodeGrid):
        def send_and_receive(self, messages: Iterable[Message], **options: Any) -> list[Message]:
            asked = list(messages)
            replies = super().send_and_receive(asked, **options)
            if is_query(asked[0]):
                return replies
            gone = Message(Error(5, "Node Unavailable"), reply_to=asked[1])
            gone.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
            return [replies[0], gone, *replies[2:]]

    population, method = Line(seen=4), Toward()
    clients = OnFlower(SuperLink(node_of(population, method)), simulation=True)  # type: ignore[arg-type]
    done = go(method, population, clients, rounds=1)
    assert done.records[0].reasons == {"c1": "Node Unavailable"}


def test_a_node_answers_for_its_own_clients_only() -> None:
    population, method = Line(seen=4), Toward()
    where = node_of(population, method)
    asked = RecordDict({"asked": ConfigRecord({"clients": ["c1"]})})
    node = context(**{"partition-id": 0, "num-partitions": 2})
    with pytest.raises(ValueError, match="client 'c1' is not on this node, which has c0, c2"):
        answer(where, Message(asked, 1, TRAIN), node)
    alone = Message(RecordDict({wire.CONFIG: ConfigRecord({})}), 1, TRAIN)
    refused = answer(where, alone, node)
    assert "this node is 2 clients, so a message must say which" in refused.error.reason
