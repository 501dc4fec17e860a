"""Losses and metrics in closed form, alone and in a stack; what a model may return."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedl2p.core.objective import Objective, classes_last, objective

GENERATOR = torch.Generator().manual_seed(0)


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def absolute(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs().flatten(1).mean(1)


def log_softmax(logits: list[float], label: int) -> float:
    return math.log(sum(map(math.exp, logits))) - logits[label]


def test_cross_entropy_of_positions_is_the_mean_over_those_that_count() -> None:
    logits = [[1.0, 0.0, -1.0], [0.5, 0.5, 0.0], [2.0, 1.0, 0.0], [0.0, 3.0, 0.0]]
    outputs = torch.tensor([[logits[0], logits[1]], [logits[2], logits[3]]], dtype=torch.float64)
    y = torch.tensor([[0, -100], [2, 1]])
    aim = Objective(ignore_index=-100)
    first = log_softmax(logits[0], 0)
    second = (log_softmax(logits[2], 2) + log_softmax(logits[3], 1)) / 2
    assert float(aim.loss_of_one(outputs, y)) == pytest.approx((first + second) / 2, rel=1e-12)
    (accuracy,) = aim.mean_metric(outputs[None], y[None])
    assert float(accuracy) == pytest.approx((1 + 0.5) / 2)


def test_an_example_without_counted_positions_does_not_enter_the_mean() -> None:
    outputs = floats(3, 4)
    y = torch.tensor([1, -1, 3])
    aim = Objective(ignore_index=-1)
    counted = F.cross_entropy(outputs[[0, 2]], y[[0, 2]])
    torch.testing.assert_close(aim.loss_of_one(outputs, y), counted)
    assert aim.count(y[None]).tolist() == [2]
    nothing = torch.full((1, 3), -1)
    assert aim.losses_of_many(outputs[None], nothing).tolist() == [0.0]


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=["labels", "tokens", "pixels"])
@pytest.mark.parametrize("last", [False, True], ids=["torch's order", "classes last"])
def test_without_ignored_labels_the_loss_is_torchs(shape: tuple[int, ...], last: bool) -> None:
    outputs, y = floats(6, 4, *shape), torch.randint(4, (6, *shape), generator=GENERATOR)
    given = outputs.movedim(1, -1) if last else outputs
    mine = Objective().loss_of_one(given, y)
    torch.testing.assert_close(mine, F.cross_entropy(outputs, y))
    hits = (outputs.argmax(1) == y).double().mean()
    torch.testing.assert_close(Objective().mean_metric(given[None], y[None])[0], hits)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_bce_and_mse_are_torchs_mean(shape: tuple[int, ...]) -> None:
    outputs, y = floats(6, *shape), torch.rand(6, *shape, generator=GENERATOR, dtype=torch.float64)
    bce = Objective(loss="bce")
    torch.testing.assert_close(
        bce.loss_of_one(outputs, y), F.binary_cross_entropy_with_logits(outputs, y)
    )
    right = ((outputs > 0) == (y > 0.5)).double().mean()
    torch.testing.assert_close(bce.mean_metric(outputs[None], y[None])[0], right)
    mse = Objective(loss="mse")
    torch.testing.assert_close(mse.loss_of_one(outputs, y), F.mse_loss(outputs, y))
    assert mse.mean_metric(outputs[None], y[None]).isnan().all()
    assert mse.metrics_of_many(outputs[None], y[None]) is None


def test_one_output_too_many_dimensions_is_dropped_and_never_broadcast() -> None:
    outputs, y = floats(6, 1), floats(6)
    expected = F.mse_loss(outputs.squeeze(1), y)
    torch.testing.assert_close(Objective(loss="mse").loss_of_one(outputs, y), expected)
    with pytest.raises(ValueError, match=r"outputs are of shape \(6,\) but the targets of shape"):
        Objective(loss="mse").loss_of_one(y, outputs)


CASES: dict[str, tuple[Objective, Any, Any]] = {
    "labels": (Objective(), (4,), ()),
    "tokens": (Objective(), (5, 4), (5,)),
    "ignored tokens": (Objective(ignore_index=0), (5, 4), (5,)),
    "pixels": (Objective(), (4, 2, 3), (2, 3)),
    "bce": (Objective(loss="bce"), (3,), None),
    "mse": (Objective(loss="mse"), (3,), None),
    "callable": (Objective(loss=absolute, metric=lambda o, y: o[:, 0].sigmoid()), (3,), None),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_clients_of_a_stack_have_the_losses_that_they_have_alone(
    case: tuple[Objective, tuple[int, ...], tuple[int, ...] | None],
) -> None:
    aim, outputs_shape, labels_shape = case
    outputs = floats(3, 6, *outputs_shape).requires_grad_()
    y = torch.rand(3, 6, *outputs_shape, generator=GENERATOR, dtype=torch.float64)
    if labels_shape is not None:
        y = torch.randint(4, (3, 6, *labels_shape), generator=GENERATOR)
    together = aim.losses_of_many(outputs, y)
    alone = torch.stack([aim.loss_of_one(outputs[i], y[i]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)
    for a, b in ((together, alone),):
        (g,) = torch.autograd.grad(a.sum(), outputs, retain_graph=True)
        (h,) = torch.autograd.grad(b.sum(), outputs)
        torch.testing.assert_close(g, h, rtol=1e-12, atol=1e-15)
    metrics = aim.mean_metric(outputs.detach(), y)
    single = [aim.mean_metric(outputs.detach()[i : i + 1], y[i : i + 1])[0] for i in range(3)]
    torch.testing.assert_close(metrics, torch.stack(single), equal_nan=True)


@pytest.mark.parametrize("aim", [c[0] for c in CASES.values()], ids=CASES.keys())
def test_parts_of_a_batch_weighted_by_their_counts_give_the_whole(aim: Objective) -> None:
    case = next(c for c in CASES.values() if c[0] is aim)
    outputs = floats(2, 6, *case[1])
    y = torch.rand(2, 6, *case[1], generator=GENERATOR, dtype=torch.float64)
    if case[2] is not None:
        y = torch.randint(4, (2, 6, *case[2]), generator=GENERATOR)
        y[0, 3:] = 0  # of ignore_index, so that the parts count differently
    total = sum(
        aim.losses_of_many(outputs[:, part], y[:, part]) * aim.count(y[:, part])
        for part in (slice(0, 4), slice(4, 6))
    )
    torch.testing.assert_close(total / aim.count(y), aim.losses_of_many(outputs, y))


def test_classes_are_where_they_fit_and_a_tie_is_refused() -> None:
    tokens = torch.zeros(2, 5, dtype=torch.long)
    assert classes_last(torch.zeros(2, 3, 5), tokens).shape == (2, 5, 3)
    assert classes_last(torch.zeros(2, 5, 3), tokens).shape == (2, 5, 3)
    with pytest.raises(ValueError, match="classes may be dimension 1 or the last one"):
        classes_last(torch.zeros(2, 5, 5), tokens)
    with pytest.raises(ValueError, match=r"does not fit labels of shape \(2, 5\)"):
        classes_last(torch.zeros(2, 3), tokens)


class Output(NamedTuple):
    logits: Tensor
    hidden: Tensor


class Returns(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, *_: Tensor, **__: Tensor) -> Any:
        return self.what


ONE, TWO = torch.ones(2), torch.zeros(2)


@pytest.mark.parametrize(
    "returned", [ONE, Output(ONE, TWO), {"logits": ONE, "h": TWO}, (ONE, TWO), [ONE, TWO]], ids=str
)
def test_outputs_are_found_in_what_a_model_returns(returned: Any) -> None:
    assert Objective().forward(Returns(returned), TWO) is ONE


def test_outputs_of_another_kind_are_picked_by_the_user_or_refused() -> None:
    model = Returns({"out": ONE, "aux": TWO})
    with pytest.raises(ValueError, match=r"returns a dict with out, aux, but .* outputs="):
        Objective().forward(model, TWO)
    assert Objective(outputs=lambda r: r["aux"]).forward(model, ONE) is TWO
    both = Objective(outputs=lambda r: (r["out"], r["aux"])).forward(model, ONE)
    assert isinstance(both, tuple)
    assert both[0] is ONE
    assert both[1] is TWO
    with pytest.raises(ValueError, match="outputs= returned a str"):
        Objective(outputs=lambda r: "x").forward(model, ONE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "hinge"}, "loss is 'hinge', but must be one of cross-entropy, bce, mse"),
        ({"loss": 3}, "loss is 3, but must be one of"),
        ({"loss": "mse", "ignore_index": 0}, "ignore_index belongs to cross-entropy"),
        ({"ignore_index": 0.5}, "ignore_index is 0.5, but must be an integer"),
        ({"metric": 1}, "metric is 1, but must be a callable"),
        ({"loss": "nowhere.at_all:loss"}, "'nowhere.at_all' is not imported"),
        ({"loss": "math:pi"}, "'pi' is not callable in 'math'"),
        ({"outputs": "math:atan2"}, "cannot be used"),
    ],
)
def test_what_is_no_objective_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective(**arguments)


def test_a_name_stands_for_a_callable_of_an_imported_module() -> None:
    assert objective("torch.nn.functional:l1_loss").loss is F.l1_loss


@pytest.mark.parametrize(
    ("returned", "came"),
    [
        (torch.tensor(1.0), r"a tensor of shape \(\)"),
        (torch.zeros(2, 1), r"shape \(2, 1\)"),
        (0.5, "a float"),
    ],
)
def test_a_loss_that_is_not_one_number_per_example_is_refused(returned: Any, came: str) -> None:
    aim = Objective(loss=lambda o, y: returned)
    with pytest.raises(ValueError, match=f"the loss returned .*{came}.*shape \\(2,\\)"):
        aim.loss_of_one(torch.zeros(2, 3), torch.zeros(2))
