"""The model travels once per node, contexts belong to a client and a method, files stay local."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Error, Message
from flwr.clientapp import ClientApp

from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.profiles import Profile
from fedl2p.core.sites import find_sites
from fedl2p.federation.clients.in_process import InProcess, in_process
from fedl2p.federation.clients.node import ClientNode
from fedl2p.federation.flower import records as wire
from fedl2p.federation.flower.client_app import answer
from fedl2p.federation.flower.clients import OnFlower
from fedl2p.federation.messages import (
    Clients,
    FederationError,
    FrozenModel,
    Question,
    content_hash,
    state_bytes,
)
from fedl2p.federation.personalizing import personalize_all
from fedl2p.federation.rounds import federate
from fedl2p.federation.sampling import draw_cohort
from fedl2p.federation.settings import Rounds
from fedl2p.runs.client_files import write_hyperparams
from support.federation_toys import Line, Toward, model, same
from support.flower_grid import NodeGrid

TRAIN = wire.MESSAGE_TYPES["train"]


def kept(context: Context, method: str) -> dict[str, torch.Tensor]:
    record = context.state[f"kept.{method}"]
    assert isinstance(record, ArrayRecord)
    return wire.decode_state(record)


def node_of(population: Line, *methods: Toward, **options: Any) -> ClientNode:
    return ClientNode(
        build=model, population=population, methods={m.name: m for m in methods}, **options
    )


def here(population: Line, *methods: Toward, **options: Any) -> InProcess:
    return InProcess(node_of(population, *methods, **options))


def on_flower(grid: NodeGrid) -> OnFlower:
    return OnFlower(grid, timeout=0.2)  # type: ignore[arg-type]


def weights_bytes(of: torch.nn.Module) -> int:
    return state_bytes(dict(of.state_dict()))


def go(
    method: Toward, of: torch.nn.Module, population: Line, clients: Clients, **rounds: Any
) -> Any:
    settings = Rounds(**{"rounds": 3, **rounds})
    return federate(method, of, population, rounds=settings, seed=0, stage="learn", clients=clients)


ENGINES = {
    "in process": here,
    "on Flower": lambda *args: on_flower(NodeGrid(node_of(*args))),
}
engines = pytest.mark.parametrize("engine", ENGINES)


@engines
def test_a_model_travels_once_to_each_node_and_then_only_its_hash(engine: str) -> None:
    population, method = Line(seen=5, unseen=2), Toward()
    other = Toward(name="other")
    clients = ENGINES[engine](population, method, other)
    pretrained = model(seed=1)
    size = weights_bytes(pretrained)
    records = go(method, pretrained, population, clients, clients_per_round=3).records
    without = records[-1].bytes_down // 3
    met: set[str] = set()
    for record in records[:3]:
        cohort = set(draw_cohort(population.seen, size=3, seed=0, round=record.round))
        new = cohort - met
        met |= cohort
        assert 0 <= record.bytes_down - len(new) * size - 3 * without < 40, record
    # Another method with the same model, and personalization of those who have it: no weights.
    again = go(other, pretrained, population, clients, clients_per_round=3).records
    assert all(r.bytes_down < records[0].bytes_down - size for r in again[:1])
    third = go(method, model(seed=2), population, clients, rounds=1).records
    assert third[0].bytes_down > 5 * size


@engines
def test_initial_weights_that_nodes_build_themselves_do_not_travel(engine: str) -> None:
    population, method = Line(), Toward()
    make = ENGINES[engine]
    same_model = go(method, model(), population, make(population, method), rounds=1)
    other_model = go(method, model(1), population, make(population, method), rounds=1)
    a, b = same_model.records[0].bytes_down, other_model.records[0].bytes_down
    assert b - a == 5 * weights_bytes(model())


def test_what_a_resumed_study_skips_is_not_sent_again() -> None:
    population, method = Line(unseen=2), Toward()
    whole, resumed = here(population, method), here(population, method)
    personalize_all(method, model(1), method.start(model()), population, seed=0, clients=whole)
    resumed.set_has_model(content_hash(dict(model(1).state_dict())), None)
    a, b = (go(method, model(1), population, clients).records for clients in (whole, resumed))
    assert [r.bytes_down for r in a] == [r.bytes_down for r in b]
    assert a[0].bytes_down == a[1].bytes_down


def test_bytes_are_those_of_the_records() -> None:
    population, method = Line(seen=1), Toward()
    seen: list[int] = []

    class Counting(NodeGrid):
        def send_and_receive(self, messages: Iterable[Message], **_: Any) -> list[Message]:
            asked = list(messages)
            replies = super().send_and_receive(asked)
            if asked[0].metadata.message_type == TRAIN:
                for message in (*asked, *replies):
                    arrays = message.content.array_records.values()
                    total = sum(len(n) + len(a.data) for r in arrays for n, a in r.items())
                    for record in (
                        *message.content.metric_records.values(),
                        *message.content.config_records.values(),
                    ):
                        total += record.count_bytes()
                    seen.append(total)
            return replies

    grid = Counting(node_of(population, method))
    record = go(method, model(1), population, on_flower(grid), rounds=1).records[0]
    assert [record.bytes_down, record.bytes_up] == seen
    # Where nothing is encoded they are counted all the same.
    record = go(method, model(1), population, here(population, method), rounds=1).records[0]
    assert [record.bytes_down, record.bytes_up] == seen


def test_a_node_that_forgot_the_model_is_sent_it_again() -> None:
    population, method = Line(seen=3), Toward()
    node = node_of(population, method)
    clients = on_flower(NodeGrid(node))
    pretrained = model(1)
    size = weights_bytes(pretrained)
    first = go(method, pretrained, population, clients, rounds=1).records
    node.models.known.clear()
    node._loaded = ""
    second = go(method, pretrained, population, clients, rounds=1)
    # Asked in vain, then asked again with the weights.
    small = first[0].bytes_down - 3 * size
    assert second.records[0].bytes_down == 2 * small + 3 * size
    assert second.records[0].failures == 0
    torch.testing.assert_close(second.state["point"], population.weighted_mean(population.seen))


def test_the_process_keeps_one_copy_of_the_model_and_clients_train_on_it() -> None:
    population = Line(seen=3)
    got: list[torch.Tensor] = []

    class Looking(Toward):
        def train(self, model: Any, state: Any, clients: Any) -> Any:
            got.append(model[0].weight.detach().clone())
            return super().train(model, state, clients)

    method = Looking()
    clients = here(population, method)
    pretrained = model(1)
    go(method, pretrained, population, clients, rounds=2)
    assert all(torch.equal(w, pretrained[0].weight) for w in got)  # type: ignore[index]
    known = clients.node.models.known
    assert len(known) == 2  # that of the start and this one
    # What the caller does with its model afterwards does not reach the nodes.
    remembered = copy.deepcopy(known)
    with torch.no_grad():
        pretrained[0].weight.zero_()  # type: ignore[index, operator, union-attr]
    assert all(same(known[key], remembered[key]) for key in remembered)


def test_a_model_that_does_not_match_its_hash_is_a_failure() -> None:
    population, method = Line(seen=2), Toward()
    question = Question(
        action="train",
        method=method.name,
        stage="learn",
        round=1,
        state=method.start(model()),
        model=FrozenModel({"w": torch.zeros(1)}, "0" * 32),
        seeds={"c0": 1},
    )
    (given,) = on_flower(NodeGrid(node_of(population, method))).ask(question)
    assert given.failure is not None
    assert "does not accept the weights" in given.failure


def test_what_is_kept_belongs_to_one_client_and_one_method() -> None:
    population = Line(seen=3)
    one, two = Toward(name="one"), Toward(name="two")
    clients = here(population, one, two)
    grid = NodeGrid(node_of(population, one, two))
    for where in (clients, on_flower(grid)):
        go(one, model(), population, where, rounds=3)
        go(two, model(), population, where, rounds=1)
    for name in population.names:
        assert clients.kept("one")[name]["visits"] == 3
        assert clients.kept("two")[name]["visits"] == 1
        assert kept(grid.contexts[grid.id_of(name)], "one")["visits"] == 3
        assert kept(grid.contexts[grid.id_of(name)], "two")["visits"] == 1
    assert clients.kept("three") == {}
    # A new start of a method begins with nothing kept.
    go(one, model(), population, clients, rounds=1)
    assert clients.kept("one")["c0"]["visits"] == 1


def test_two_nodes_with_one_name_are_refused() -> None:
    population, method = Line(seen=2), Toward()
    grid = NodeGrid(node_of(population, method))
    for context in grid.contexts.values():
        context.node_config["client"] = "c0"
    with pytest.raises(ValueError, match="two nodes say that they are client 'c0'"):
        on_flower(grid).directory.refresh()


class Faulty(NodeGrid):
    """Loses the first reply, answers an error for the second node, and twice for the third."""

    def send_and_receive(self, messages: Iterable[Message], **_: Any) -> list[Message]:
        asked = list(messages)
        replies = super().send_and_receive(asked)
        if asked[0].metadata.message_type != TRAIN:
            return replies
        error = Message(Error(8, "the process was killed"), reply_to=asked[1])
        return [error, replies[2], replies[2], *replies[3:]]


def test_lost_double_and_error_replies(caplog: pytest.LogCaptureFixture) -> None:
    population, method = Line(seen=4), Toward()
    clients = on_flower(Faulty(node_of(population, method)))
    with caplog.at_level(logging.WARNING, logger="fedl2p"):
        done = go(method, model(), population, clients, rounds=1, keep="last")
    torch.testing.assert_close(done.state["point"], population.weighted_mean(["c2", "c3"]))
    assert done.records[0].failures == 2
    assert "client c0 failed: no answer" in caplog.text
    assert "client c1 failed: the process was killed" in caplog.text


def test_an_unknown_method_is_a_failure_that_says_so(caplog: pytest.LogCaptureFixture) -> None:
    population = Line(seen=1)
    clients = here(population, Toward(name="other"))
    with (
        caplog.at_level(logging.WARNING, logger="fedl2p"),
        pytest.raises(FederationError, match="method 'toward' is not here; there are other"),
    ):
        go(Toward(), model(), population, clients, rounds=1)
    assert "method 'toward' is not here; there are other" in caplog.text


def test_one_message_at_a_time_through_a_client_app_is_the_same_code_path() -> None:
    population, method = Line(seen=4), Toward(noise=0.5, use_kept=True)
    node = node_of(population, method)
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        return answer(node, message, context)

    app.query("fedl2p")(handle)
    app.train("fedl2p")(handle)
    app.evaluate("fedl2p_validate")(handle)
    app.evaluate("fedl2p_personalize")(handle)
    # An app may have handlers of its user's besides.
    app.train()(handle)

    class AppGrid(NodeGrid):
        def send_and_receive(self, messages: Iterable[Message], **_: Any) -> list[Message]:
            pairs = [(m, self.contexts[m.metadata.dst_node_id]) for m in messages]
            # As on a real network, in any order.
            return [app(message, context) for message, context in reversed(pairs)]

    through_app = go(method, model(1), population, on_flower(AppGrid(node)))
    at_once = go(method, model(1), population, here(population, method))
    assert same(through_app.state, at_once.state)
    assert [dataclasses.replace(r, seconds=0) for r in through_app.records] == [
        dataclasses.replace(r, seconds=0) for r in at_once.records
    ]


def test_hyperparams_and_profile_go_to_the_clients_file_and_never_travel(tmp_path: Path) -> None:
    sites = find_sites(model())

    class Telling(Toward):
        def personalize(self, model: Any, state: Any, clients: Any) -> Any:
            return [
                dataclasses.replace(
                    outcome,
                    hyperparams=Hyperparams.constant(sites, mix=0.25, rate=0.5),
                    profile=Profile(
                        torch.tensor([float("inf")]), torch.tensor([[1.0, 2.0]] * 2), 7, sites
                    ),
                )
                for outcome in super().personalize(model, state, clients)
            ]

    class Odd(Line):
        def __init__(self) -> None:
            super().__init__(seen=2)
            self.seen = ("c0", "../c1")

        def open(self, name: str) -> Any:
            return super().open(name.removeprefix("../"))

    population, method = Odd(), Telling()
    write = lambda method, model, state, outcome: write_hyperparams(tmp_path, method, outcome)  # noqa: E731
    clients = here(population, method, on_personalized=write)
    outcomes = personalize_all(
        method, model(), method.start(model()), population, seed=0, clients=clients
    )
    assert all(o.hyperparams is None and o.profile is None for o in outcomes)
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["clients/toward/..%2Fc1.json", "clients/toward/c0.json"]
    assert json.loads((tmp_path / files[1]).read_text()) == {
        "client": "c0",
        "method": "toward",
        "mix": {"1": 0.25},
        "rate": {"0.weight": 0.5, "0.bias": 0.5, "1.weight": 0.5, "1.bias": 0.5},
        "divergence": {"1": None},
        "moments": {"0": [1.0, 2.0], "1": [1.0, 2.0]},
        **dict.fromkeys(("gradients", "loss", "labels", "size")),
    }


def test_in_process_nodes_take_a_copy_of_the_model() -> None:
    mine, population, method = model(), Line(), Toward()
    clients = in_process(mine, population, {method.name: method})
    assert clients.node.model is not mine
    go(method, model(1), population, clients, rounds=1)
    assert same(dict(mine.state_dict()), dict(model().state_dict()))
