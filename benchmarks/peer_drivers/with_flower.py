"""Flower's simulation: ``FedAvg.start`` over a grid of 100 nodes, with one Ray worker.

Clients train by the plain loop's own lines; what is measured beyond it are messages, Ray and the
mean. Fine-tuning sends the model to 60 nodes and gets the test losses back. ``run_simulation``
gives the same runtime as ``flwr run`` without the processes of its command.
"""

from __future__ import annotations

import functools

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from work import CLIENTS, EPOCHS, TRAIN, Stopwatch, Weights, client, judge, serve, start, train

client_app, server_app = ClientApp(), ServerApp()


@client_app.train()
def one_round(message: Message, context: Context) -> Message:
    model, one = start(), client(int(context.node_config["partition-id"]))
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    train(model, one.x, one.y, epochs=1, batch=int(message.content["config"]["batch"]))
    metrics = MetricRecord({"num-examples": TRAIN})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@client_app.train("tune")
def fine_tune(message: Message, context: Context) -> Message:
    model, one = start(), client(int(context.node_config["partition-id"]))
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    before, _ = judge(model, one.test_x, one.test_y)
    train(model, one.x, one.y, epochs=EPOCHS, batch=int(message.content["config"]["batch"]))
    after, _ = judge(model, one.test_x, one.test_y)
    metrics = MetricRecord({"before": before, "after": after})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)


@client_app.query()
def partition(message: Message, context: Context) -> Message:
    metrics = MetricRecord({"partition": int(context.node_config["partition-id"])})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    @functools.cache
    def nodes() -> list[int]:
        """Return the nodes in the order of their clients."""
        asked = [Message(RecordDict(), n, "query") for n in grid.get_node_ids()]
        replies = grid.send_and_receive(asked)
        pairs = [(r.content["metrics"]["partition"], r.metadata.src_node_id) for r in replies]
        return [node for _, node in sorted(pairs)]

    def rounds(watch: Stopwatch, count: int, number: int, batch: int) -> Weights:
        strategy = FedAvg(
            fraction_train=count / CLIENTS, min_train_nodes=count, min_available_nodes=CLIENTS,
            fraction_evaluate=0.0,
        )  # fmt: skip
        arrays, config = ArrayRecord(start().state_dict()), ConfigRecord({"batch": batch})
        watch.start()
        result = strategy.start(grid, arrays, num_rounds=number, train_config=config)
        watch.stop()
        return dict(result.arrays.to_torch_state_dict())

    def tune(watch: Stopwatch, count: int, batch: int) -> list[float]:
        chosen, arrays = nodes()[:count], ArrayRecord(start().state_dict())
        watch.start()
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({"batch": batch})})
        replies = grid.send_and_receive([Message(content, n, "train.tune") for n in chosen])
        watch.stop()
        losses = {r.metadata.src_node_id: r.content["metrics"]["after"] for r in replies}
        return [losses[node] for node in chosen]

    serve(rounds, tune)


if __name__ == "__main__":
    run_simulation(
        server_app,
        client_app,
        num_supernodes=CLIENTS,
        backend_config={"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 1}},
    )
