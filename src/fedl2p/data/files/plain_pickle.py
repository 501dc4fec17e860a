"""Pickles of text and numbers, read without executing anything that they name.

A restricted unpickler (https://docs.python.org/3/library/pickle.html#restricting-globals). The only
names that it knows are those by which numpy writes arrays and scalars. numpy's own functions of
these names trust the file, so others stand for them here: an array of text or of numbers comes as
a list, of lists if it has several dimensions.
"""

from __future__ import annotations

import codecs
import io
import pickle
from typing import Any

import numpy as np


def load_plain(content: bytes, *, source: str) -> Any:
    """Return the lists, tuples, dictionaries, text and numbers in a pickle.

    Raises
    ------
    ValueError
        If it holds anything else, or is damaged; one line that names ``source``.
    """
    try:
        return _Unpickler(io.BytesIO(content)).load()
    except _RefusedError as problem:
        raise ValueError(
            f"{source} holds {problem}, not only plain data, and was not read: nothing in a data "
            "file is ever executed; fetch the published file again"
        ) from None
    except Exception as problem:  # a damaged pickle may raise anything
        why = " ".join(str(problem).split()) or type(problem).__name__
        raise ValueError(
            f"{source} is damaged ({why}); delete it and fetch the published file again"
        ) from None


class _RefusedError(Exception):
    """The pickle holds something that is not plain data; the message names it."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        match module.replace("numpy._core", "numpy.core"), name:
            case "numpy", "ndarray":
                return None  # an argument of _reconstruct
            case "numpy", "dtype":
                return _DType
            case "numpy.core.multiarray", "_reconstruct":
                return _Array
            case "numpy.core.multiarray", "scalar":
                return lambda dtype, content: dtype.values(content, ())
            case "_codecs", "encode":  # for bytes in old protocols
                return codecs.encode
        raise _RefusedError(f"{module}.{name}")


class _DType:
    """Stands for numpy.dtype."""

    def __init__(self, code: str, *_: Any) -> None:
        self._code, self._order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._order = state[1]

    def values(self, content: bytes, shape: tuple[int, ...], *, fortran: bool = False) -> Any:
        if not isinstance(self._code, str) or np.dtype(self._code).kind not in "SUiuf":
            raise _RefusedError(f"a numpy array of type {self._code}")
        if 0 in shape:  # a small file may name a huge shape without values
            return []
        dtype = np.dtype(self._code).newbyteorder(self._order)  # type: ignore[arg-type]
        values = np.frombuffer(content, dtype)
        return values.reshape(shape, order="F" if fortran else "C").tolist()


class _Array(list[Any]):
    """Stands for numpy.ndarray: its values."""

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        if not isinstance(content, list):
            self[:] = dtype.values(content, shape, fortran=fortran)
            return
        if shape not in ((), (len(content),)):
            raise _RefusedError("a numpy array of objects with several dimensions")
        self[:] = content
