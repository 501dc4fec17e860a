"""The nodes' side: the handlers of a FedAvg app, and FedL2P's beside them."""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedl2p import Outcome
from fedl2p.flower import add_fedl2p
from fedl2p_quickstart import task

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the global model on this node's data."""
    model, data = task.make_model(), task.load_data(context)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    epochs, rate = (context.run_config[k] for k in ("local-epochs", "learning-rate"))
    loss = task.train(model, data, epochs=int(epochs), rate=float(rate))
    metrics = MetricRecord({"train_loss": loss, "num-examples": data.train.num})
    arrays = ArrayRecord(model.state_dict())
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global model on this node's data."""
    model, data = task.make_model(), task.load_data(context)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    right = task.accuracy(model, data.test)
    metrics = MetricRecord({"accuracy": right, "num-examples": data.test.num})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def keep(outcome: Outcome, context: Context) -> None:
    """Keep the personalized model on the node, where its configuration names a folder."""
    if "out" in context.node_config:
        folder = Path(str(context.node_config["out"])).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(outcome.model.state_dict(), folder / "personal.pt")


add_fedl2p(app, model=task.make_model, data=task.load_data, on_personalized=keep)
