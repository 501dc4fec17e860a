"""The server's side: FedAvg makes the global model, FedL2P learns how clients fine-tune it."""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedl2p.flower import FedL2P
from fedl2p_quickstart.task import make_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Pre-train, learn to personalize, and have every client personalize itself."""
    config, model = context.run_config, make_model()
    least = int(config["min-clients"])

    fedavg = FedAvg(min_available_nodes=least)
    arrays = ArrayRecord(model.state_dict())
    rounds = int(config["fedavg-rounds"])
    arrays = fedavg.start(grid=grid, initial_arrays=arrays, num_rounds=rounds).arrays

    strategy = FedL2P(model, min_available_nodes=least)
    rounds = int(config["fedl2p-rounds"])
    result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=rounds)

    scores = result.evaluate_metrics_clientapp[rounds]
    before, after = (100 * float(scores[k]) for k in ("accuracy_before", "accuracy"))
    print(f"accuracy of the clients: {before:.1f} % before, {after:.1f} % after personalization")
    if config["out"]:
        out = Path(str(config["out"])).expanduser()
        out.mkdir(parents=True, exist_ok=True)
        torch.save(arrays.to_torch_state_dict(), out / "global.pt")
        strategy.metanets.save(out / "metanets")
