"""Files from the web: resumed where they broke off, checked, and never half in their place.

What arrives is kept in ``NAME.part`` beside its place, with the server's mark of that version in
``NAME.part.json``; asked again, the download goes on from there (RFC 9110, range requests with
``If-Range``, so that a file that has changed meanwhile starts anew). Only a complete file whose
checksum is right is renamed to NAME.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from fedl2p.data.files.folders import Tell, needs, silent

if TYPE_CHECKING:
    import requests

CHUNK = 1 << 16  # what is lost, at most, where a connection breaks
TIMEOUT = (15.0, 60.0)  # seconds to connect, and between two pieces of the answer
TRIES = 5
PAUSE = 1.0  # seconds before the second try; twice as long before each further one


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A file on the web.

    Parameters
    ----------
    url
        Where it is.
    name
        What it is called in the data set's folder.
    checksum
        ``md5:HEX`` or ``sha256:HEX``; of a SHA-256 the first digits are enough. Empty if none is
        published: then only the length is checked.
    """

    url: str
    name: str
    checksum: str = ""

    def __post_init__(self) -> None:
        kind, _, digits = self.checksum.partition(":")
        if self.checksum and (kind not in ("md5", "sha256") or not digits):
            raise ValueError(f"checksum is {self.checksum!r}, but must be md5:HEX or sha256:HEX")


def fetch(remote: Remote, root: Path, tell: Tell = silent) -> Path:
    """Return the file's path in ``root``, downloaded unless it is there and in order.

    Raises
    ------
    ValueError
        If it cannot be downloaded or its checksum is wrong; or if a damaged file is in its place,
        which is left alone. One line that says what to do.
    """
    path = root / remote.name
    if path.exists():
        problem = verify(remote, root, tell)
        if problem is not None:
            raise ValueError(problem)
        return path
    import filelock

    lock = root / f".{remote.name}.lock"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(lock, timeout=0):
            try:
                _download(remote, path, tell)
            finally:
                lock.unlink(missing_ok=True)
    except filelock.Timeout:
        raise ValueError(f"{path} is being downloaded by another process; wait for it") from None
    except OSError as problem:
        raise ValueError(
            f"cannot write {path} ({problem.strerror or problem}); free some space, or name "
            "another folder by --root"
        ) from None
    return path


def fetch_all(remotes: Iterable[Remote], root: Path, tell: Tell = silent) -> list[str]:
    """Fetch files one after another; return what was wrong with each that could not be fetched."""
    problems = []
    for remote in remotes:
        try:
            fetch(remote, root, tell)
        except ValueError as problem:
            problems.append(str(problem))
    return problems


def verify(remote: Remote, root: Path, tell: Tell = silent) -> str | None:
    """Return what is wrong with a file that should be in ``root``, in one line, or None."""
    path = root / remote.name
    if not path.is_file():
        return f"{path} is missing; download {remote.url} and place it there"
    if remote.checksum and (found := _sum(remote, path, tell)) is not None:
        return f"{path} is damaged: {found}; delete it and fetch it again"
    return None


def _download(remote: Remote, path: Path, tell: Tell) -> None:
    """Download into NAME.part, try again where the connection breaks, check, and rename."""
    part = path.with_name(path.name + ".part")
    mark = part.with_name(part.name + ".json")
    reason, again = "", True
    for tried in range(TRIES):
        if tried:
            time.sleep(PAUSE * 2 ** (tried - 1))
        reason, again = _go_on(remote, part, mark, tell)
        if not again:
            break
    if reason:
        kept = f"; {part.stat().st_size} bytes are kept in {part}" if part.exists() else ""
        raise ValueError(
            f"cannot download {remote.url} ({reason}){kept}: try again to go on, or download it by "
            f"other means and place it as {path}"
        )
    if remote.checksum and (found := _sum(remote, part, tell)) is not None:
        part.unlink()
        mark.unlink(missing_ok=True)
        raise ValueError(
            f"what {remote.url} sent is not the published file: {found}; nothing was kept, try "
            f"again or place the right file as {path}"
        )
    os.replace(part, path)
    mark.unlink(missing_ok=True)


