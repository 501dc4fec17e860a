"""Files inside archives: read where they lie, or unpacked without leaving the folder.

The readers of this room take the published archive or the folder that it unpacks to, whichever is
there; an archive is read in place, so that nothing needs the space twice.
"""

from __future__ import annotations

import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from fedl2p.data.files.folders import Tell, missing, silent

DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,  # an unknown compression
    RuntimeError,  # an encrypted member
)
"""What the standard library raises for an archive that is not whole."""


@contextmanager
def naming(archive: Path) -> Iterator[None]:
    """Turn what a damaged archive raises into one line that names it."""
    try:
        yield
    except DAMAGED as problem:
        why = " ".join(str(problem).split()) or type(problem).__name__
        raise ValueError(
            f"{archive} is damaged or cut off ({why}); delete it and fetch it again"
        ) from None
    except OSError as problem:
        if problem.errno is not None:  # the file system's, not the archive's
            raise
        raise ValueError(
            f"{archive} is damaged or cut off ({problem}); delete it and fetch it again"
        ) from None


def members(
    root: Path, *, archive: str, folder: str, wanted: Sequence[str], name: str
) -> Iterator[tuple[Path, str, IO[bytes]]]:
    """Yield files of a published archive, from it or from the folder that it unpacks to.

    Parameters
    ----------
    root
        The data set's folder.
    archive, folder
        What lies in it: a tar archive, compressed or not, or what it unpacks to.
    wanted
        Last names, e.g. ``data_batch_1``; each is yielded once, in any order.
    name
        The data set's name, for messages.

    Yields
    ------
    path, name, file
        What to name in messages, which of the wanted files it is, and the file, open for reading.
        Read it under :func:`naming` of the path: damage may only show there.

    Raises
    ------
    ValueError
        If neither is there, the archive is damaged, or one of the files is not in it.
    """
    if (root / archive).is_file():
        yield from _tar_members(root / archive, wanted)
    elif (root / folder).is_dir():
        for wants in wanted:
            path = root / folder / wants
            if not path.is_file():
                raise ValueError(
                    f"{path} is missing; fetch the archive with `fedl2p data get {name} --root "
                    f"{root}`, or unpack it again"
                )
            with path.open("rb") as file:
                yield path, wants, file
    else:
        raise missing(root / archive, name)


def source_files(root: Path, *, archive: str, folder: str, wanted: Sequence[str]) -> list[Path]:
    """Return the files that :func:`members` would read, those of them that are there."""
    files = [root / archive] if (root / archive).is_file() else [root / folder / w for w in wanted]
    return [file for file in files if file.is_file()]


def _tar_members(archive: Path, wanted: Sequence[str]) -> Iterator[tuple[Path, str, IO[bytes]]]:
    left = set(wanted)
    with naming(archive), tarfile.open(archive) as tar:
        for member in tar:
            name = PurePosixPath(member.name).name
            file = tar.extractfile(member) if member.isfile() and name in left else None
            if file is not None:
                left.discard(name)
                with file:
                    yield archive, name, file
        # To the very end, where a compressed archive has its own checksum.
        while tar.fileobj is not None and tar.fileobj.read(1 << 20):
            pass
    if left:
        raise ValueError(
            f"{archive} holds no file {min(left)}; delete it and fetch the published archive"
        )


