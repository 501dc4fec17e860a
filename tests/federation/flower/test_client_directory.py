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
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.profiles import Profile
from fedl2p.core.sites import find_sites
from fedl2p.federation.clients.in_process import InProcessGrid
from fedl2p.federation.clients.node import Handler, kept
from fedl2p.federation.flower import records as wire
from fedl2p.federation.flower.client_directory import Frozen, Nodes, in_process
from fedl2p.federation.personalizing import personalize_all
from fedl2p.federation.sampling import draw_cohort, federate
from fedl2p.federation.settings import Rounds
from support.federation_toys import Line, Toward, model, same


def make_nodes(population: Line, *methods: Toward, **options: Any) -> Nodes:
    handler = Handler(
        build=model, population=population, methods={m.name: m for m in methods}, **options
    )
    return Nodes(InProcessGrid(handler))


def weights_bytes(of: torch.nn.Module) -> int:
    record = wire.to_record(dict(of.state_dict()), live=False)
    return wire.count_bytes(RecordDict({wire.MODEL: record}))


def go(method: Toward, of: torch.nn.Module, population: Line, nodes: Nodes, **rounds: Any) -> Any:
    settings = Rounds(**{"rounds": 3, **rounds})
    return federate(method, of, population, rounds=settings, seed=0, stage="learn", nodes=nodes)


def test_a_model_travels_once_to_each_node_and_then_only_its_hash() -> None:
    population, method = Line(seen=5, unseen=2), Toward()
    other = Toward(name="other")
    nodes = make_nodes(population, method, other)
    pretrained = model(seed=1)
    size = weights_bytes(pretrained)
    records = go(method, pretrained, population, nodes, clients_per_round=3).records
    without = records[-1].bytes_down // 3
    met: set[str] = set()
    for record in records[:3]:
        cohort = set(draw_cohort(population.seen, size=3, seed=0, round=record.round))
        new = cohort - met
        met |= cohort
        assert 0 <= record.bytes_down - len(new) * size - 3 * without < 40, record
    # Another method with the same model, and personalization of those who have it: no weights.
    again = go(other, pretrained, population, nodes, clients_per_round=3).records
    assert all(r.bytes_down < records[0].bytes_down - size for r in again[:1])
    third = go(method, model(seed=2), population, nodes, rounds=1).records
    assert third[0].bytes_down > 5 * size


def test_initial_weights_that_nodes_build_themselves_do_not_travel() -> None:
    population, method = Line(), Toward()
    same_model = go(method, model(), population, make_nodes(population, method), rounds=1)
    other_model = go(method, model(1), population, make_nodes(population, method), rounds=1)
    a, b = same_model.records[0].bytes_down, other_model.records[0].bytes_down
    assert b - a == 5 * weights_bytes(model())


def test_what_a_resumed_study_skips_is_not_sent_again() -> None:
    population, method = Line(unseen=2), Toward()
    whole, resumed = make_nodes(population, method), make_nodes(population, method)
    personalize_all(method, model(1), method.start(model()), population, seed=0, nodes=whole)
    resumed.note_sent(model(1), population.names)
    a, b = (go(method, model(1), population, nodes).records for nodes in (whole, resumed))
    assert [r.bytes_down for r in a] == [r.bytes_down for r in b]
    assert a[0].bytes_down == a[1].bytes_down


def test_bytes_are_those_of_the_records() -> None:
    population, method = Line(seen=1), Toward()
    seen: list[int] = []

    class Counting(InProcessGrid):
        def send_and_receive(self, messages: Iterable[Message], **_: Any) -> list[Message]:
            asked = list(messages)
            replies = super().send_and_receive(asked)
            if asked[0].metadata.message_type == wire.TRAIN:
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

    handler = Handler(build=model, population=population, methods={method.name: method})
    record = go(method, model(1), population, Nodes(Counting(handler)), rounds=1).records[0]
    assert [record.bytes_down, record.bytes_up] == seen


def test_a_node_that_forgot_the_model_is_sent_it_again() -> None:
    population, method = Line(seen=3), Toward()
    nodes = make_nodes(population, method)
    pretrained = model(1)
    size = weights_bytes(pretrained)
    first = go(method, pretrained, population, nodes, rounds=1).records
    handler = nodes.grid.handler  # type: ignore[attr-defined]
    handler._models.known.clear()
    second = go(method, pretrained, population, nodes, rounds=1)
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
    nodes = make_nodes(population, method)
    pretrained = model(1)
    go(method, pretrained, population, nodes, rounds=2)
    assert all(torch.equal(w, pretrained[0].weight) for w in got)  # type: ignore[index]
    handler = nodes.grid.handler  # type: ignore[attr-defined]
    assert len(handler._models.known) == 2  # that of the start and this one
    # What the caller does with its model afterwards does not reach the nodes.
    remembered = copy.deepcopy(handler._models.known)
    with torch.no_grad():
        pretrained[0].weight.zero_()  # type: ignore[index, operator, union-attr]
    assert all(same(handler._models.known[key], remembered[key]) for key in remembered)


def test_a_model_that_does_not_match_its_hash_is_a_failure() -> None:
    population, method = Line(seen=2), Toward()
    nodes = make_nodes(population, method)
    wrong = Frozen({"w": torch.zeros(1)}, "0" * 32)
    answers = nodes.ask(
        wire.TRAIN,
        {"c0": 1},
        method=method.name,
        stage="learn",
        round=1,
        state=method.start(model()),
        model=wrong,
    )
    assert answers.contents == {}
    assert "does not accept the weights" in answers.failures["c0"]


