"""Questions and answers as Flower's records, and back.

A message to a client holds the state (``arrays``), what to do (``config``) and, once, the frozen
model (``model``); its reply the numbers (``metrics``) and, after training, the new state. Tensors
travel in NumPy's file format and are decoded without pickle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedl2p.federation.clients.node import failed_outcome
from fedl2p.federation.messages import (
    DTYPES,
    HALF,
    WEIGHT,
    Action,
    Answer,
    FrozenModel,
    Question,
    dtype_name,
    one_line,
    tensor_bytes,
)
from fedl2p.method import Outcome, State, Update
from fedl2p.runs.columns import COUNTS, SCORES

# Message types, "category.action" as Flower routes them. The names are our own, so that an app can
# have handlers of its user besides.
QUERY = "query.fedl2p"
MESSAGE_TYPES: dict[Action, str] = {
    "train": "train.fedl2p",
    "validate": "evaluate.fedl2p_validate",
    "personalize": "evaluate.fedl2p_personalize",
}
ACTIONS = {message_type: action for action, message_type in MESSAGE_TYPES.items()}

# Codes of error replies, above Flower's own.
CLIENT_FAILED = 1001
MODEL_UNKNOWN = 1002

# Keys of the records in a message.
ARRAYS, MODEL, CONFIG, METRICS = "arrays", "model", "config", "metrics"
FAILURE = "failure"
"""Where the reply of a client that could not be personalized says why, in its ``config``."""

Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)

_NUMPY = "numpy.ndarray"

MOST_NUMBERS = 64
"""Most numbers in a reply; ours have fewer than ten."""

# Another version of NumPy may pad a header by some bytes more.
_SLACK = 256


def encode_state(state: State) -> ArrayRecord:
    """Return named tensors on any device as a record; halves travel as float32.

    Raises
    ------
    ValueError
        If a tensor has a dtype that cannot travel.
    """
    record = ArrayRecord()
    for name, tensor in state.items():
        dtype, array = dtype_name(tensor.dtype), tensor.detach().cpu()
        array = (array.float() if array.dtype in HALF else array).contiguous()
        data = Array(array.numpy()).data
        record[name] = Array(dtype, tuple(tensor.shape), _NUMPY, data)
    return record


def decode_state(record: ArrayRecord) -> State:
    """Return the named tensors of a record, with the dtypes and shapes that were sent.

    Raises
    ------
    ValueError
        If an array cannot be decoded.
    """
    state = {}
    for name, array in record.items():
        if array.dtype not in DTYPES:
            raise ValueError(f"tensor {name!r} has dtype {array.dtype!r}; send {', '.join(DTYPES)}")
        try:
            state[name] = torch.from_numpy(array.numpy()).to(DTYPES[array.dtype])
        # Bytes from another machine may be anything; NumPy and torch answer with many error types.
        except Exception as error:
            raise ValueError(f"tensor {name!r} cannot be decoded: {error}") from error
    return state


def encode_config(question: Question, seed: int) -> ConfigRecord:
    """Return what one client is to do."""
    return ConfigRecord(
        {
            "method": question.method,
            "stage": question.stage,
            "round": question.round,
            "model": question.model.key,
            "seed": seed,
        }
    )


def decode_question(message_type: str, content: RecordDict, client: str) -> Question:
    """Return the question of a message to one client.

    Raises
    ------
    LookupError, TypeError, ValueError
        If the message is none: a server may send anything.
    """
    if message_type not in ACTIONS:
        raise ValueError(f"it asks for {message_type!r}; there are {', '.join(ACTIONS)}")
    config = record_of(content, CONFIG, ConfigRecord)
    weights = None
    if MODEL in content:
        weights = decode_state(record_of(content, MODEL, ArrayRecord))
    return Question(
        action=ACTIONS[message_type],
        method=str(config["method"]),
        stage=str(config["stage"]),
        round=_integer(config, "round"),
        state=decode_state(record_of(content, ARRAYS, ArrayRecord)),
        model=FrozenModel(weights, str(config["model"])),
        seeds={client: _integer(config, "seed")},
    )


def encode_answer(answer: Answer) -> RecordDict | str:
    """Return the content of a reply, or for one without content the reason."""
    if answer.update is not None:
        numbers: dict[str, Any] = {WEIGHT: float(answer.update.weight), **answer.update.metrics}
        content = RecordDict({METRICS: MetricRecord(numbers)})
        if answer.update.shared:
            content[ARRAYS] = encode_state(answer.update.shared)
        return content
    if answer.outcome is None:
        return answer.failure or ""
    outcome = answer.outcome
    # What an unsuccessful client knows is how many examples it has.
    names = SCORES if outcome.failure is None else COUNTS
    content = RecordDict({METRICS: MetricRecord({name: getattr(outcome, name) for name in names})})
    if outcome.failure is not None:
        content[CONFIG] = ConfigRecord({FAILURE: outcome.failure})
    return content


def decode_answer(question: Question, client: str, content: RecordDict) -> Answer:
    """Return a client's answer; content that is none becomes its failure.

    Names, dtypes, shapes and bytes of tensors are compared with those that were sent before
    anything is decoded: a client may send as much as it likes of anything.
    """
    try:
        _check_content(question, content)
        if question.action == "personalize":
            return Answer(client=client, outcome=_outcome(client, content))
        metrics: Mapping[str, Any] = record_of(content, METRICS, MetricRecord)
        numbers = {key: float(value) for key, value in metrics.items()}
        shared: State = {}
        # A method without a travelling state has no record of it.
        if question.action == "train" and (question.state or ARRAYS in content):
            shared = decode_state(record_of(content, ARRAYS, ArrayRecord))
        if WEIGHT not in numbers:
            raise ValueError(f"it has no {WEIGHT!r}")
        weight = numbers.pop(WEIGHT)
        return Answer(client=client, update=Update(client, shared, weight=weight, metrics=numbers))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        return Answer(client=client, failure=f"its answer cannot be read: {error}")


def _check_content(question: Question, content: RecordDict) -> None:
    """Refuse records that were not asked for, and tensors unlike those that were sent."""
    allowed = {METRICS} | {"train": {ARRAYS}, "validate": set(), "personalize": {CONFIG}}[
        question.action
    ]
    if extra := sorted(content.keys() - allowed):
        raise ValueError(f"record {one_line(extra[0], most=60)!r} was not asked for")
    for key, kind, most in ((METRICS, MetricRecord, MOST_NUMBERS), (CONFIG, ConfigRecord, 1)):
        record = content.get(key)
        if isinstance(record, kind) and len(record) > most:
            raise ValueError(f"its {key} hold {len(record)} values, wanted at most {most}")
    arrays = content.get(ARRAYS)
    if isinstance(arrays, ArrayRecord):
        _check_arrays(arrays, question.state)


def _check_arrays(arrays: ArrayRecord, sent: State) -> None:
    if absent := sorted(sent.keys() - arrays.keys()):
        raise ValueError(f"tensor {absent[0]!r} is missing ({len(absent)} in all)")
    if len(arrays) > len(sent):
        extra = next(name for name in arrays if name not in sent)
        number = len(arrays) - len(sent)
        name = one_line(extra, most=60)
        raise ValueError(f"tensor {name!r} was not asked for ({number} in all)")
    for name, tensor in sent.items():
        array, shape = arrays[name], tuple(tensor.shape)
        if tuple(array.shape) != shape:
            raise ValueError(f"tensor {name!r} has shape {_cut(array.shape)}, wanted {shape}")
        if array.dtype != dtype_name(tensor.dtype):
            dtype = one_line(str(array.dtype), most=60)
            raise ValueError(f"tensor {name!r} is torch.{dtype}, wanted {tensor.dtype}")
        if array.stype != _NUMPY:
            raise ValueError(f"tensor {name!r} is encoded as {one_line(array.stype, most=60)!r}")
        if len(array.data) > tensor_bytes(tensor.dtype, shape) + _SLACK:
            raise ValueError(f"tensor {name!r} has {len(array.data)} bytes, more than it can need")


def _cut(shape: tuple[int, ...]) -> str:
    return one_line(str(tuple(shape[:8])), most=60)


def record_of(content: RecordDict, key: str, kind: type[Record]) -> Record:
    """Return a record of a message.

    Raises
    ------
    ValueError
        If there is none of that kind under that key.
    """
    record = content.get(key)
    if not isinstance(record, kind):
        raise ValueError(f"the message has no {kind.__name__} {key!r}")
    return record


def strings(record: ConfigRecord, key: str) -> list[str]:
    """Return a list of texts in a record; empty if there is none under that key."""
    value = record.get(key)
    return [str(item) for item in value] if isinstance(value, list) else []


def count_bytes(content: RecordDict) -> int:
    """Return the bytes of all records of a message."""
    total = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            total += sum(len(name) + len(array.data) for name, array in record.items())
        elif isinstance(record, MetricRecord | ConfigRecord):
            # Flower 1.41 cannot count an empty list or text, which a client may send.
            filled: dict[str, Any] = {k: v for k, v in record.items() if v not in ([], "", b"")}
            total += type(record)(filled).count_bytes() + sum(map(len, record.keys() - filled))
    return total


def _outcome(client: str, content: RecordDict) -> Outcome:
    metrics: Mapping[str, Any] = record_of(content, METRICS, MetricRecord)
    if CONFIG in content:
        reason = str(record_of(content, CONFIG, ConfigRecord)[FAILURE])
        return failed_outcome(client, reason, *(int(metrics[name]) for name in COUNTS))
    numbers: dict[str, Any] = {
        name: int(metrics[name]) if name in COUNTS else float(metrics[name]) for name in SCORES
    }
    return Outcome(client=client, **numbers)


def _integer(config: ConfigRecord, key: str) -> int:
    value = config[key]
    if not isinstance(value, int):
        raise ValueError(f"{key} is {value!r} in the message, but must be an integer")
    return value
