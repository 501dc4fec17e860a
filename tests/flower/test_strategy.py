"""FedL2P in an app of one's own: a strategy, and handlers beside the app's own."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import nn

from fedl2p import ClientData, Examples, Outcome, Privacy, Rounds, Settings, personalize
from fedl2p.core.settings import InnerLoop
from fedl2p.flower import FedL2P, add_fedl2p
from support import flower_grid  # noqa: F401

SETTINGS = Settings(finetune=InnerLoop(epochs=2, batch_size=8))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def load_data(context: Context) -> ClientData:
    g = torch.Generator().manual_seed(int(context.node_config["partition-id"]))

    def some(count: int) -> Examples:
        y = torch.randint(3, (count,), generator=g)
        return Examples(torch.randn(count, 4, generator=g) + y[:, None], y)

    return ClientData(some(24), some(12), some(12))


class Nodes:
    """Nodes whose app is made anew for each message, as a SuperNode's process is."""

    def __init__(self, make_app: Any, count: int = 3) -> None:
        self.make_app = make_app
        self.sent: list[Message] = []
        self.contexts = {
            11 + i: Context(
                run_id=1,
                node_id=11 + i,
                node_config={"partition-id": i, "num-partitions": count},
                state=RecordDict(),
                run_config={},
            )
            for i in range(count)
        }
        self._arrived: list[Message] = []
        self._ids = itertools.count()

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(next(self._ids))
            ids.append(message.metadata.message_id)
            self.sent.append(message)
            context = self.contexts[message.metadata.dst_node_id]
            self._arrived.append(self.make_app()(message, context))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        arrived, self._arrived = self._arrived, []
        return arrived

    def send_and_receive(self, messages: Iterable[Message], **_: Any) -> list[Message]:
        list(self.push_messages(messages))
        return list(self.pull_messages(()))


def app_with(**options: Any) -> Any:
    def make() -> ClientApp:
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            """FedAvg's handler, the owner's."""
            arrays = message.content["arrays"]
            metrics = MetricRecord({"num-examples": 24})
            return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

        add_fedl2p(app, **{"model": make_model, "data": load_data, "settings": SETTINGS} | options)
        return app

    return make


def weights() -> dict[str, torch.Tensor]:
    return dict(make_model().state_dict())


def start(nodes: Nodes, strategy: FedL2P | None = None, **options: Any) -> Any:
    strategy = strategy or FedL2P(make_model(), settings=SETTINGS, wait=0)
    given = {"initial_arrays": ArrayRecord(weights()), "num_rounds": 2, **options}
    return strategy.start(nodes, **given)  # type: ignore[arg-type]


def test_it_is_a_strategy_beside_the_apps_own_handlers() -> None:
    personal: dict[str, Outcome] = {}

    def keep(outcome: Outcome, context: Context) -> None:
        personal[outcome.client] = outcome

    nodes = Nodes(app_with(on_personalized=keep))
    fedavg = FedAvg(fraction_evaluate=0.0, min_available_nodes=3)
    arrays = ArrayRecord(make_model().state_dict())
    pretrained = fedavg.start(nodes, arrays, num_rounds=1).arrays  # type: ignore[arg-type]
    strategy = FedL2P(make_model(), settings=SETTINGS, min_available_nodes=3)
    assert isinstance(strategy, Strategy)
    seen: list[int] = []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append(number)
        return MetricRecord({"tensors": len(arrays)})

    result = strategy.start(
        grid=nodes,  # type: ignore[arg-type]
        initial_arrays=pretrained,
        num_rounds=2,
        evaluate_fn=evaluate,
    )
    assert seen == [0, 1, 2] == list(result.evaluate_metrics_serverapp)
    assert list(result.train_metrics_clientapp) == [1, 2]
    assert result.train_metrics_clientapp[1]["clients"] == 3
    scores = result.evaluate_metrics_clientapp[2]
    assert (scores["num-examples"], scores["clients"], scores["failures"]) == (36, 3, 0)
    assert list(personal) == ["client-0", "client-1", "client-2"]
    # The mean over clients is that of what the nodes have, and models are theirs alone.
    kept = [personal[o.client].accuracy for o in strategy.outcomes]
    assert scores["accuracy"] == pytest.approx(sum(kept) / 3)
    assert all(o.model is None and o.hyperparams is None for o in strategy.outcomes)
    # The arrays are the meta-nets: with them a client elsewhere gets the same model.
    assert strategy.metanets is not None
    nets = strategy.metanets.state_dict()
    told = result.arrays.to_torch_state_dict()
    assert all(torch.equal(v, told[k]) for k, v in nets.items())
    model = make_model()
    model.load_state_dict(pretrained.to_torch_state_dict())
    data = load_data(nodes.contexts[11])
    again = personalize(model, strategy.metanets, data, epochs=2, batch_size=8)
    given = personal["client-0"].hyperparams
    assert given is not None
    torch.testing.assert_close(again.hyperparams.rate, given.rate)