def test_what_is_kept_belongs_to_one_client_and_one_method() -> None:
    population = Line(seen=3)
    one, two = Toward(name="one"), Toward(name="two")
    nodes = make_nodes(population, one, two)
    go(one, model(), population, nodes, rounds=3)
    go(two, model(), population, nodes, rounds=1)
    contexts = nodes.grid.contexts  # type: ignore[attr-defined]
    for context in contexts.values():
        assert kept(context, "one")["visits"] == 3
        assert kept(context, "two")["visits"] == 1
        assert kept(context, "three") == {}
    # A new start of a method begins with nothing kept.
    go(one, model(), population, nodes, rounds=1)
    assert kept(contexts[1], "one")["visits"] == 1


def test_two_nodes_with_one_name_are_refused() -> None:
    population, method = Line(seen=2), Toward()
    nodes = make_nodes(population, method)
    for context in nodes.grid.contexts.values():  # type: ignore[attr-defined]
        context.node_config["client"] = "c0"
    with pytest.raises(ValueError, match="two nodes say that they are client 'c0'"):
        nodes.meet()


class Faulty(InProcessGrid):
    """Loses the reply of node 1, answers an error for node 2, and answers twice for node 3."""

    def send_and_receive(self, messages: Iterable[Message], **_: Any) -> list[Message]:
        asked = list(messages)
        replies = super().send_and_receive(asked)
        if asked[0].metadata.message_type != wire.TRAIN:
            return replies
        error = Message(Error(8, "the process was killed"), reply_to=asked[1])
        return [error, replies[2], replies[2], *replies[3:]]


def test_lost_double_and_error_replies(caplog: pytest.LogCaptureFixture) -> None:
    population, method = Line(seen=4), Toward()
    handler = Handler(build=model, population=population, methods={method.name: method})
    nodes = Nodes(Faulty(handler))
    with caplog.at_level(logging.WARNING, logger="fedl2p"):
        done = go(method, model(), population, nodes, rounds=1, keep="last")
    torch.testing.assert_close(done.state["point"], population.weighted_mean(["c2", "c3"]))
    assert done.records[0].failures == 2
    assert "client c0 failed: no answer" in caplog.text
    assert "client c1 failed: the process was killed" in caplog.text


def test_an_unknown_method_is_a_failure_that_says_so(caplog: pytest.LogCaptureFixture) -> None:
    population = Line(seen=1)
    nodes = make_nodes(population, Toward(name="other"))
    with caplog.at_level(logging.WARNING, logger="fedl2p"):
        go(Toward(), model(), population, nodes, rounds=1)
    assert "method 'toward' is not here; there are other" in caplog.text


def test_a_grid_can_be_pushed_and_pulled() -> None:
    population, method = Line(seen=3), Toward()
    grid = make_nodes(population, method).grid
    messages = [
        grid.create_message(RecordDict(), wire.QUERY, node, "q") for node in grid.get_node_ids()
    ]
    ids = list(grid.push_messages(messages))
    assert len(set(ids)) == 3
    names = [r.content.config_records[wire.CONFIG]["client"] for r in grid.pull_messages(ids)]
    assert names == ["c0", "c1", "c2"]
    assert list(grid.pull_messages(ids)) == []
    assert grid.run.run_id == 1
    with pytest.raises(ValueError, match="cohort is -1"):
        InProcessGrid(grid.handler, cohort=-1)  # type: ignore[attr-defined]


def test_one_message_at_a_time_through_a_client_app_is_the_same_code_path() -> None:
    population, method = Line(seen=4), Toward(noise=0.5, use_kept=True)
    handler = Handler(build=model, population=population, methods={method.name: method}, live=False)
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        return handler.handle([message], [context])[0]

    app.query("who")(answer)
    app.train()(answer)
    app.evaluate("validate")(answer)
    app.evaluate("personalize")(answer)

    class AppGrid(InProcessGrid):
        def send_and_receive(self, messages: Iterable[Message], **_: Any) -> list[Message]:
            pairs = [(m, self.contexts[m.metadata.dst_node_id]) for m in messages]
            # As on a real network, in any order.
            return [app(message, context) for message, context in reversed(pairs)]

    through_app = go(method, model(1), population, Nodes(AppGrid(handler)))
    in_cohorts = go(method, model(1), population, make_nodes(population, method))
    assert same(through_app.state, in_cohorts.state)
    assert [dataclasses.replace(r, seconds=0) for r in through_app.records] == [
        dataclasses.replace(r, seconds=0) for r in in_cohorts.records
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
    nodes = make_nodes(population, method, folder=tmp_path)
    outcomes = personalize_all(
        method, model(), method.start(model()), population, seed=0, nodes=nodes
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
    }


def test_in_process_nodes_take_a_copy_of_the_model() -> None:
    mine, population, method = model(), Line(), Toward()
    nodes = in_process(mine, population, {method.name: method})
    assert nodes.grid.handler.model is not mine  # type: ignore[attr-defined]
    go(method, model(1), population, nodes, rounds=1)
    assert same(dict(mine.state_dict()), dict(model().state_dict()))
