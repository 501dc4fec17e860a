"""What travels: named tensors as Flower records, their size in bytes, and their content hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from io import BytesIO
from typing import IO, Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from fedl2p.method import State

# Message types, "category.action" as Flower routes them.
QUERY = "query.who"
TRAIN = "train.default"
VALIDATE = "evaluate.validate"
PERSONALIZE = "evaluate.personalize"
ACTIONS = (QUERY, TRAIN, VALIDATE, PERSONALIZE)

# Codes of error replies, above Flower's own.
CLIENT_FAILED = 1001
MODEL_UNKNOWN = 1002

# Keys of the records in a message.
ARRAYS, MODEL, CONFIG, METRICS = "arrays", "model", "config", "metrics"
WEIGHT = "num-examples"

# Flower's Message refuses to exist before a runtime has named the process; in process nobody does.
# Not public in Flower 1.41, so this is the only place; a runtime that sets it later has its way.
if getattr(TaskIdentity, "_task_id", None) is None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)

_NUMPY = "numpy.ndarray"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.complex64, torch.complex128, torch.bool, torch.uint8),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
    )
}
# NumPy has no bfloat16, and averaging in half precision loses digits: both travel as float32.
_HALF = (torch.float16, torch.bfloat16)


class TensorArray(Array):
    """A tensor where Flower expects an array; it is encoded only if somebody asks for bytes.

    In process nobody does, so a reply costs nothing. ``numpy()`` gives the very numbers that the
    encoded form would give, so that both give the same bits.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.__dict__.update(
            tensor=tensor.detach(),
            dtype=_dtype_name(tensor),
            shape=tuple(tensor.shape),
            stype=_NUMPY,
        )

    tensor: Tensor

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The encoded tensor."""
        return Array(self.numpy()).data

    def numpy(self) -> np.ndarray[Any, Any]:
        """Return the tensor as an array in memory."""
        return payload(self.tensor)


class StoredArray(Array):
    """An encoded array that lies in a file, and is read whenever somebody asks for it.

    Parameters
    ----------
    array
        Whose dtype, shape and format it has.
    file, offset, length
        Where its bytes are.
    """

    def __init__(self, array: Array, file: IO[bytes], offset: int, length: int) -> None:
        self.__dict__.update(
            dtype=array.dtype, shape=tuple(array.shape), stype=array.stype, length=length
        )
        self._file, self._offset = file, offset

    length: int

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The encoded array."""
        self._file.seek(self._offset)
        return self._file.read(self.length)


class StoredState(Mapping[str, Tensor]):
    """The named tensors of a record of stored arrays; each is read when it is asked for."""

    def __init__(self, record: ArrayRecord) -> None:
        self._record = record

    def __getitem__(self, name: str) -> Tensor:
        return _to_tensor(name, self._record[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._record)

    def __len__(self) -> int:
        return len(self._record)


class _NamedArray(Array):
    """One tensor of a state where Flower expects an array; it is taken when it is asked for."""

    def __init__(self, state: Mapping[str, Tensor], name: str) -> None:
        self._state, self._name = state, name

    def numpy(self) -> np.ndarray[Any, Any]:
        return payload(self._state[self._name])


def array_of(state: Mapping[str, Tensor], name: str) -> Array:
    """Return a tensor as an array that Flower can average; a stored one is not read yet."""
    return _NamedArray(state, name) if isinstance(state, StoredState) else TensorArray(state[name])


def payload(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return the array that travels for a tensor: on the CPU, row-major, float32 for halves."""
    tensor = tensor.detach().cpu()
    if tensor.dtype in _HALF:
        tensor = tensor.float()
    array: np.ndarray[Any, Any] = tensor.contiguous().numpy()
    return array


def to_record(state: State, *, live: bool) -> ArrayRecord:
    """Return a state as a Flower record.

    Parameters
    ----------
    state
        Named tensors on any device. They must not be changed afterwards if ``live``.
    live
        True to carry the tensors themselves (only within one process), False to encode them.

    Raises
    ------
    ValueError
        If a tensor has a dtype that cannot travel.
    """
    record = ArrayRecord()
    for name, tensor in state.items():
        record[name] = (
            TensorArray(tensor)
            if live
            else Array(
                _dtype_name(tensor), tuple(tensor.shape), _NUMPY, Array(payload(tensor)).data
            )
        )
    return record


def to_state(record: ArrayRecord, *, device: torch.device | str = "cpu") -> State:
    """Return the named tensors of a record, with the dtypes and shapes that were sent.

    Raises
    ------
    ValueError
        If an array cannot be decoded.
    """
    return {name: _to_tensor(name, array).to(device) for name, array in record.items()}


def state_of(record: ArrayRecord) -> Mapping[str, Tensor]:
    """Return what :func:`to_state` does, but leave stored tensors in their file.

    Raises
    ------
    ValueError
        If an array cannot be decoded; a stored one says so when it is asked for.
    """
    stored = any(isinstance(array, StoredArray) for array in record.values())
    return StoredState(record) if stored else to_state(record)


def _to_tensor(name: str, array: Array) -> Tensor:
    if isinstance(array, TensorArray):
        return array.tensor
    if array.dtype not in _DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {array.dtype!r}; send {', '.join(_DTYPES)}")
    try:
        return torch.from_numpy(array.numpy()).to(_DTYPES[array.dtype])
    # Bytes from another machine may be anything; NumPy and torch answer with many error types.
    except Exception as error:
        raise ValueError(f"tensor {name!r} cannot be decoded: {error}") from error


def _dtype_name(tensor: Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"a tensor of dtype {name} cannot travel; convert it to float32 first")
    return name


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
    """Return the bytes of all records of a message as they are, or would be, encoded."""
    total = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            total += sum(len(name) + _array_bytes(array) for name, array in record.items())
        elif isinstance(record, (MetricRecord, ConfigRecord)):
            # Flower 1.41 cannot count an empty list, which a client may send.
            filled: dict[str, Any] = {k: v for k, v in record.items() if v != []}
            total += type(record)(filled).count_bytes() + sum(map(len, record.keys() - filled))
    return total


def _array_bytes(array: Array) -> int:
    if isinstance(array, StoredArray):
        return array.length
    if not isinstance(array, TensorArray):
        return len(array.data)
    tensor = array.tensor
    size = 4 if tensor.dtype in _HALF else tensor.element_size()
    # Not taken from the tensor's own array: a CUDA tensor would be copied only to be counted.
    dtype = torch.empty(0, dtype=torch.float32 if tensor.dtype in _HALF else tensor.dtype).numpy()
    return _header_bytes(dtype.dtype.str, tuple(tensor.shape)) + tensor.numel() * size


@lru_cache(maxsize=4096)
def _header_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    buffer = BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return len(buffer.getvalue())


def content_hash(state: State) -> str:
    """Return a BLAKE2b hash of the names, dtypes, shapes and bytes of a state, in hex.

    The order of the names does not matter.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():  # an empty one, such as the mixes of a model without norms, has no bytes
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