def _go_on(remote: Remote, part: Path, mark: Path, tell: Tell) -> tuple[str, bool]:
    """Fetch what is missing of NAME.part.

    Returns
    -------
    reason, again
        Why it is not whole, "" if it is; and whether trying again may help.
    """
    with needs("requests"):
        import requests

    have, version = _kept(remote, part, mark)
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    try:
        with requests.get(remote.url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            if answer.status_code == 416:  # nothing after what we have: is it the whole?
                total = _total(answer, 0)
                if total != have:
                    part.unlink()
                    return "the file on the server has changed", True
                return "", False
            answer.raise_for_status()
            have = have if answer.status_code == 206 and _begins_at(answer, have) else 0
            total = _total(answer, have)
            _remember(remote, mark, answer)
            with part.open("ab" if have else "wb") as file:
                done = _receive(answer, file, have, total, remote.name, tell)
    except requests.RequestException as problem:
        status = 0 if problem.response is None else problem.response.status_code
        return _reason(problem), not 400 <= status < 500 or status == 429
    if total is not None and done != total:
        return f"only {done} of {total} bytes came", True
    return "", False


def _kept(remote: Remote, part: Path, mark: Path) -> tuple[int, str]:
    """Return how many bytes are there of which version; 0 if it cannot be told."""
    try:
        said = json.loads(mark.read_text(encoding="utf-8"))
        have = part.stat().st_size
        if said["url"] == remote.url and isinstance(said["version"], str) and said["version"]:
            return have, said["version"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return 0, ""


def _remember(remote: Remote, mark: Path, answer: requests.Response) -> None:
    """Note the version that comes; a weak entity tag does not promise equal bytes."""
    tag = answer.headers.get("ETag", "")
    version = "" if tag.startswith("W/") else tag
    version = version or answer.headers.get("Last-Modified", "")
    mark.write_text(json.dumps({"url": remote.url, "version": version}), encoding="utf-8")


def _receive(
    answer: requests.Response, file: IO[bytes], done: int, total: int | None, name: str, tell: Tell
) -> int:
    """Append the body to the file and return its length."""
    for piece in answer.iter_content(CHUNK):
        file.write(piece)
        done += len(piece)
        tell(name, done, total)
    file.flush()
    os.fsync(file.fileno())
    return done


def _begins_at(answer: requests.Response, have: int) -> bool:
    return answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")


def _total(answer: requests.Response, have: int) -> int | None:
    """Return the length of the whole file, None if the server does not say."""
    ranged = answer.headers.get("Content-Range", "").rpartition("/")[2]
    if ranged.isdecimal():
        return int(ranged)
    length = answer.headers.get("Content-Length", "")
    return have + int(length) if length.isdecimal() and answer.status_code != 416 else None


def _reason(problem: Exception) -> str:
    """Return why a request failed in a few words; the libraries' own messages nest."""
    answer = getattr(problem, "response", None)
    if answer is not None:
        return f"the server answered {answer.status_code} {answer.reason}"
    name = type(problem).__name__
    known = {
        "ChunkedEncodingError": "the connection broke",
        "ConnectionError": "no connection to the server",
        "ConnectTimeout": "no connection to the server",
        "ReadTimeout": "the server fell silent",
    }
    return known.get(name, f"{name}: {' '.join(str(problem).split())[:200]}")


def _sum(remote: Remote, path: Path, tell: Tell) -> str | None:
    """Return how a file's checksum differs from the published one, or None."""
    kind, _, wanted = remote.checksum.partition(":")
    digest = hashlib.new(kind, usedforsecurity=False)
    total, done = path.stat().st_size, 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            done += len(piece)
            tell(f"checking {remote.name}", done, total)
    found = digest.hexdigest()
    if found.startswith(wanted.lower()):
        return None
    return f"its {kind.upper()} is {found}, but must be {wanted}"