def test_the_global_model_travels_once_though_no_process_lasts() -> None:
    nodes = Nodes(app_with())
    trained = {k: v + 0.01 if v.is_floating_point() else v for k, v in weights().items()}
    start(nodes, initial_arrays=ArrayRecord(trained))
    brought = [m.metadata.dst_node_id for m in nodes.sent if "model" in m.content]
    assert sorted(brought) == [11, 12, 13]


def test_the_same_seed_gives_the_same_bits() -> None:
    ends = [start(Nodes(app_with())).arrays for _ in range(2)]
    assert ends[0].object_id == ends[1].object_id


def test_who_came_later_is_personalized_with_what_was_learned() -> None:
    result = start(Nodes(app_with()))
    later = Nodes(app_with(), count=4)
    strategy = FedL2P(make_model(), settings=SETTINGS, min_available_nodes=4, wait=0)
    arrays = ArrayRecord(make_model().state_dict())
    scores = strategy.personalize(later, arrays, result.arrays)  # type: ignore[arg-type]
    assert (scores["clients"], scores["num-examples"]) == (4, 48)


def test_other_settings_on_a_node_are_found_before_the_first_round(
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = dataclasses.replace(SETTINGS, finetune=InnerLoop(epochs=3, batch_size=8))
    with pytest.raises(ValueError, match="0 of 2 clients answered within 0 s"):
        start(Nodes(app_with(settings=other)))
    assert "its settings are not those of the server; give both the same" in caplog.text


def test_a_loader_that_fails_is_a_node_that_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def load(context: Context) -> ClientData:
        if context.node_config["partition-id"] == 1:
            raise FileNotFoundError(2, "No such file", "/srv/secret/ward 7.npz")
        return load_data(context)

    nodes = Nodes(app_with(data=load))
    result = start(nodes)
    assert result.evaluate_metrics_clientapp[2]["clients"] == 2
    assert "node 12 (client-1) is left out: FileNotFoundError" in caplog.text
    assert "secret" not in caplog.text.partition("is left out")[2]


def test_local_privacy_is_the_nodes_own() -> None:
    """The node adds the noise and sends no metric, whatever the server's settings are."""
    privacy = Privacy(mechanism="local", clip=0.1, noise=1.0)
    rounds = Rounds(keep="last", strategy="fedadam", privacy=privacy)
    strategy = FedL2P(make_model(), settings=SETTINGS, rounds=rounds, wait=0)
    result = start(Nodes(app_with(privacy=privacy)), strategy)
    assert "loss" not in result.train_metrics_clientapp[1]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"train_config": ConfigRecord({"lr": 0.1})}, "train_config and evaluate_config reach no"),
        ({"initial_arrays": ArrayRecord({"x": torch.zeros(1)})}, "not those of the model: "),
        ({"timeout": 0}, "timeout is 0, but must be above 0"),
    ],
)
def test_what_cannot_be_used_is_refused(options: dict[str, Any], problem: str) -> None:
    strategy = FedL2P(make_model(), settings=SETTINGS, wait=0)
    given = {"initial_arrays": ArrayRecord(make_model().state_dict()), **options}
    with pytest.raises(ValueError, match=problem):
        strategy.start(Nodes(app_with()), **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="FedL2P runs its own rounds: call start"):
        strategy.aggregate_train(1, [])
