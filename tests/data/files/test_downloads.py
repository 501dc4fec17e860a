"""Downloads against a real server: whole, resumed, changed, damaged."""

from __future__ import annotations

import hashlib
from pathlib import Path

import filelock
import numpy as np
import pytest

from fedl2p.data.files import downloads
from fedl2p.data.files.downloads import Remote, fetch, fetch_all, verify
from support.web_server import Served, serve

CONTENT = np.random.default_rng(0).bytes(300_000)
MD5 = "md5:" + hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PAUSE", 0.0)
    monkeypatch.setattr(downloads, "CHUNK", 10_000)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    "checksum",
    [
        "",
        MD5,
        MD5.upper().replace("MD5", "md5"),
        "sha256:" + hashlib.sha256(CONTENT).hexdigest()[:8],
    ],
)
def test_a_file_arrives_whole_and_alone(tmp_path: Path, checksum: str) -> None:
    told: list[tuple[str, int, int | None]] = []
    root = tmp_path / "new" / "folder"
    with serve(Served(CONTENT)) as server:
        remote = Remote(url=server.url, name="file.bin", checksum=checksum)
        path = fetch(remote, root, lambda *a: told.append(a))
        assert path == root / "file.bin"
        assert path.read_bytes() == CONTENT
        assert names(root) == {"file.bin"}
        done = [d for what, d, _ in told if what == "file.bin"]
        assert done == sorted(done)
        assert done[-1] == len(CONTENT)
        assert len(done) > 5
        assert {total for _, _, total in told} == {len(CONTENT)}
        # what is there and in order is not asked for again
        fetch(remote, root)
        assert len(server.asked) == 1


def test_a_broken_connection_is_taken_up_where_it_broke(tmp_path: Path) -> None:
    with serve(Served(CONTENT, breaks=[100_000, 50_000])) as server:
        remote = Remote(url=server.url, name="file.bin", checksum=MD5)
        assert fetch(remote, tmp_path).read_bytes() == CONTENT
        assert names(tmp_path) == {"file.bin"}
        assert [asked.get("Range") for asked in server.asked] == [
            None,
            "bytes=100000-",
            "bytes=150000-",
        ]


def test_a_later_call_goes_on(tmp_path: Path) -> None:
    with serve(Served(CONTENT, breaks=[20_000] * downloads.TRIES)) as server:
        remote = Remote(url=server.url, name="file.bin")
        with pytest.raises(
            ValueError, match=r"100000 bytes are kept in .*file.bin.part: try again"
        ):
            fetch(remote, tmp_path)
        assert not (tmp_path / "file.bin").exists()
        server.asked.clear()
        assert fetch(remote, tmp_path).read_bytes() == CONTENT
        assert server.asked[0]["Range"] == "bytes=100000-"


def test_a_file_that_changed_meanwhile_starts_anew(tmp_path: Path) -> None:
    other = CONTENT[::-1]
    with serve(Served(CONTENT, breaks=[20_000] * downloads.TRIES)) as server:
        remote = Remote(url=server.url, name="file.bin")
        with pytest.raises(ValueError, match="kept"):
            fetch(remote, tmp_path)
        server.content, server.tag = other, '"two"'
        assert fetch(remote, tmp_path).read_bytes() == other


@pytest.mark.parametrize("change", [{"ranges": False}, {"tag": 'W/"weak"'}])
def test_a_server_that_cannot_resume(tmp_path: Path, change: dict[str, object]) -> None:
    with serve(Served(CONTENT, breaks=[70_000], **change)) as server:  # type: ignore[arg-type]
        remote = Remote(url=server.url, name="file.bin", checksum=MD5)
        assert fetch(remote, tmp_path).read_bytes() == CONTENT


def test_all_was_there_but_the_renaming(tmp_path: Path) -> None:
    with serve(Served(CONTENT, breaks=[20_000] * downloads.TRIES)) as server:
        remote = Remote(url=server.url, name="file.bin", checksum=MD5)
        with pytest.raises(ValueError, match="kept"):
            fetch(remote, tmp_path)
        (tmp_path / "file.bin.part").write_bytes(CONTENT)
        assert fetch(remote, tmp_path).read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(tmp_path: Path) -> None:
    with serve(Served(CONTENT[:-1] + b"x")) as server:
        remote = Remote(url=server.url, name="file.bin", checksum=MD5)
        with pytest.raises(ValueError, match=r"its MD5 is \w+, but must be \w+; nothing was kept"):
            fetch(remote, tmp_path)
    assert names(tmp_path) == set()


def test_an_error_of_the_server_is_one_line(tmp_path: Path) -> None:
    with serve(Served(CONTENT, status=404)) as server:
        remote = Remote(url=server.url, name="file.bin")
        (line,) = fetch_all([remote], tmp_path)
        assert f"cannot download {server.url} (the server answered 404 Not Found)" in line
        assert f"place it as {tmp_path / 'file.bin'}" in line
        assert len(server.asked) == 1, "what is not there will not come by asking again"
    url = server.url
    (line,) = fetch_all([Remote(url=url, name="file.bin")], tmp_path)
    assert "cannot download" in line
    assert "\n" not in line


def test_a_damaged_file_in_its_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"mine")
    remote = Remote(url="http://127.0.0.1:1/", name="file.bin", checksum=MD5)
    with pytest.raises(ValueError, match=r"file.bin is damaged: its MD5 .* delete it and fetch"):
        fetch(remote, tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == b"mine"


def test_verify(tmp_path: Path) -> None:
    remote = Remote(url="http://x/", name="file.bin", checksum=MD5)
    assert "is missing" in (verify(remote, tmp_path) or "")
    (tmp_path / "file.bin").write_bytes(CONTENT)
    assert verify(remote, tmp_path) is None


def test_two_downloads_of_one_file_at_a_time(tmp_path: Path) -> None:
    remote = Remote(url="http://127.0.0.1:1/", name="file.bin")
    with (
        filelock.FileLock(tmp_path / ".file.bin.lock"),
        pytest.raises(ValueError, match="being downloaded by another process"),
    ):
        fetch(remote, tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        fetch(Remote(url="http://127.0.0.1:1/", name="a"), tmp_path / "file")


def test_a_checksum_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="md5:HEX or sha256:HEX"):
        Remote(url="u", name="n", checksum="crc:12")
