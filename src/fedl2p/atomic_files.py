"""Files that are whole or as they were before, whatever stops the writer.

A file is written beside its place, forced to the disk, and only then given its name; the name is
forced to the disk too. A reader never finds a part, and neither a killed process, a lost power
supply nor a full disk spoils the older content. A symbolic link is replaced, never written
through. Small files are read with a bound.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 64 << 20
"""Most bytes of a small text file: settings, or the names of a model's layers."""

_UNFINISHED = ".*.unfinished"

# Systems that lack a flag lack what it is against.
_NOT_THROUGH_LINKS = getattr(os, "O_NOFOLLOW", 0)
_NOT_WAITING = getattr(os, "O_NONBLOCK", 0)
_NO_TRANSLATION = getattr(os, "O_BINARY", 0)


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
    from safetensors.torch import save

    copies = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    write_bytes(path, save(copies, metadata=dict(metadata) if metadata else None))


def open_to_append(path: Path) -> TextIO:
    """Open a UTF-8 text file for appending, or make it; line ends stay as they are.

    Raises
    ------
    OSError
        With the file's name, if it cannot be opened or is a symbolic link.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | _NOT_THROUGH_LINKS | _NO_TRANSLATION
    return os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8", newline="")


def read_text(path: Path, *, limit: int = SMALL) -> str:
    """Return the content of a UTF-8 text file of at most ``limit`` bytes.

    Raises
    ------
    OSError
        If it cannot be read, with FileNotFoundError for a missing one.
    UnicodeDecodeError
        If it is not UTF-8.
    ValueError
        If it is larger, or no regular file; the message says what it is.
    """
    # A pipe would wait for its writer, a device may never end.
    handle = os.open(path, os.O_RDONLY | _NOT_WAITING | _NO_TRANSLATION)
    try:
        check_regular(os.fstat(handle))
        with os.fdopen(handle, "rb", closefd=False) as file:
            content = file.read(limit + 1)
    finally:
        os.close(handle)
    if len(content) > limit:
        raise ValueError(f"it is larger than {limit} bytes")
    return content.decode("utf-8")


def check_regular(found: os.stat_result) -> None:
    """Raise ValueError for what is no regular file, e.g. a folder, a pipe or a device."""
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file"
        raise ValueError(f"it is {what}")


def refuse_special_files(path: Path) -> None:
    """Refuse anything but files and folders, at a path or below it; a missing path passes.

    Raises
    ------
    ValueError
        With the name of the first symbolic link, pipe, device or socket.
    """
    below = (Path(top, name) for top, dirs, files in os.walk(path) for name in (*dirs, *files))
    for place in (path, *below):
        if place.is_symlink() or (place.exists() and not (place.is_file() or place.is_dir())):
            what = "a symbolic link" if place.is_symlink() else "no regular file"
            raise ValueError(
                f"{place} is {what}, and nothing is written through such; remove it, or give "
                "another folder"
            )


def remove_unfinished(path: Path) -> None:
    """Remove what a killed process had not finished writing of a file, or anywhere in a folder."""
    for unfinished in (*path.parent.glob(f".{path.name}.*.unfinished"), *path.rglob(_UNFINISHED)):
        unfinished.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    # Without this the new name may be lost with the power, though its content is on the disk.
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
