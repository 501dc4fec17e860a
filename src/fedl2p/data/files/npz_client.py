"""One client's .npz file, checked: every fault is one line that names the file.

A file has the arrays ``x_train`` and ``y_train`` and, if the client has such parts,
``x_validation`` and ``y_validation``, ``x_test`` and ``y_test``. Inputs are of shape (n, ...), of
any floating type and not scaled, or ``uint8`` images, scaled to [0, 1]; labels are integers from 0,
of shape (n,). Files with pickled objects are refused: nothing in a data file is ever executed.

If there is no validation part, a fifth of the training part becomes one. The file's name decides
which examples (the published 80/20 split, the same under every seed of a study).
"""

from __future__ import annotations

import lzma
import struct
import tokenize
import zipfile
import zlib
from os import PathLike
from pathlib import Path

import numpy as np
import torch

from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.seeds import generator

PARTS = ("train", "validation", "test")

VALIDATION_SHARE = 0.2

# A larger label is far more likely a mistake (an identifier, a pixel) than a class.
MAX_CLASSES = 100_000

# A file of some megabytes can unpack to a thousand times its size, and fill the memory.
MAX_BYTES = 2 * 2**30

_KNOWN = frozenset(f"{axis}_{part}" for part in PARTS for axis in "xy")


def read_npz_client(
    path: str | PathLike[str],
    *,
    shape: tuple[int, ...] | None = None,
    classes: int | None = None,
    split: bool = True,
    max_bytes: int = MAX_BYTES,
) -> ClientData:
    """Read and check one client's .npz file.

    Parameters
    ----------
    path
        The file; its name without the suffix decides which examples a split takes.
    shape
        Shape that an example must have; None for any.
    classes
        Number of classes that labels must stay below; None for any.
    split
        Whether a fifth of the training part becomes the validation part of a file without one; if
        not, its ``validation`` is None.
    max_bytes
        Most bytes that the arrays may take unpacked; a larger file is refused unread.

    Returns
    -------
    ClientData
        Inputs float32, labels int64.

    Raises
    ------
    ValueError
        If the file cannot be read, holds pickled objects, or its arrays are not as described at
        the top of this module; one line that names the file and says what to do.
    """
    path = Path(path)
    arrays = _read_arrays(path, max_bytes)
    parts = {part: _read_part(path, part, arrays) for part in PARTS if f"x_{part}" in arrays}
    kinds = {part: arrays[f"x_{part}"].dtype == np.uint8 for part in parts}
    if len(set(kinds.values())) > 1:
        raise ValueError(
            f"{path}: {' and '.join(f'x_{part} is {_kind(u)}' for part, u in kinds.items())}; "
            "store the inputs of all parts the same way, as uint8 or as floats"
        )
    for part, examples in parts.items():
        _check_fits(path, part, examples, shape or tuple(parts["train"].x.shape[1:]), classes)
    train, validation = parts["train"], parts.get("validation")
    if validation is None and split:
        train, validation = _split(path, train)
    return ClientData(train, validation, parts.get("test"))


