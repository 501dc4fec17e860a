"""Pickles from outside, read without ever executing what they say.

A pickle is a program that names callables and calls them. Here every name is refused but those by
which numpy arrays, numpy scalars and byte strings were written; and these stand for objects of this
file, which only note what they are given. An array is then made from bytes whose number fits its
shape, for types without references. Nothing of numpy's own unpickling runs: it trusts the file.

Python 2 pickles (CIFAR's) are read with their strings as bytes.
"""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np

PLAIN = "biufSU"
"""Kinds of numpy types that are admitted: truth values, numbers and text."""


class _Refused(Exception):
    """The pickle holds something else than plain data; the message names it."""


def load_plain(content: bytes, *, source: str) -> Any:
    """Return what a pickle holds, if that is plain data.

    Parameters
    ----------
    content
        The pickle.
    source
        What to call the file in messages.

    Returns
    -------
    Any
        Lists, tuples and dictionaries of None, truth values, numbers, str, bytes and numpy arrays
        of these. Numpy scalars come as Python's.

    Raises
    ------
    ValueError
        If it holds anything else, or is damaged.
    """
    try:
        return _plain(_Unpickler(io.BytesIO(content), encoding="bytes").load())
    except _Refused as problem:
        raise ValueError(
            f"{source} holds {problem}, not only plain data, and was not read: nothing in a data "
            "file is ever executed; fetch the published file again"
        ) from None
    except Exception as problem:  # a damaged pickle may raise anything
        why = " ".join(str(problem).split()) or type(problem).__name__
        raise ValueError(
            f"{source} is damaged ({why}); delete it and fetch the published file again"
        ) from None


class _Array:
    """An array, or a scalar, of which only the description has been read."""

    value: Any

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = dtype.array(raw, tuple(shape), order="F" if fortran else "C")


class _DType:
    """The description of a type, checked before it is used."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else str(code)
        self.order = "|"

    def __setstate__(self, state: Any) -> None:
        order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "="):
            raise ValueError(f"byte order {order!r}")
        # Fields and subarrays would stand there. The flags behind them are not used.
        if any(part is not None for part in state[2:5]):
            raise _Refused("a numpy array of a compound type")
        self.order = order

    def array(self, raw: Any, shape: tuple[int, ...], order: str) -> Any:
        """Return the array; one of objects comes as a list, if it has one dimension."""
        if self.code.startswith("O"):
            if not isinstance(raw, list) or shape != (len(raw),):
                raise _Refused("a numpy array of objects with several dimensions")
            return raw
        dtype = np.dtype(self.code)
        dtype = dtype.newbyteorder(">") if self.order == ">" else dtype
        if dtype.kind not in PLAIN or dtype.hasobject:
            raise _Refused(f"a numpy array of type {self.code}")
        if not isinstance(raw, bytes) or len(raw) != math.prod(shape) * dtype.itemsize:
            raise ValueError("an array's bytes do not fit its shape")
        return np.frombuffer(raw, dtype).reshape(shape, order=order)  # type: ignore[call-overload]


class _Name:
    """Stands for a name that a pickle may use; it cannot be changed by the pickle."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise _Refused("instructions that change what it uses")


class _NDArray(_Name):
    """Stands for numpy.ndarray, which is only ever named."""


class _Reconstruct(_Name):
    """Stands for the function by which numpy begins an array."""

    def __call__(self, kind: Any, shape: Any, code: Any) -> _Array:
        if not isinstance(kind, _NDArray):
            raise _Refused("an array that is not a plain numpy array")
        return _Array()


class _MakeDType(_Name):
    """Stands for numpy.dtype."""

    def __call__(self, code: Any, *rest: Any) -> _DType:
        return _DType(code, *rest)


class _Scalar(_Name):
    """Stands for the function by which numpy makes a scalar."""

    def __call__(self, dtype: _DType, raw: bytes) -> _Array:
        made = _Array()
        made.value = dtype.array(raw, (1,), "C")[0].item()
        return made


class _Encode(_Name):
    """Stands for _codecs.encode, by which Python 3 writes bytes for Python 2."""

    def __call__(self, text: str, encoding: str = "") -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise _Refused(f"text in the encoding {encoding!r}")
        return text.encode("latin1")


class _Empty(_Name):
    """Stands for bytes, by which Python 3 writes an empty byte string for Python 2."""

    def __call__(self) -> bytes:
        return b""


_NAMES: dict[tuple[str, str], _Name] = {
    ("__builtin__", "bytes"): _Empty(),
    ("_codecs", "encode"): _Encode(),
    ("numpy", "ndarray"): _NDArray(),
    ("numpy", "dtype"): _MakeDType(),
    **{
        (f"numpy.{core}.multiarray", name): stands
        for core in ("core", "_core")
        for name, stands in (("_reconstruct", _Reconstruct()), ("scalar", _Scalar()))
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise _Refused(f"{module}.{name}")
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("a reference to something outside the file")


def _plain(value: Any) -> Any:
    """Return the value with arrays in the place of their descriptions; refuse what is not plain."""
    if isinstance(value, _Array):
        return _plain(value.value) if isinstance(value.value, list) else value.value
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    raise _Refused(f"a {type(value).__name__.lstrip('_')}")
