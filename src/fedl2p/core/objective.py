"""The loss that clients train and are evaluated on, a metric beside it, and what a model returns.

Every loss is a mean over examples. One example's loss is

- ``cross-entropy``: -log softmax(logits)[label], in nats. Labels are integers of shape (n,), (n, T)
  or (n, H, W): the mean over the positions. The classes are dimension 1 of the outputs, as in
  torch's ``cross_entropy``; or the last one, as in models of transformers, where only that fits.
  A position whose label is ``ignore_index`` does not count: an example's loss is the mean over the
  others, and an example without others is left out of the mean over examples. (torch's mean is over
  all counted positions of a batch, so that it depends on the other examples.) Without
  ``ignore_index`` negative labels are refused.
- ``bce``: binary cross-entropy of logits, the mean over an example's labels, which are in [0, 1].
- ``mse``: the squared error, the mean over an example's values.
- a callable ``loss(outputs, targets)`` that returns one number per example, shape (n,). It is
  called with one client's examples at a time, as many as there are in a batch.

The metric is the accuracy: of ``cross-entropy`` the share of (counted) positions right, of ``bce``
the share of an example's labels right; a callable ``metric(outputs, targets)`` that returns one
number in [0, 1] per example, the higher the better, takes its place. ``mse`` and callables have
none of their own: the accuracy is then NaN.

Outputs of a model are a tensor; something with ``.logits``, or a dictionary with "logits"; or a
tuple, of which the first counts. ``outputs(returned)`` picks from anything else, also several.

Shapes: C clients, n examples, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedl2p import user_code
from fedl2p.core import trees
from fedl2p.core.settings import LOSSES, WITH_ACCURACY, check_ignore_index, check_loss
from fedl2p.core.trees import Tree

PerExample = Callable[[Any, Any], Tensor]
"""``f(outputs, targets)`` -> one number per example, shape (n,)."""

Loss = str | PerExample
"""A name of :data:`~fedl2p.core.settings.LOSSES`, ``package.module:callable``, or a callable."""

Pick = str | Callable[[Any], Any]
"""``package.module:callable`` or a callable of what the model returns."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss, its metric, and how the outputs are picked from what the model returns.

    Parameters
    ----------
    loss
        A name of :data:`~fedl2p.core.settings.LOSSES`, or a callable.
    ignore_index
        Label that does not count, of ``cross-entropy``; None for none.
    metric
        In place of the accuracy; None for the loss's own.
    outputs
        Picks the outputs; None for the rule above.
    """

    loss: Loss = "cross-entropy"
    ignore_index: int | None = None
    metric: PerExample | None = None
    outputs: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.loss, str):
            check_loss(self.loss)
        elif not callable(self.loss):
            raise ValueError(
                f"loss is {self.loss!r}, but must be one of {', '.join(LOSSES)} or a callable of "
                "outputs and targets"
            )
        check_ignore_index(self.ignore_index, self.loss)
        for name in ("metric", "outputs"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise ValueError(f"{name} is {value!r}, but must be a callable")

    @property
    def has_metric(self) -> bool:
        """Whether there is an accuracy or a metric in its place."""
        return self.metric is not None or self.loss in WITH_ACCURACY

    @property
    def in_nats(self) -> bool:
        """Whether the loss is a cross-entropy."""
        return self.loss in WITH_ACCURACY

    def forward(self, module: nn.Module, inputs: Tree) -> Any:
        """Run a model on a batch; return the outputs that the loss takes, a tree of tensors."""
        returned = trees.call(module, inputs)
        if self.outputs is not None:
            return _tree_of(self.outputs(returned))
        return returned if isinstance(returned, Tensor) else self._logits(returned)

    def _logits(self, returned: Any) -> Tensor:
        picked = getattr(returned, "logits", None)
        if picked is None and isinstance(returned, Mapping):
            picked = returned.get("logits")
        elif picked is None and isinstance(returned, tuple | list) and returned:
            picked = returned[0]
        if isinstance(picked, Tensor):
            return picked
        keys = f" with {', '.join(map(str, returned))}" if isinstance(returned, Mapping) else ""
        raise ValueError(
            f"the model returns a {type(returned).__name__}{keys}, but a tensor, something with "
            ".logits or a tuple that begins with a tensor is wanted; pick the outputs by outputs="
        )

    def count(self, y: Tree) -> int | Tensor:
        """Return how many examples of C clients count; for each, shape (C,), where some do not.

        ``y`` has the shape (C, n, ...).
        """
        if self.ignore_index is None:
            return trees.first_leaf(y).shape[1]
        assert isinstance(y, Tensor)
        return self._counted(y).unsqueeze(-1).flatten(2).any(2).sum(1)

    def loss_of_one(self, outputs: Any, y: Tree) -> Tensor:
        """Return the mean loss of one client, without a client dimension."""
        simple = self.loss == "cross-entropy" and self.ignore_index is None
        if simple and isinstance(y, Tensor) and y.dim() == 1:
            return F.cross_entropy(outputs, y.long())
        losses = self._losses(outputs, y)
        if self.ignore_index is None:
            return losses.mean()
        assert isinstance(y, Tensor)
        return losses.sum() / self.count(y.unsqueeze(0)).clamp_min(1).squeeze(0)  # type: ignore[union-attr]

    def losses_of_many(self, outputs: Any, y: Tree) -> Tensor:
        """Return the mean loss of each of C clients, shape (C,)."""
        if isinstance(self.loss, str):
            assert isinstance(y, Tensor)
            clients, examples = y.shape[:2]
            each = self._losses(outputs.flatten(0, 1), y.flatten(0, 1)).view(clients, examples)
            if self.ignore_index is None:
                return each.mean(1)
            return each.sum(1) / cast(Tensor, self.count(y)).clamp_min(1)
        return self._each(self._losses, outputs, y).mean(1)

    def metrics_of_many(self, outputs: Any, y: Tree) -> Tensor | None:
        """Return the metric of each example of C clients, shape (C, n); None without a metric.

        Examples that do not count have 0.
        """
        if self.metric is not None:
            return self._each(self._metrics, outputs, y)
        if self.loss == "bce":
            assert isinstance(y, Tensor)
            right: Tensor = (_fitted(outputs, y) > 0).eq(y > 0.5)
            return right.to(outputs.dtype).unsqueeze(-1).flatten(2).mean(2)
        if self.loss != "cross-entropy":
            return None
        assert isinstance(y, Tensor)
        if self.ignore_index is None and y.dim() == 2:
            hits: Tensor = outputs.argmax(-1).eq(y)
            return hits
        clients, examples = y.shape[:2]
        guessed = classes_last(outputs.flatten(0, 1), y.flatten(0, 1)).argmax(-1).view_as(y)
        right = guessed.eq(y).view(clients, examples, -1)
        if self.ignore_index is None:
            return right.to(outputs.dtype).mean(2)
        counted = self._counted(y).view(clients, examples, -1)
        return (right & counted).to(outputs.dtype).sum(2) / counted.sum(2).clamp_min(1)

    def mean_metric(self, outputs: Any, y: Tree) -> Tensor:
        """Return the mean metric of each of C clients, shape (C,); NaN without a metric."""
        each = self.metrics_of_many(outputs, y)
        first = trees.first_leaf(outputs)
        if each is None:
            return first.new_full((len(first),), torch.nan)
        each = each.to(first.dtype)
        if self.ignore_index is None:
            return each.mean(1)
        return each.sum(1) / cast(Tensor, self.count(y)).clamp_min(1)

    def _losses(self, outputs: Any, y: Tree) -> Tensor:
        """Return the loss of each example of one client, shape (n,); 0 if it does not count."""
        if not isinstance(self.loss, str):
            return _checked(_called(self.loss, outputs, y), y, "loss")
        assert isinstance(y, Tensor)
        if self.loss == "mse":
            each = (_fitted(outputs, y) - y.to(outputs.dtype)).square()
            return each.unsqueeze(-1).flatten(1).mean(1)
        if self.loss == "bce":
            each = F.binary_cross_entropy_with_logits(
                _fitted(outputs, y), y.to(outputs.dtype), reduction="none"
            )
            return each.unsqueeze(-1).flatten(1).mean(1)
        if self.ignore_index is None and y.dim() == 1:
            return F.cross_entropy(outputs, y.long(), reduction="none")
        logits = classes_last(outputs, y).flatten(0, -2)
        counted = self._counted(y)
        labels = y.long().where(counted, 0).flatten()
        each = F.cross_entropy(logits, labels, reduction="none").view(len(y), -1)
        counted = counted.view(len(y), -1)
        return each.where(counted, 0).sum(1) / counted.sum(1).clamp_min(1)

    def _metrics(self, outputs: Any, y: Tree) -> Tensor:
        assert self.metric is not None
        return _checked(_called(self.metric, outputs, y), y, "metric")

    def _counted(self, y: Tensor) -> Tensor:
        return (
            torch.ones_like(y, dtype=torch.bool)
            if self.ignore_index is None
            else (y != self.ignore_index)
        )

    def _each(self, per_example: PerExample, outputs: Any, y: Tree) -> Tensor:
        """Return a function's values for each of C clients, called one by one, shape (C, n)."""
        clients = len(trees.first_leaf(y))
        return torch.stack(
            [per_example(trees.rows(outputs, i), trees.rows(y, i)) for i in range(clients)]
        )