def _read_arrays(path: Path, max_bytes: int) -> dict[str, np.ndarray]:
    """Return the file's arrays by name, without ever unpickling anything.

    Only what has a known name is unpacked, and nothing if it would take too much memory.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; name an existing .npz file")
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile) or loaded.zip is None:
            raise ValueError("it holds a single array")
        with loaded:
            names = set(loaded.files)
            _check_size(path, loaded.zip, max_bytes)
            arrays = {name: loaded[name] for name in loaded.files if name in _KNOWN}
    except _TooLargeError as error:
        raise ValueError(str(error)) from None
    except (
        OSError,
        EOFError,
        ValueError,
        RuntimeError,  # an encrypted member
        NotImplementedError,  # an unknown compression
        MemoryError,  # a header that claims a vast array
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        IndexError,  # bytes that are no header
        struct.error,
        TypeError,
        AttributeError,
        KeyError,
        OverflowError,
        SyntaxError,
        tokenize.TokenError,
        RecursionError,
    ) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path}: not a readable .npz file of plain arrays ({why}); write it with "
            "numpy.savez(file, x_train=..., y_train=...), without object arrays"
        ) from error
    _check_names(path, names)
    return arrays


class _TooLargeError(ValueError):
    """A file that would unpack to too much."""


def _check_size(path: Path, archive: zipfile.ZipFile, max_bytes: int) -> None:
    # zipfile unpacks no more of a member than the size in the archive's directory.
    sizes = {
        info.filename: info.file_size
        for info in archive.infolist()
        if info.filename.removesuffix(".npy") in _KNOWN
    }
    if sum(sizes.values()) > max_bytes:
        raise _TooLargeError(
            f"{path}: its arrays take {sum(sizes.values())} bytes unpacked, more than {max_bytes}; "
            "give fewer examples or, if the file is to be trusted, raise max_bytes of NpzFolder "
            "(--data.max-bytes)"
        )


def _check_names(path: Path, names: set[str]) -> None:
    known = set(_KNOWN)
    # A misspelt part (x_val) is an error, not a missing part; other arrays are ignored.
    for name in sorted(names - known):
        if name.startswith(("x_", "y_")):
            raise ValueError(f"{path}: unknown array {name}; the names are {_listed(known)}")
    required = {"x_train", "y_train"}
    for part in PARTS[1:]:
        pair = {f"x_{part}", f"y_{part}"}
        if pair & names:
            required |= pair
    if required - names:
        raise ValueError(f"{path}: {_listed(required - names)} missing; add it to the file")


def _read_part(path: Path, part: str, arrays: dict[str, np.ndarray]) -> Examples:
    x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
    at = f"{path}: x_{part}"
    if not isinstance(x, np.ndarray) or not isinstance(y, np.ndarray):
        raise ValueError(f"{at} or y_{part} is not an array; write the file with numpy.savez")
    if x.ndim < 2:
        raise ValueError(f"{at} has shape {x.shape}; give (examples, ...), e.g. (n, 3, 32, 32)")
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise ValueError(f"{at} is of type {x.dtype}; give floats, or uint8 images")
    if len(x) == 0:
        raise ValueError(f"{at} has no examples; leave an empty part, or this client, out")
    if x.size == 0:
        raise ValueError(f"{at} has shape {x.shape}; no dimension may be empty")
    y = _read_labels(path, part, y)
    if len(x) != len(y):
        raise ValueError(f"{at} has {len(x)} examples but y_{part} {len(y)}; give one label each")
    scale = np.float32(255 if x.dtype == np.uint8 else 1)
    with np.errstate(over="ignore"):  # overflow is an error below
        inputs = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32) / scale)
    if not bool(torch.isfinite(inputs).all()):
        bad = int((~torch.isfinite(inputs)).flatten(1).any(1).sum())
        raise ValueError(
            f"{at} has values that are not finite numbers in float32, in {bad} of {len(x)} "
            "examples; remove or replace them"
        )
    return Examples(inputs, torch.from_numpy(y))


def _read_labels(path: Path, part: str, y: np.ndarray) -> np.ndarray:
    at = f"{path}: y_{part}"
    if y.ndim != 1:
        raise ValueError(f"{at} has shape {y.shape}; give one class number per example, (n,)")
    if y.dtype.kind not in "iu":
        raise ValueError(f"{at} is of type {y.dtype}; give integer class numbers from 0")
    if len(y) and y.min() < 0:
        raise ValueError(f"{at} has the label {y.min()}; number the classes from 0")
    if len(y) and y.max() >= MAX_CLASSES:
        raise ValueError(f"{at} has the label {y.max()}; number the classes from 0 without gaps")
    return y.astype(np.int64)


def _check_fits(
    path: Path, part: str, examples: Examples, shape: tuple[int, ...], classes: int | None
) -> None:
    if tuple(examples.x.shape[1:]) != shape:
        raise ValueError(
            f"{path}: x_{part} has examples of shape {tuple(examples.x.shape[1:])} where {shape} "
            "is wanted; give all clients and parts examples of one shape"
        )
    if classes is not None and int(examples.y.max()) >= classes:
        raise ValueError(
            f"{path}: y_{part} has the label {int(examples.y.max())} but there are {classes} "
            f"classes, 0 to {classes - 1}; correct the label or the number of classes"
        )


def _split(path: Path, train: Examples) -> tuple[Examples, Examples]:
    """Return training and validation parts, 80/20, at least one example each."""
    total = len(train.y)
    if total < 2:
        raise ValueError(
            f"{path}: x_train has only 1 example, which cannot be split into training and "
            "validation; give at least 2, or x_validation and y_validation"
        )
    order = torch.randperm(total, generator=generator("npz", path.stem, "split"))
    count = max(1, round(VALIDATION_SHARE * total))
    kept = order[count:].sort().values
    validation = order[:count].sort().values
    return (
        Examples(train.x[kept], train.y[kept]),
        Examples(train.x[validation], train.y[validation]),
    )


def _kind(is_uint8: bool) -> str:
    return "uint8" if is_uint8 else "floating"


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
