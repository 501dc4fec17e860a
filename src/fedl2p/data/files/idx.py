"""Arrays in the idx format of MNIST and its kin (http://yann.lecun.com/exdb/mnist), plain or gzip.

Two zero bytes, a byte for the type, one for the number of dimensions, their sizes as big-endian
32-bit numbers, then the values, big-endian, the last dimension fastest.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np

LARGEST = 2 << 30
"""Most bytes of values that are read."""

MOST_DIMENSIONS = 8

CHUNK = 1 << 20  # bytes

TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
"""numpy's name of each type by its byte."""


def read_idx(path: Path, *, largest: int = LARGEST) -> np.ndarray:
    """Return the array in an idx file, in the machine's byte order.

    Parameters
    ----------
    path
        The file; whether it is compressed by gzip is told by its first bytes.
    largest
        Most bytes of values, after decompression. No more are read, whatever the file says.

    Raises
    ------
    ValueError
        In one line, if the file is missing, no idx file, cut off, too long or too large.
    """
    try:
        with path.open("rb") as file:
            if file.read(2) != b"\x1f\x8b":
                file.seek(0)
                return _read(file, path, largest)
            file.seek(0)
            with gzip.GzipFile(fileobj=file) as content:
                return _read(cast("IO[bytes]", content), path, largest)
    except (EOFError, gzip.BadGzipFile, zlib.error) as problem:
        raise ValueError(f"{path} is damaged ({problem}); fetch the file again") from None
    except OSError as problem:
        raise ValueError(
            f"cannot read {path} ({problem.strerror or problem}); name a readable idx file"
        ) from None


def _read(file: IO[bytes], path: Path, largest: int) -> np.ndarray:
    head = file.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in TYPES:
        raise ValueError(
            f"{path} begins with the bytes {head.hex(' ') or 'of an empty file'}, not with those "
            "of an idx file (00 00, a type, the number of dimensions); name an idx file"
        )
    dtype, dimensions = np.dtype(TYPES[head[2]]), head[3]
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise ValueError(
            f"{path} says that it has {dimensions} dimensions, but may have 1 to "
            f"{MOST_DIMENSIONS}; fetch the file again"
        )
    sizes = file.read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise ValueError(f"{path} is cut off in its header; fetch the file again")
    shape = tuple(np.frombuffer(sizes, ">u4").tolist())
    expected = math.prod(shape) * dtype.itemsize
    if expected > largest:
        raise ValueError(
            f"{path} says that it holds {expected} bytes of values, but at most {largest} are "
            "read; divide it into several files"
        )
    values = _at_most(file, expected + 1)
    if len(values) != expected:
        found = "more" if len(values) > expected else f"{len(values)}"
        raise ValueError(
            f"{path} must hold {expected} bytes of values by its header, but holds {found}; fetch "
            "the file again"
        )
    return np.frombuffer(values, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def _at_most(file: IO[bytes], count: int) -> bytearray:
    """Return so many bytes, or what is there: memory grows with the content, not with ``count``."""
    content = bytearray()
    while len(content) < count and (chunk := file.read(min(CHUNK, count - len(content)))):
        content += chunk
    return content