def _tree_of(picked: Any) -> Tree:
    if isinstance(picked, Tensor):
        return picked
    if isinstance(picked, Mapping) and picked:
        return {str(k): _tree_of(v) for k, v in picked.items()}
    if isinstance(picked, tuple | list) and picked:
        return tuple(map(_tree_of, picked))
    raise ValueError(
        f"outputs= returned a {type(picked).__name__}, but a tensor, or a dictionary or tuple of "
        "tensors is wanted"
    )


def classes_last(outputs: Tensor, y: Tensor) -> Tensor:
    """Return logits of labels (n, ...) with the classes as the last dimension, (n, ..., K).

    Raises
    ------
    ValueError
        If neither dimension 1 nor the last one can be the classes, or both can.
    """
    second = outputs.dim() == y.dim() + 1 and outputs.shape[:1] + outputs.shape[2:] == y.shape
    last = outputs.shape[:-1] == y.shape
    if second and last and outputs.dim() > 2:
        raise ValueError(
            f"the outputs are of shape {tuple(outputs.shape)} for labels of shape "
            f"{tuple(y.shape)}, so that the classes may be dimension 1 or the last one; say which "
            "by a loss of your own, e.g. lambda o, y: torch.nn.functional.cross_entropy("
            "o.movedim(-1, 1), y, reduction='none').mean(1)"
        )
    if not (second or last):
        raise ValueError(
            f"the outputs are of shape {tuple(outputs.shape)}, which does not fit labels of shape "
            f"{tuple(y.shape)}; cross-entropy wants logits of shape (n, classes, ...), or "
            "(n, ..., classes), for labels of shape (n, ...)"
        )
    return outputs if last else outputs.movedim(1, -1)


