"""Decoding of image files to uint8 pixels of one size."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np

from fedl2p.data.files.folders import needs

CHUNK = 64
"""Files that are read and decoded at a time."""


def decode(
    content: bytes, *, size: tuple[int, int] | None, source: str, channels: int = 3
) -> np.ndarray[Any, Any]:
    """Return an image file's pixels.

    Parameters
    ----------
    content
        The file: JPEG, PNG or another format that Pillow knows.
    size
        Height and width that it is resized to (bilinear, the ratio of sides not kept); None to
        leave it as it is.
    source
        Name of the file in messages.
    channels
        3 for colours, 1 for grey.

    Returns
    -------
    ndarray
        Shape (channels, height, width), uint8.

    Raises
    ------
    ValueError
        If it is no readable image.
    """
    with needs("PIL"):
        from PIL import Image
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as opened:
                image = opened.convert("RGB" if channels == 3 else "L")
    except (OSError, ValueError, SyntaxError, EOFError, Warning, Image.DecompressionBombError) as e:
        why = " ".join(str(e).split())[:200] or type(e).__name__
        raise ValueError(
            f"{source} is no readable image ({why}); fetch the published file again"
        ) from None
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels.transpose(2, 0, 1) if channels == 3 else pixels[None]


def decode_all(
    files: Iterable[tuple[str, bytes]], *, size: tuple[int, int] | None, channels: int = 3
) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the pixels of (source, content) pairs in order, decoded by several threads."""
    left = iter(files)
    with ThreadPoolExecutor() as pool:
        while chunk := list(islice(left, CHUNK)):
            yield from pool.map(
                lambda f: decode(f[1], size=size, source=f[0], channels=channels), chunk
            )
