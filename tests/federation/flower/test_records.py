"""What travels comes back bit for bit, is counted as it is, and fits Flower's own serializer."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedl2p.federation.flower import records
from fedl2p.federation.messages import (
    Answer,
    FrozenModel,
    Question,
    answer_bytes,
    content_hash,
    question_bytes,
    state_bytes,
)
from fedl2p.federation.server.answer_checks import objection
from fedl2p.method import Update
from support import flower_grid  # noqa: F401
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


def test_a_state_comes_back_bit_for_bit() -> None:
    assert same(records.decode_state(records.encode_state(STATE)), STATE)


def test_a_state_survives_flowers_own_serializer() -> None:
    content = RecordDict(
        {
            records.ARRAYS: records.encode_state(STATE),
            records.CONFIG: ConfigRecord({"seed": 2**63 - 1}),
        }
    )
    message = Message(content, 1, records.MESSAGE_TYPES["train"])
    objects = {key: obj.deflate() for key, obj in get_all_nested_objects(message).items()}
    back = inflate_object_from_contents(message.object_id, objects)
    assert isinstance(back, Message)
    assert same(records.decode_state(back.content.array_records[records.ARRAYS]), STATE)
    assert back.content.config_records[records.CONFIG]["seed"] == 2**63 - 1


def test_what_is_not_encoded_counts_the_bytes_that_it_would_have() -> None:
    encoded = records.encode_state(STATE)
    for name, tensor in STATE.items():
        size = records.count_bytes(RecordDict({"a": ArrayRecord({name: encoded[name]})}))
        assert state_bytes({name: tensor}) == size == len(encoded[name].data) + len(name)


def test_questions_and_answers_come_back_and_count_the_same_bytes() -> None:
    question = Question(
        action="train",
        method="m",
        stage="learn",
        round=3,
        state=STATE,
        model=FrozenModel({"w": torch.ones(2)}, "0" * 32),
        seeds={"c": 2**63 - 1},
    )
    content = RecordDict(
        {
            records.ARRAYS: records.encode_state(STATE),
            records.CONFIG: records.encode_config(question, 2**63 - 1),
        }
    )
    assert records.count_bytes(content) == question_bytes(question)
    back = records.decode_question(records.MESSAGE_TYPES["train"], content, "c")
    assert same(back.state, STATE)
    assert dataclasses.replace(back, state={}, model=question.model) == dataclasses.replace(
        question, state={}
    )
    given = Answer(client="c", update=Update("c", STATE, weight=4.0, metrics={"loss": 0.5}))
    reply = records.encode_answer(given)
    assert isinstance(reply, RecordDict)
    assert records.count_bytes(reply) == answer_bytes(given)
    decoded = records.decode_answer(question, "c", reply).update
    assert decoded is not None
    assert given.update is not None
    assert same(decoded.shared, given.update.shared)
    assert (decoded.weight, decoded.metrics) == (4.0, {"loss": 0.5})


def test_bytes_of_metrics_and_configuration_are_counted() -> None:
    metrics = MetricRecord({"loss": 1.0})
    config = ConfigRecord({"stage": "learn"})
    total = records.count_bytes(RecordDict({"m": metrics, "c": config}))
    assert total == metrics.count_bytes() + config.count_bytes() > 0


def test_content_hash_sees_names_dtypes_shapes_and_bytes_but_not_the_order() -> None:
    a, b = torch.zeros(2), torch.ones(2)
    key = content_hash({"a": a, "b": b})
    assert content_hash({"b": b, "a": a.clone()}) == key
    others = [
        {"a": b, "b": a},
        {"a": a, "c": b},
        {"a": a},
        {"a": a.to(torch.int32), "b": b},
        {"a": a.reshape(1, 2), "b": b},
        {"a": torch.tensor([0.0, -0.0]), "b": b},
    ]
    assert len({key, *map(content_hash, others)}) == len(others) + 1
    assert content_hash(STATE) == content_hash({k: v.clone() for k, v in STATE.items()})


def test_what_cannot_travel_is_named() -> None:
    with pytest.raises(ValueError, match="float8"):
        records.encode_state({"w": torch.zeros(2).to(torch.float8_e5m2)})
    with pytest.raises(ValueError, match="'w' has dtype 'object'"):
        records.decode_state(ArrayRecord({"w": Array("object", (1,), "numpy.ndarray", b"")}))
    with pytest.raises(ValueError, match="'w' cannot be decoded"):
        records.decode_state(
            ArrayRecord({"w": Array("float32", (1,), "numpy.ndarray", b"rubbish")})
        )


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
    said = objection(Update("a", shared, weight=1.0), sent=like)
    assert said is not None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(said)
    assert objection(Update("a", like, weight=1.0, metrics={"loss": 0.3}), sent=like) is None


def test_nothing_is_reported_or_printed() -> None:
    code = """
import fedl2p.federation.flower.clients
from flwr.supercore import telemetry
assert telemetry.FLWR_TELEMETRY_ENABLED == "0"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_flowers_log_level_is_left_as_it_was() -> None:
    import fedl2p.federation.flower.robust  # noqa: F401

    assert logging.getLogger("flwr").level == logging.DEBUG
