"""Downloads against a real server: whole, broken, damaged; nothing half is ever left."""

from __future__ import annotations

import hashlib
import resource
from pathlib import Path

import numpy as np
import pytest

from fedl2p.data.files import downloads
from fedl2p.data.files.downloads import RemoteFile, fetch, fetch_all, verify
from support.web_server import Served, serve

pytest.importorskip("pooch")

CONTENT = np.random.default_rng(0).bytes(300_000)
MD5 = "md5:" + hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()
SHA256 = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)
    monkeypatch.setattr(downloads, "CHUNK", 10_000)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("checksum", ["", MD5, SHA256])
def test_a_file_arrives_whole_and_alone(
    tmp_path: Path, checksum: str, capfd: pytest.CaptureFixture[str]
) -> None:
    reports: list[tuple[str, int, int | None]] = []
    root = tmp_path / "new" / "folder"
    with serve(Served(CONTENT)) as server:
        file = RemoteFile(url=server.url, name="file.bin", checksum=checksum)
        path = fetch(file, root, lambda *report: reports.append(report))
        assert path == root / "file.bin"
        assert path.read_bytes() == CONTENT
        assert path.stat().st_mode & 0o777 == 0o644
        assert names(root) == {"file.bin"}
        done = [report[1] for report in reports]
        assert done == sorted(done)
        assert done[-1] == len(CONTENT)
        assert len(done) > 5
        assert {(what, total) for what, _, total in reports} == {("file.bin", len(CONTENT))}
        # what is there and in order is not asked for again
        fetch(file, root)
        assert server.asked == 1
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("checksum", ["", MD5])
def test_a_broken_connection_is_tried_again(tmp_path: Path, checksum: str) -> None:
    """Without a checksum the length alone shows that the file is cut off."""
    with serve(Served(CONTENT, breaks=[100_000] * downloads.RETRIES)) as server:
        file = RemoteFile(url=server.url, name="file.bin", checksum=checksum)
        assert fetch(file, tmp_path).read_bytes() == CONTENT
        assert server.asked == 1 + downloads.RETRIES
    assert names(tmp_path) == {"file.bin"}


def test_a_connection_that_always_breaks_leaves_nothing(tmp_path: Path) -> None:
    with serve(Served(CONTENT, breaks=[20_000] * 9)) as server:
        file = RemoteFile(url=server.url, name="file.bin")
        with pytest.raises(ValueError, match=r"^cannot download http.*: try again, or") as refused:
            fetch(file, tmp_path)
    assert "\n" not in str(refused.value)
    assert names(tmp_path) == set()


def test_a_wrong_checksum_leaves_nothing(tmp_path: Path) -> None:
    with serve(Served(CONTENT[:-1] + b"x")) as server:
        file = RemoteFile(url=server.url, name="file.bin", checksum=MD5)
        with pytest.raises(ValueError, match=r"does not match the known hash: expected md5"):
            fetch(file, tmp_path)
    assert names(tmp_path) == set()


def test_a_download_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with serve(Served(CONTENT)) as server, pytest.raises(KeyboardInterrupt):
        fetch(RemoteFile(url=server.url, name="file.bin"), tmp_path, interrupt)
    assert names(tmp_path) == set()


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # no file may be larger
    try:
        with serve(Served(CONTENT)) as server:
            file = RemoteFile(url=server.url, name="file.bin")
            with pytest.raises(ValueError, match=r"^cannot write .*file.bin \(File too large\)"):
                fetch(file, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == set()


def test_an_error_of_the_server_is_one_line(tmp_path: Path) -> None:
    with serve(Served(CONTENT, status=404)) as server:
        file = RemoteFile(url=server.url, name="file.bin")
        (line,) = fetch_all([file], tmp_path)
        assert line.startswith(f"cannot download {server.url} (404 Client Error: Not Found")
        assert line.endswith(f"place it as {tmp_path / 'file.bin'}")
    (line,) = fetch_all([file], tmp_path)  # now there is no server
    assert "cannot download" in line
    assert "\n" not in line


def test_a_damaged_file_in_its_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"mine")
    file = RemoteFile(url="http://127.0.0.1:1/", name="file.bin", checksum=MD5)
    with pytest.raises(ValueError, match=r"file.bin is damaged: its MD5 .* delete it and fetch"):
        fetch(file, tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == b"mine"


def test_verify(tmp_path: Path) -> None:
    files = [RemoteFile(url="http://x/", name="file.bin", checksum=c) for c in ("", MD5, SHA256)]
    for file in files:
        assert "file.bin is missing; download http://x/" in (verify(file, tmp_path) or "")
    (tmp_path / "file.bin").write_bytes(CONTENT)
    assert [verify(file, tmp_path) for file in files] == [None] * 3
    (tmp_path / "file.bin").write_bytes(CONTENT[:-1])
    problems = [verify(file, tmp_path) for file in files]
    assert problems[0] is None, "nothing is published that it could be compared with"
    assert "its MD5 is" in (problems[1] or "")
    assert "its SHA256 is" in (problems[2] or "")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        fetch(RemoteFile(url="http://127.0.0.1:1/", name="a"), tmp_path / "file")
