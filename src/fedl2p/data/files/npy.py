"""Rows of a .npy file, read from an open stream; nothing in it is ever executed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy


class NpyRows:
    """The rows (first dimension) of a .npy file.

    Parameters
    ----------
    file
        At the beginning of the .npy content.
    shape
        Shape that a row must have.
    kinds
        Names of the types that it may have.
    source
        What to call the file in messages.

    Attributes
    ----------
    count
        Number of rows.

    Raises
    ------
    ValueError
        If it is no .npy file of such rows; one line that names it.
    """

    def __init__(
        self, file: IO[bytes], *, shape: tuple[int, ...], kinds: Sequence[str], source: str
    ) -> None:
        self._file, self._shape, self._source = file, shape, source
        try:
            version = npy.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"version {version}")
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            found, fortran, self._dtype = read(file)
        except ValueError as problem:
            why = " ".join(str(problem).split())
            raise ValueError(
                f"{source} is no .npy file, or damaged ({why}); fetch it again"
            ) from None
        if self._dtype.name not in kinds or fortran:
            raise ValueError(
                f"{source} holds rows of {self._dtype}, but must hold {' or '.join(kinds)}; fetch "
                "the published file"
            )
        if not found or found[1:] != shape:
            raise ValueError(
                f"{source} is of shape {found}, but must be of {('n', *shape)}; fetch the "
                "published file".replace("'n'", "n")
            )
        self.count = int(found[0])
        self._next = 0

    def read(self, begin: int, count: int) -> np.ndarray[Any, Any]:
        """Return rows, of shape (count, *shape); from where the last call ended, or behind.

        Raises
        ------
        ValueError
            If the file is cut off.
        """
        size = int(np.prod(self._shape, dtype=np.int64)) * self._dtype.itemsize
        self._file.seek((begin - self._next) * size, 1)
        self._next = begin + count
        content = self._file.read(count * size)
        if len(content) != count * size:
            raise ValueError(f"{self._source} is cut off; delete it and fetch it again")
        return np.frombuffer(content, self._dtype).reshape(count, *self._shape)
