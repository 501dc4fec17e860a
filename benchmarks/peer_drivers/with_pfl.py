"""pfl-research: ``FederatedAveraging.run`` and ``Reptile.run`` on a ``SimulatedBackend``.

The iteration with number 0 always evaluates, so that measuring rounds begins after it. Batch-norm's
buffers are not averaged. ``Reptile`` is the class for fine-tuning: it splits each user's data,
trains, judges both parts before and after (the plain loop: the test part), and averages the models.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams, PersonalizedNNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.algorithm.reptile import Reptile
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor
from work import EPOCHS, RATE, TEST, TRAIN, Net, Stopwatch, Weights, client, serve, start


class Module(Net):
    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        self.train()
        return F.cross_entropy(self(x), y)

    @torch.no_grad()
    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:
        self.eval()
        logits = self(x)
        loss = F.cross_entropy(logits, y, reduction="sum").item()
        right = (logits.argmax(1) == y).sum().item()
        return {"loss": Weighted(loss, len(y)), "accuracy": Weighted(right, len(y))}


class StartAfterFirst(TrainingProcessCallback):
    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        if central_iteration == 0:
            self.watch.start()
        return False, Metrics()


@functools.cache
def users(count: int, *, whole: bool) -> SimulatedBackend:
    """Return users with their training part, or with all, to be split."""
    kept = {}
    for i in range(count):
        one = client(i)
        pair = (one.x, one.y)
        if whole:
            pair = (torch.cat([one.x, one.test_x]), torch.cat([one.y, one.test_y]))
        kept[i] = Dataset(pair, user_id=str(i))
    data = FederatedDataset(kept.__getitem__, get_user_sampler("minimize_reuse", list(kept)))
    return SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()])


def model() -> PyTorchModel:
    net = Module()
    net.load_state_dict(start().state_dict())
    return PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0))


def training(epochs: int, batch: int) -> NNTrainHyperParams:
    return NNTrainHyperParams(
        local_batch_size=batch, local_num_epochs=epochs, local_learning_rate=RATE
    )


def weights(trained: PyTorchModel) -> Weights:
    return {name: p.detach().clone() for name, p in trained.pytorch_model.named_parameters()}


def rounds(watch: Stopwatch, count: int, number: int, batch: int) -> Weights:
    if batch == TRAIN:  # the check is about one round from the start
        return _run(count, number, batch, [])
    done = _run(count, 1 + number, batch, [StartAfterFirst(watch)])
    watch.stop()
    return done


def _run(count: int, number: int, batch: int, callbacks: list[StartAfterFirst]) -> Weights:
    params = NNAlgorithmParams(
        central_num_iterations=number,
        evaluation_frequency=1_000_000,
        train_cohort_size=count,
        val_cohort_size=None,
    )
    done = FederatedAveraging().run(
        params,
        users(count, whole=False),
        model(),
        training(1, batch),
        NNEvalHyperParams(local_batch_size=None),
        callbacks,
        send_metrics_to_platform=False,
    )
    return weights(done)


def tune(watch: Stopwatch, count: int, batch: int) -> Weights:
    params = PersonalizedNNAlgorithmParams(
        central_num_iterations=1,
        evaluation_frequency=1,
        train_cohort_size=count,
        val_cohort_size=None,
        val_split_fraction=TRAIN / (TRAIN + TEST),
        min_train_size=1,
        min_val_size=1,
    )
    backend, begun = users(count, whole=True), model()
    watch.start()
    done = Reptile().run(
        params,
        backend,
        begun,
        training(EPOCHS, batch),
        NNEvalHyperParams(local_batch_size=None),
        send_metrics_to_platform=False,
    )
    watch.stop()
    return weights(done)


if __name__ == "__main__":
    serve(rounds, tune)
