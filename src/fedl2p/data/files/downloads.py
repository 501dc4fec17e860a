"""Downloads by pooch: a file arrives whole and with its published checksum, or not at all.

What comes is written to a temporary file beside its place and renamed when its checksum is right.
An interrupted download starts again from the first byte.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedl2p.data.files.folders import ProgressCallback, needs, no_progress

CHUNK = 1 << 16  # bytes between two reports of progress
TIMEOUT = (15.0, 60.0)  # seconds to connect, and between two pieces of the answer
RETRIES = 2  # after a broken connection, an error of the server or a wrong checksum


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file on the web.

    Parameters
    ----------
    url
        Its address.
    name
        Its name in the data set's folder.
    checksum
        ``md5:HEX`` or ``sha256:HEX``; empty if none is published: only the length is checked then.
    """

    url: str
    name: str
    checksum: str = ""


def fetch(file: RemoteFile, root: Path, progress: ProgressCallback = no_progress) -> Path:
    """Download a file into ``root`` unless it is there; return its path.

    Raises
    ------
    ValueError
        In one line, if the download fails, its checksum is wrong or it cannot be written: nothing
        is left then. Also if a damaged file is there already, which is left alone.
    """
    path = root / file.name
    if path.exists():
        if (problem := verify(file, root)) is not None:
            raise ValueError(problem)
        return path
    with needs("pooch"):
        import pooch
    import requests

    pooch.get_logger().setLevel(logging.WARNING)
    registry = pooch.create(
        path=root,
        base_url="",
        registry={file.name: file.checksum or None},
        urls={file.name: file.url},
        retry_if_failed=RETRIES,
    )
    downloader = pooch.HTTPDownloader(
        progressbar=_Bar(file.name, progress),
        chunk_size=CHUNK,
        timeout=TIMEOUT,
        headers={"Accept-Encoding": "identity"},  # else the length is that of the compressed file
    )
    try:
        registry.fetch(file.name, downloader=downloader)
        path.chmod(0o644)  # a temporary file is private
    except (requests.RequestException, ValueError) as problem:  # ValueError: a wrong checksum
        raise ValueError(
            f"cannot download {file.url} ({' '.join(str(problem).split())}): try again, or "
            f"download it by other means and place it as {path}"
        ) from None
    except OSError as problem:
        raise ValueError(
            f"cannot write {path} ({problem.strerror or problem}); free some space, or name "
            "another folder by --root"
        ) from None
    return path


def fetch_all(
    files: Iterable[RemoteFile], root: Path, progress: ProgressCallback = no_progress
) -> list[str]:
    """Fetch files one after another; return the error of each one that cannot be fetched."""
    problems = []
    for file in files:
        try:
            fetch(file, root, progress)
        except ValueError as problem:
            problems.append(str(problem))
    return problems


def verify(file: RemoteFile, root: Path) -> str | None:
    """Return in one line what is wrong with a file that should be in ``root``, or None."""
    path = root / file.name
    if not path.is_file():
        return f"{path} is missing; download {file.url} and place it there"
    kind, _, expected = file.checksum.partition(":")
    if not kind:
        return None
    with path.open("rb") as content:
        # Without usedforsecurity=False some systems refuse MD5.
        digest = hashlib.file_digest(content, lambda: hashlib.new(kind, usedforsecurity=False))
    if digest.hexdigest() == expected:
        return None
    return (
        f"{path} is damaged: its {kind.upper()} is {digest.hexdigest()}, but must be {expected}; "
        "delete it and fetch it again"
    )


class _Bar:
    """A progress bar as pooch calls it."""

    total = 0  # set by pooch; 0 if the server does not say

    def __init__(self, name: str, progress: ProgressCallback) -> None:
        self._name, self._progress, self._done = name, progress, 0

    def update(self, count: int) -> None:
        self._done += count
        done = min(self._done, self.total) if self.total else self._done
        self._progress(self._name, done, self.total or None)

    def reset(self) -> None:
        self._done = 0

    close = reset
