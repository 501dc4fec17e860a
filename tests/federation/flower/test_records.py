"""What travels comes back bit for bit, is counted as it is, and fits Flower's own serializer."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedl2p.federation.flower import records
from fedl2p.federation.server import answer_checks
from support.federation_toys import same

STATE = {
    "float": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "double": torch.tensor([1e-300, -0.0, 3.0], dtype=torch.float64),
    "zero-d": torch.tensor(7),
    "zero-d float": torch.tensor(0.1),
    "empty": torch.zeros(0, 5),
    "flag": torch.tensor([True, False]),
    "brain": torch.tensor([1.0, 0.333], dtype=torch.bfloat16),
    "half": torch.tensor([1.0, 0.333], dtype=torch.float16),
    "bytes": torch.tensor([[1, 255]], dtype=torch.uint8),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("live", [True, False])
def test_a_state_comes_back_bit_for_bit(live: bool) -> None:
    assert same(records.to_state(records.to_record(STATE, live=live)), STATE)


def test_a_state_survives_flowers_own_serializer() -> None:
    content = RecordDict(
        {
            records.ARRAYS: records.to_record(STATE, live=False),
            records.CONFIG: ConfigRecord({"seed": 2**63 - 1}),
        }
    )
    message = Message(content, 1, records.TRAIN)
    objects = {key: obj.deflate() for key, obj in get_all_nested_objects(message).items()}
    back = inflate_object_from_contents(message.object_id, objects)
    assert isinstance(back, Message)
    assert same(records.to_state(back.content.array_records[records.ARRAYS]), STATE)
    assert back.content.config_records[records.CONFIG]["seed"] == 2**63 - 1


def test_live_and_encoded_records_count_the_same_bytes_and_numbers() -> None:
    live = records.to_record(STATE, live=True)
    encoded = records.to_record(STATE, live=False)
    for name in STATE:
        assert live[name].data == encoded[name].data, name
        assert (live[name].numpy() == encoded[name].numpy()).all(), name
        a = records.count_bytes(RecordDict({"a": ArrayRecord({name: encoded[name]})}))
        one = ArrayRecord()
        one[name] = live[name]
        assert (
            records.count_bytes(RecordDict({"a": one})) == a == len(encoded[name].data) + len(name)
        )


def test_bytes_of_metrics_and_configuration_are_counted() -> None:
    metrics = MetricRecord({"loss": 1.0})
    config = ConfigRecord({"stage": "learn"})
    total = records.count_bytes(RecordDict({"m": metrics, "c": config}))
    assert total == metrics.count_bytes() + config.count_bytes() > 0


def test_content_hash_sees_names_dtypes_shapes_and_bytes_but_not_the_order() -> None:
    a, b = torch.zeros(2), torch.ones(2)
    key = records.content_hash({"a": a, "b": b})
    assert records.content_hash({"b": b, "a": a.clone()}) == key
    others = [
        {"a": b, "b": a},
        {"a": a, "c": b},
        {"a": a},
        {"a": a.to(torch.int32), "b": b},
        {"a": a.reshape(1, 2), "b": b},
        {"a": torch.tensor([0.0, -0.0]), "b": b},
    ]
    assert len({key, *map(records.content_hash, others)}) == len(others) + 1
    assert records.content_hash(STATE) == records.content_hash(
        {k: v.clone() for k, v in STATE.items()}
    )


def test_what_cannot_travel_is_named() -> None:
    with pytest.raises(ValueError, match="float8"):
        records.to_record({"w": torch.zeros(2).to(torch.float8_e5m2)}, live=False)
    with pytest.raises(ValueError, match="'w' has dtype 'object'"):
        records.to_state(ArrayRecord({"w": Array("object", (1,), "numpy.ndarray", b"")}))
    with pytest.raises(ValueError, match="'w' cannot be decoded"):
        records.to_state(ArrayRecord({"w": Array("float32", (1,), "numpy.ndarray", b"rubbish")}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"w": None}, "'w' is missing"),
        ({"x": torch.zeros(1)}, "'x' was not asked for"),
        ({"w": torch.zeros(3)}, r"shape \(3,\), wanted \(2,\)"),
        ({"w": torch.zeros(2).double()}, "float64, wanted torch.float32"),
        ({"w": torch.tensor([0.0, float("inf")])}, "'w' holds NaN or infinity"),
    ],
)
def test_objections_to_tensors(change: dict[str, torch.Tensor | None], reason: str) -> None:
    like = {"w": torch.zeros(2), "n": torch.tensor(1)}
    shared = {k: v for k, v in {**like, **change}.items() if v is not None}
    said = answer_checks.objection(shared, like=like, weight=1.0, metrics={})
    assert said is not None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(said)
    assert answer_checks.objection(like, like=like, weight=1.0, metrics={"loss": 0.3}) is None


def test_a_message_can_be_made_without_a_runtime_and_nothing_is_reported_or_printed() -> None:
    code = """
import fedl2p.federation, os
from flwr.app import Message, RecordDict
from flwr.supercore import telemetry
Message(RecordDict(), 1, "train")
assert telemetry.FLWR_TELEMETRY_ENABLED == "0"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_flowers_log_level_is_left_as_it_was() -> None:
    import fedl2p.federation  # noqa: F401

    assert logging.getLogger("flwr").level == logging.DEBUG
