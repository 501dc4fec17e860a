"""Files that are whole or as they were before, whatever stops the writer.

A file is written beside its place, forced to the disk, and only then given its name; the name is
forced to the disk too. A reader never finds a part, and neither a killed process, a lost power
supply nor a full disk spoils what was there.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

_LEFT = ".*.unfinished"


def write_bytes(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Replace a file, or make it; its folder must exist.

    Parameters
    ----------
    path
        The file.
    content
        Its new content.
    sync
        Whether to wait until the disk has it. Without, a killed process still leaves the file old
        or new, but a lost power supply may take it back; for many small files that can be made
        again.

    Raises
    ------
    OSError
        With the file's name, if the disk does not take it; an older file is still there then.
    """
    # The name is never used twice, so that two writers at once cannot mix their contents.
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.unfinished")
    try:
        with unfinished.open("xb") as file:
            file.write(content)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(unfinished, path)
        if sync:
            _sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, sync: bool = True) -> None:
    """Replace a UTF-8 text file, or make it; line ends stay as they are. See write_bytes."""
    write_bytes(path, text.encode("utf-8"), sync=sync)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as safetensors, from any device. See write_bytes.

    Tensors that share memory (tied weights) cannot be written as one; each gets its own copy.
    """
    copies = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    write_bytes(path, save(copies, metadata=dict(metadata) if metadata else None))


def remove_unfinished(folder: Path) -> None:
    """Remove, anywhere below a folder, what a killed process had not finished writing."""
    for path in folder.rglob(_LEFT):
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    # Without this the new name may be lost with the power, though its content is on the disk.
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
