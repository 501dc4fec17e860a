"""What a client's labelled examples say of the global model: loss, gradients, labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedl2p.core import trees
from fedl2p.core.objective import Objective, classes_last
from fedl2p.core.trees import Tree

LEAST_WEIGHT = 1e-3
"""Root mean square of a tensor's entries below which its gradient is not divided by less."""


class LabelledStatistics:
    """Sums over a client's batches, of which every example weighs the same.

    Parameters
    ----------
    objective
        The loss and its metric.
    parameters
        Those whose gradients are taken, by name; none without gradients.
    dtype
        Of the sums, at least float32.
    """

    def __init__(
        self, objective: Objective, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype
    ) -> None:
        self._objective, self._parameters, self._dtype = objective, parameters, dtype
        self._gradients = {k: torch.zeros_like(p, dtype=dtype) for k, p in parameters.items()}
        self._count, self._loss, self._metric = 0.0, 0.0, 0.0
        self._values: list[Counter[int]] = []
        self._predicted: Counter[tuple[int, int]] = Counter()

    def add(self, outputs: Any, y: Tree) -> None:
        """Add a batch, outputs of the model with their graph and targets, (n, ...)."""
        aim = self._objective
        # made in the caller's inference mode, they could not be saved for the backward pass
        y = trees.map_tree(lambda t: t.clone() if t.is_inference() else t, y)
        outputs = trees.map_tree(
            lambda t: t.to(self._dtype) if t.is_floating_point() else t, outputs
        )
        one = trees.map_tree(lambda t: t[None], y)
        counted = float(aim.count(one))
        loss = aim.loss_of_one(outputs, y)
        if self._parameters and loss.requires_grad:
            grads = torch.autograd.grad(
                loss * counted,
                list(self._parameters.values()),
                allow_unused=True,
                materialize_grads=True,
            )
            for total, grad in zip(self._gradients.values(), grads, strict=True):
                total += grad
        with torch.no_grad():
            metrics = aim.metrics_of_many(trees.map_tree(lambda t: t[None], outputs), one)
        self._count += counted
        self._loss += float(loss.detach()) * counted
        self._metric += 0.0 if metrics is None else float(metrics.double().sum())
        self._count_labels(y)
        self._count_predictions(outputs, y)

    def _count_labels(self, y: Tree) -> None:
        """Count labels: those of cross-entropy, the columns of bce, a callable's whole numbers."""
        aim = self._objective
        if not isinstance(y, Tensor) or aim.loss == "mse":
            return
        if aim.loss == "bce":
            columns = list((y > 0.5).flatten(1).T) if y.dim() > 1 else [y > 0.5]
        elif y.is_floating_point() or y.is_complex():
            return
        else:
            columns = [y if aim.ignore_index is None else y[y != aim.ignore_index]]
        self._values = self._values or [Counter() for _ in columns]
        for counter, column in zip(self._values, columns, strict=True):
            values, counts = column.flatten().unique(return_counts=True)
            counter.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))

    def _count_predictions(self, outputs: Any, y: Tree) -> None:
        """Count pairs (predicted class, label) of cross-entropy."""
        aim = self._objective
        if aim.loss != "cross-entropy":
            return
        assert isinstance(y, Tensor)
        predicted, labels = classes_last(outputs.detach(), y).argmax(-1).flatten(), y.flatten()
        if aim.ignore_index is not None:
            predicted, labels = (t[labels != aim.ignore_index] for t in (predicted, labels))
        self._predicted.update(zip(predicted.tolist(), labels.tolist(), strict=True))

    def loss(self) -> Tensor:
        """Return mean loss and mean accuracy, shape (2,); without an accuracy it is 0."""
        count = max(self._count, 1.0)
        return torch.tensor([self._loss / count, self._metric / count], dtype=torch.float64)

    def labels(self) -> Tensor:
        """Return entropy and number of the labels, and their agreement, shape (3,).

        The first two are the mean of bce's columns; they are 0 where targets are no class labels.
        """
        seen = [torch.tensor([*c.values()], dtype=torch.float64) for c in self._values if c]
        if not seen:
            return torch.tensor([0.0, 0.0, self._agreement()], dtype=torch.float64)
        entropies = [torch.special.entr(n / n.sum()).sum() for n in seen]
        classes = [torch.tensor(float(len(n)), dtype=torch.float64) for n in seen]
        means = [torch.stack(entropies).mean(), torch.stack(classes).mean()]
        return torch.stack([*means, torch.tensor(self._agreement(), dtype=torch.float64)])

    def _agreement(self) -> float:
        """Return the share of pairs of examples with one prediction that have one label.

        Half of a pair more agrees, and half does not, so that a few pairs do not say much.
        """
        of_class: Counter[int] = Counter()
        for (predicted, _), count in self._predicted.items():
            of_class[predicted] += count
        pairs = sum(n * (n - 1) / 2 for n in of_class.values())
        agree = sum(n * (n - 1) / 2 for n in self._predicted.values())
        return (agree + 0.5) / (pairs + 1)

    def gradients(self) -> Tensor:
        """Return norm of the mean loss's gradient / norm of the weights, per tensor, (P,)."""
        count = max(self._count, 1.0)
        ratios = []
        for name, p in self._parameters.items():
            least = LEAST_WEIGHT * max(p.numel(), 1) ** 0.5
            size = p.detach().double().norm().clamp_min(least)
            ratios.append(self._gradients[name].double().norm() / count / size)
        return torch.stack(ratios)
