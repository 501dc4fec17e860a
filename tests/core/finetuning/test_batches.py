"""Training batches: class-balanced sampling, and augmentation that reads a raw form."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fedl2p.core.clientdata import ClientData, Examples, class_balance
from fedl2p.core.finetuning.batches import EpochBatches
from fedl2p.core.finetuning.inner_loop import inner_batches
from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.settings import InnerLoop
from support.nets import nested_net

Y = torch.tensor([0] * 40 + [2] * 8 + [5] * 2)


def skewed(**fields: object) -> ClientData:
    x = torch.arange(len(Y), dtype=torch.float32).view(-1, 1)
    return ClientData(Examples(x, Y), **fields)  # type: ignore[arg-type]


def batches(*data: ClientData, epochs: int = 1, size: int = 10) -> EpochBatches:
    return EpochBatches(
        [d.train for d in data],
        list(range(len(data))),
        epochs=epochs,
        batch_size=size,
        augment=[d.augment for d in data],
        raw=[d.raw for d in data],
        balanced=[d.balanced for d in data],
    )


def test_weights_give_each_class_that_occurs_the_same_share() -> None:
    weights = class_balance(Y)
    shares = torch.bincount(Y, weights)
    torch.testing.assert_close(
        shares, torch.tensor([1, 0, 1, 0, 0, 1], dtype=torch.float64) / 3, rtol=0, atol=1e-12
    )


def test_balanced_batches_hold_every_class_equally_often() -> None:
    drawn = torch.cat([y[0] for _, y in batches(skewed(balanced=True), epochs=80)])
    assert len(drawn) == 80 * len(Y)
    shares = torch.bincount(drawn, minlength=6) / len(drawn)
    # 4,000 draws: a standard deviation of 0.0075
    torch.testing.assert_close(shares, torch.tensor([1, 0, 1, 0, 0, 1]) / 3, rtol=0, atol=0.03)


def test_within_a_class_every_example_is_as_likely() -> None:
    drawn = torch.cat([x[0, :, 0] for x, _ in batches(skewed(balanced=True), epochs=300)]).long()
    counts = torch.bincount(drawn, minlength=len(Y)).float()
    for members in (slice(0, 40), slice(40, 48), slice(48, 50)):
        expected = len(drawn) / 3 / (members.stop - members.start)
        spread = 5 * expected**0.5
        assert float((counts[members] - expected).abs().max()) < spread


def test_by_default_an_epoch_is_every_example_once() -> None:
    drawn = torch.cat([x[0, :, 0] for x, _ in batches(skewed())])
    assert drawn.sort().values.tolist() == list(range(len(Y)))


def test_balanced_draws_depend_on_the_seed_alone() -> None:
    data = skewed(balanced=True)
    alone, beside = batches(data), batches(data, skewed(), data)
    for step in reversed(range(len(alone))):
        assert torch.equal(alone[step][0][0], beside[step][0][0])
        assert not torch.equal(beside[step][0][0], beside[step][0][2])


def double(raw: Tensor, generator: torch.Generator) -> Tensor:
    return 2.0 * raw[:, :1] + torch.rand(len(raw), 1, generator=generator) / 4


def test_an_augment_gets_the_raw_form_of_the_same_examples() -> None:
    raw = torch.arange(len(Y))[:, None].repeat(1, 3)
    data = skewed(augment=double, raw=raw)
    for (x, y), (plain, labels) in zip(batches(data), batches(skewed()), strict=True):
        assert torch.equal((x / 2).floor(), plain)
        assert torch.equal(y, labels)
        assert len(set((x - 2 * plain).flatten().tolist())) == x.numel()  # each its own draw


def test_a_client_that_is_in_the_stack_twice_is_augmented_once() -> None:
    calls = []

    def counted(raw: Tensor, generator: torch.Generator) -> Tensor:
        calls.append(len(raw))
        return double(raw, generator)

    raw = torch.arange(len(Y))[:, None]
    data = skewed(augment=counted, raw=raw)
    other = dataclasses.replace(data, raw=raw + 100)
    drawn = EpochBatches(
        [d.train for d in (data, data, other, data)],
        [4, 4, 4, 9],
        epochs=1,
        batch_size=10,
        augment=[counted] * 4,
        raw=[data.raw, data.raw, other.raw, data.raw],
    )
    x = drawn[0][0]
    assert calls == [10, 10, 10]
    assert torch.equal(x[0], x[1])
    torch.testing.assert_close(x[2], x[0] + 200)
    assert not torch.equal(x[0], x[3])


def test_the_joined_data_carry_their_raw_form_and_balance() -> None:
    net = FunctionalModel(nested_net())
    x = torch.randn(12, 1, 8, 8, dtype=torch.float64)
    y = torch.arange(12) % 3

    def grown(raw: Tensor, generator: torch.Generator) -> Tensor:
        return raw.to(torch.float64).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)

    data = ClientData(
        Examples(x[:8], y[:8]),
        Examples(x[8:], y[8:]),
        augment=grown,
        raw=torch.arange(8),
        raw_validation=torch.arange(8, 12),
    )
    inner = InnerLoop(epochs=1, batch_size=4, final="train+validation")
    seen = torch.cat(
        [b[0][0, :, 0, 0, 0] for b in inner_batches(net, [inner.final_data(data)], [0], inner)]
    )
    assert seen.sort().values.tolist() == list(range(12))
    assert dataclasses.replace(data, balanced=True).joined().balanced
    assert data.to("cpu").raw_validation is not None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"raw": torch.zeros(50)}, "without augment"),
        ({"raw": torch.zeros(49), "augment": double}, "raw has 49 examples, but its part has 50"),
        (
            {"raw": torch.zeros(50), "augment": double, "raw_validation": torch.zeros(2)},
            "raw_validation has 2 examples, but its part has 0",
        ),
    ],
)
def test_a_raw_form_that_does_not_fit_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        skewed(**fields)


def test_raw_examples_without_those_of_the_validation_part_cannot_be_joined() -> None:
    validation = Examples(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))
    data = skewed(raw=torch.zeros(50), augment=double, validation=validation)
    with pytest.raises(ValueError, match="raw_validation is missing"):
        data.joined()