def _fitted(outputs: Tensor, y: Tensor) -> Tensor:
    """Return outputs of the shape of the targets; a last dimension of 1 may be too many."""
    if outputs.shape == (*y.shape, 1):
        return outputs.squeeze(-1)
    if outputs.shape != y.shape:
        raise ValueError(
            f"the outputs are of shape {tuple(outputs.shape)} but the targets of shape "
            f"{tuple(y.shape)}; bce and mse want the same shape"
        )
    return outputs


def _called(function: PerExample, outputs: Any, y: Tree) -> Any:
    """Call a user's function on copies, since it may change what it gets in place."""
    return function(trees.clone(outputs), trees.clone(y))


def _checked(values: Any, y: Tree, what: str) -> Tensor:
    wanted = (trees.length(y),)
    if not isinstance(values, Tensor) or values.shape != wanted:
        came = (
            f"a tensor of shape {tuple(values.shape)}"
            if isinstance(values, Tensor)
            else (f"a {type(values).__name__}")
        )
        raise ValueError(
            f"the {what} returned {came}, but one number per example is wanted, shape {wanted}; "
            "take the mean over every dimension but the first (reduction='none')"
        )
    return values


def objective(
    loss: Loss | Objective = "cross-entropy",
    *,
    ignore_index: int | None = None,
    metric: str | PerExample | None = None,
    outputs: Pick | None = None,
) -> Objective:
    """Return the objective of a loss; names ``package.module:callable`` are looked up.

    Only code that the program has imported is used, see :mod:`fedl2p.user_code`.

    Raises
    ------
    ValueError
        If there is no such loss, or something that is named is not there.
    """
    if isinstance(loss, Objective):
        return loss
    return Objective(
        loss=_found(loss, "loss", takes=2),
        ignore_index=ignore_index,
        metric=_found(metric, "metric", takes=2),
        outputs=_found(outputs, "outputs", takes=1),
    )


def _found(value: Any, what: str, *, takes: int) -> Any:
    if not isinstance(value, str) or ":" not in value:
        return value
    wanted = f"a callable of {'outputs and targets' if takes == 2 else 'what the model returns'}"
    return user_code.find_callable(value, what=what, wanted=wanted, takes=(None,) * takes)
