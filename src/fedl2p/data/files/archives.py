"""Published archives: tar archives are unpacked, zip archives are read in place."""

from __future__ import annotations

import lzma
import os
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from fedl2p.data.files.folders import ProgressCallback, no_progress

MAX_FILE = 64 << 20
"""Most bytes of one file that is read from a zip archive."""

# RuntimeError: an encrypted member, NotImplementedError: an unknown compression
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError)


def unpack(
    archive: Path,
    folder: Path,
    *,
    max_bytes: int,
    max_files: int,
    progress: ProgressCallback = no_progress,
) -> None:
    """Unpack a tar archive, compressed or not, as a folder beside it, completely or not at all.

    Parameters
    ----------
    archive
        The archive.
    folder
        What its files become. A folder of that name around them in the archive is left out.
    max_bytes, max_files
        Most bytes and members that it may unpack to.
    progress
        Called with the number of members.

    Raises
    ------
    ValueError
        If it is damaged, larger than its limits, holds links, devices or a path that leads out of
        the folder, or the disk is full; nothing is left then.
    """
    count = size = 0

    def check(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        nonlocal count, size
        count, size = count + 1, size + member.size
        if size > max_bytes or count > max_files:
            raise tarfile.TarError(
                f"it unpacks to more than {max_bytes} bytes or {max_files} files"
            )
        if not (member.isfile() or member.isdir()):
            raise tarfile.TarError(f"{member.name} is neither a file nor a folder")
        progress(f"unpacking {archive.name}", count, None)
        return tarfile.data_filter(member, path)

    temporary = Path(tempfile.mkdtemp(dir=archive.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    try:
        with in_one_line(archive), tarfile.open(archive) as tar:
            tar.extractall(temporary, filter=check)
            # To the very end, where a compressed archive has its own checksum.
            while tar.fileobj is not None and tar.fileobj.read(1 << 20):
                pass
        around = temporary / folder.name
        made = around if around.is_dir() else temporary
        made.chmod(0o755)  # mkdtemp makes it private
        os.rename(made, folder)
    except OSError as problem:
        raise ValueError(
            f"cannot unpack {archive} as {folder} ({problem.strerror or problem}); free some "
            "space, move away what is there, or name another folder by --root"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class ZipTree:
    """The files of a data set, in its folder or in zip archives there.

    Parameters
    ----------
    root
        The data set's folder.
    inner
        Name of the folder in the published archives. A path may begin with it or not.
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
        self._bases: list[Path | zipfile.Path] = [root]
        for archive in self.archives:
            with in_one_line(archive):
                self._bases.append(zipfile.Path(archive))

    def find(self, path: str, *, source: Path | str) -> Path | zipfile.Path | None:
        """Return a file that ``source`` names by its path, or None if it is missing.

        Raises
        ------
        ValueError
            If the path leads out of the folder.
        """
        parts = PurePosixPath(path.replace("\\", "/")).parts
        if not parts or parts[0] == "/" or ".." in parts or ":" in path:
            raise ValueError(
                f"{source} names the path {path!r}, which leads out of the data folder; it was not "
                "read, fetch the published file again"
            )
        short = "/".join(parts[1:] if parts[0] == self.inner else parts)
        for base in self._bases:
            for name in (short, f"{self.inner}/{short}"):
                if (place := base / name).is_file():
                    return place
        return None

    def read(self, path: str, *, source: Path | str) -> bytes:
        """Return the content of a file that ``source`` names.

        Raises
        ------
        ValueError
            If it is missing, damaged, or larger than :data:`MAX_FILE`.
        """
        place = self.find(path, source=source)
        if place is None:
            raise ValueError(f"{self.root / path}, which {source} names, is missing")
        with in_one_line(place), place.open("rb") as file:
            content = file.read(MAX_FILE + 1)
        if len(content) > MAX_FILE:
            raise ValueError(
                f"{place} has more than {MAX_FILE} bytes; fetch the published file again"
            )
        return content


@contextmanager
def in_one_line(archive: Path | zipfile.Path) -> Iterator[None]:
    """Turn the errors of a damaged archive into one line that names it."""
    try:
        yield
    except (*DAMAGED, OSError) as problem:
        if isinstance(problem, OSError) and problem.errno is not None:
            raise  # the file system's
        why = " ".join(str(problem).split()) or type(problem).__name__
        raise ValueError(
            f"{archive} is damaged or not the published archive ({why}); delete it and fetch it "
            "again"
        ) from None