def extract(archive: Path, into: Path, tell: Tell = silent) -> None:
    """Unpack a tar or zip archive as the folder ``into``, completely or not at all.

    Members that would land outside, and links and devices, are refused.

    Raises
    ------
    ValueError
        If ``into`` exists, or the archive is damaged or holds such a member; nothing is left then.
    """
    if into.exists():
        raise ValueError(f"{into} is there already; move it away to unpack {archive} again")
    into.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=into.parent, prefix=f".{into.name}.", suffix=".tmp"))
    try:
        with naming(archive):
            if zipfile.is_zipfile(archive):
                _extract_zip(archive, temporary, tell)
            else:
                _extract_tar(archive, temporary, tell)
        temporary.chmod(0o755)  # mkdtemp makes it private
        os.rename(temporary, into)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _extract_tar(archive: Path, into: Path, tell: Tell) -> None:
    with tarfile.open(archive) as tar:
        for done, member in enumerate(tar, 1):
            if not (member.isfile() or member.isdir()):
                raise ValueError(
                    f"{archive} holds {member.name}, which is neither a file nor a folder; it was "
                    "not unpacked, fetch the published archive again"
                )
            if not PurePosixPath(member.name).parts:  # "./", the folder that was packed
                continue
            safe_path(member.name, source=archive)
            _place(tar.extractfile(member) if member.isfile() else None, into / member.name)
            tell(f"unpacking {archive.name}", done, None)


def _extract_zip(archive: Path, into: Path, tell: Tell) -> None:
    with zipfile.ZipFile(archive) as unpacked:
        members = unpacked.infolist()
        for done, member in enumerate(members, 1):
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ValueError(
                    f"{archive} holds {member.filename}, which is neither a file nor a folder; it "
                    "was not unpacked, fetch the published archive again"
                )
            safe_path(member.filename, source=archive)
            file = None if member.is_dir() else unpacked.open(member)
            _place(file, into / member.filename)
            tell(f"unpacking {archive.name}", done, len(members))


def _place(file: IO[bytes] | None, path: Path) -> None:
    """Write a member; a folder if there is no content."""
    if file is None:
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with file, path.open("wb") as out:
        shutil.copyfileobj(file, out, 1 << 20)


def safe_path(name: str, *, source: Path | str) -> PurePosixPath:
    """Return a path that a file from outside names, if it stays below where it is looked up.

    Raises
    ------
    ValueError
        If it is absolute, or leads upwards.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in name or not path.parts:
        raise ValueError(
            f"{source} names the path {name!r}, which leads out of the data folder; it was not "
            "read, fetch the published file again"
        )
    return path


class FileTree:
    """The files of a data set, each in a folder or inside a zip archive.

    Parameters
    ----------
    root
        The data set's folder.
    inner
        Name of the folder that the published archives unpack to. A path may begin with it or not,
        and a file may lie in it or in ``root``.
    zips
        Names of archives in ``root``; those that are not there are left out.

    Raises
    ------
    ValueError
        If an archive is damaged.
    """

    def __init__(self, root: Path, inner: str, zips: Sequence[str]) -> None:
        self.root, self.inner = root, inner
        self.archives = [root / name for name in zips if (root / name).is_file()]
        self._open: list[zipfile.ZipFile] = []
        self._where: dict[str, tuple[Path, zipfile.ZipFile]] = {}
        for archive in self.archives:
            with naming(archive):
                opened = zipfile.ZipFile(archive)
            self._open.append(opened)
            self._where |= {name: (archive, opened) for name in opened.namelist()}

    def close(self) -> None:
        """Close the archives."""
        for opened in self._open:
            opened.close()

    def find(self, path: str, *, source: Path | str) -> tuple[Path | None, str] | None:
        """Return where a file is, (archive or None, its path there); None if it is nowhere.

        ``source`` is the file that names the path, for messages.
        """
        parts = safe_path(path, source=source).parts
        short = "/".join(parts[1:] if parts[0] == self.inner else parts)
        for name in (short, f"{self.inner}/{short}"):
            if (self.root / name).is_file():
                return None, name
            if name in self._where:
                return self._where[name][0], name
        return None

    def read(self, path: str, *, source: Path | str) -> bytes:
        """Return the content of a file.

        Raises
        ------
        ValueError
            If it is missing, or its archive is damaged.
        """
        found = self.find(path, source=source)
        if found is None:
            raise ValueError(f"{self.root / path}, which {source} names, is missing")
        archive, name = found
        if archive is None:
            return (self.root / name).read_bytes()
        with naming(archive):
            return self._where[name][1].read(name)
