"""Whether a client's examples fit the model and the loss: said before training, not by torch.

The model runs once on a few examples of each kind (shapes and dtypes); the targets of every client
are looked at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedl2p.core import trees
from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.objective import classes_last
from fedl2p.core.trees import Tree

FEW = 2
"""Examples on which the model and the loss are tried."""


def check_client(net: FunctionalModel, data: ClientData, client: str | None = None) -> None:
    """Refuse a client whose examples do not fit.

    Parameters
    ----------
    net
        The model, with its objective.
    data
        All parts of the client's data.
    client
        Its name, for messages.

    Raises
    ------
    ValueError
        In one line: which client and part, what came, what is wanted.
    """
    for part in ("train", "validation", "test"):
        examples = getattr(data, part)
        if examples is not None:
            of_client = "" if client is None else f"client {client!r}, "
            check_examples(net, examples, what=f"{of_client}{part}")


def check_examples(net: FunctionalModel, examples: Examples, *, what: str) -> None:
    """Refuse examples that do not fit, as :func:`check_client`; ``what`` is their name."""
    try:
        _check_targets(net, examples.y)
        kinds = trees.kind(examples.x), trees.kind(examples.y)
        if kinds not in net.classes:
            net.classes[kinds] = _try(net, examples)
        if (classes := net.classes[kinds]) is not None:
            _check_labels(examples.y, classes, net.objective.ignore_index)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def _check_targets(net: FunctionalModel, y: Tree) -> None:
    loss = net.objective.loss
    if not isinstance(loss, str):
        return
    if not isinstance(y, Tensor):
        raise ValueError(
            f"the targets are {trees.describe(y)}, but {loss} takes one tensor; give a loss of "
            "your own for several"
        )
    if loss == "cross-entropy" and (y.is_floating_point() or y.is_complex()):
        raise ValueError(
            f"the targets are of dtype {_dtype(y)}, but cross-entropy takes integer class labels; "
            "give these, or loss='mse' or 'bce' for numbers"
        )
    if loss == "bce" and not bool(((y >= 0) & (y <= 1)).all()):
        raise ValueError("bce takes targets in [0, 1], but there are others; scale or correct them")
    if loss == "mse" and not bool(y.isfinite().all()):
        raise ValueError("there are targets that are not finite; remove or correct them")


def _try(net: FunctionalModel, examples: Examples) -> int | None:
    """Run the model and the loss on a few examples; return the classes of cross-entropy."""
    few = examples.take(slice(FEW)).to(net.device)
    y = trees.map_tree(lambda t: t[None], few.y)
    state = net.start(1, "global")
    mix = torch.zeros(1, len(net.sites.norms), dtype=net.dtype, device=net.device)
    with torch.no_grad():
        try:
            net.examine(examples.x)
            x = trees.map_tree(lambda t: t[None], few.x)
            outputs, _ = net.logits(state, mix, x, training=False)
        except ValueError:
            raise
        except Exception as error:  # of any kind: it is the user's model that runs
            raise ValueError(
                f"the model cannot run on inputs of {trees.describe(examples.x)}: {_line(error)}"
            ) from error
        classes = None
        try:
            if net.objective.loss == "cross-entropy":
                assert isinstance(few.y, Tensor)
                classes = classes_last(_one_tensor(outputs)[0], few.y).shape[-1]
            else:
                net.objective.losses_of_many(outputs, y)
            if net.objective.metric is not None:
                _check_metric(net.objective.metrics_of_many(outputs, y))
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(
                f"the loss or metric fails on outputs {trees.describe(outputs)} and targets "
                f"{trees.describe(y)}, one client first: {_line(error)}"
            ) from error
    return classes


def _check_metric(values: Tensor | None) -> None:
    assert values is not None
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(
            f"the metric returned {values.flatten().tolist()}, but numbers in [0, 1] are wanted, "
            "the higher the better; an error belongs into the loss"
        )


def _one_tensor(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    raise ValueError(
        f"the outputs are {trees.describe(outputs)}, but cross-entropy takes one tensor; pick one "
        "by outputs="
    )


def _check_labels(y: Tree, classes: int, ignored: int | None) -> None:
    assert isinstance(y, Tensor)
    counted = y if ignored is None else y[y != ignored]
    if counted.numel() == 0:
        raise ValueError(f"every label is ignore_index, {ignored}; leave this part or client out")
    lowest, highest = int(counted.min()), int(counted.max())
    if lowest < 0:
        raise ValueError(
            f"there is the label {lowest}; number the classes from 0, or give "
            f"ignore_index={lowest} if such labels are not to count"
        )
    if highest >= classes:
        raise ValueError(
            f"there is the label {highest}, but the model's outputs have {classes} classes, 0 to "
            f"{classes - 1}; correct the label or the model"
        )


def _dtype(y: Tensor) -> str:
    return str(y.dtype).removeprefix("torch.")


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
