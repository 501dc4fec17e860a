"""Archives: unpacked completely or not at all, never outside; files found where they lie."""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fedl2p.data.files.archives import FileTree, extract, members, naming, safe_path
from support import data_archives

FILES = {"set/a.txt": b"one", "set/deep/b.bin": bytes(range(256)) * 1000}


def unpacked(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.zip"])
def test_everything_is_unpacked(tmp_path: Path, name: str) -> None:
    write = data_archives.write_zip if name.endswith("zip") else data_archives.write_tar
    archive = write(tmp_path / name, FILES)
    told: list[int] = []
    extract(archive, tmp_path / "out", lambda what, done, total: told.append(done))
    assert unpacked(tmp_path / "out") == FILES
    assert told == [1, 2]
    assert {p.name for p in tmp_path.iterdir()} == {name, "out"}
    with pytest.raises(ValueError, match="there already"):
        extract(archive, tmp_path / "out")


def tar_with(path: Path, member: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as tar:
        good = tarfile.TarInfo("good.txt")
        good.size = 2
        tar.addfile(good, io.BytesIO(b"ok"))
        tar.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def zip_with(path: Path, name: str, mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("good.txt", "ok")
        member = zipfile.ZipInfo(name)
        member.external_attr = mode << 16
        archive.writestr(member, "x")
    return path


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    member.linkname = link
    return member


def plain(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = 1
    return member


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: tar_with(folder / "x.tar", plain("../outside.txt")),
        lambda folder: tar_with(folder / "x.tar", plain("a/../../outside.txt")),
        lambda folder: tar_with(folder / "x.tar", plain(f"{folder}/outside.txt")),
        lambda folder: tar_with(folder / "x.tar", special("link", tarfile.SYMTYPE, "/etc")),
        lambda folder: tar_with(folder / "x.tar", special("link", tarfile.LNKTYPE, "good.txt")),
        lambda folder: tar_with(folder / "x.tar", special("pipe", tarfile.FIFOTYPE)),
        lambda folder: zip_with(folder / "x.zip", "../outside.txt"),
        lambda folder: zip_with(folder / "x.zip", "/outside.txt"),
        lambda folder: zip_with(folder / "x.zip", "..\\outside.txt"),
        lambda folder: zip_with(folder / "x.zip", "C:\\outside.txt"),
        lambda folder: zip_with(folder / "x.zip", "link", stat.S_IFLNK | 0o777),
    ],
)
def test_what_would_leave_the_folder_is_refused(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    archive = write(folder)
    with pytest.raises(ValueError, match=r"leads out of|neither a file nor a folder") as refused:
        extract(archive, folder / "out")
    assert "\n" not in str(refused.value)
    assert str(archive) in str(refused.value)
    assert [p.name for p in folder.iterdir()] == [archive.name]
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.zip"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
def test_a_cut_off_archive_leaves_nothing(tmp_path: Path, name: str, share: float) -> None:
    write = data_archives.write_zip if name.endswith("zip") else data_archives.write_tar
    archive = write(tmp_path / name, FILES)
    content = archive.read_bytes()
    archive.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"is damaged or cut off \(.*\); delete it and fetch"):
        extract(archive, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def read_members(root: Path) -> dict[str, bytes]:
    found = {}
    wanted = ["a.txt", "b.bin"]
    for path, name, file in members(
        root, archive="x.tar.gz", folder="set", wanted=wanted, name="x"
    ):
        with naming(path):
            found[name] = file.read()
    return found


def test_members_come_from_the_archive_or_the_folder(tmp_path: Path) -> None:
    data_archives.write_tar(tmp_path / "x.tar.gz", FILES)
    there = {"a.txt": FILES["set/a.txt"], "b.bin": FILES["set/deep/b.bin"]}
    assert read_members(tmp_path) == there
    (tmp_path / "x.tar.gz").unlink()
    with pytest.raises(ValueError, match=r"x.tar.gz is missing; get it with `fedl2p data get x"):
        read_members(tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.txt").write_bytes(there["a.txt"])
    with pytest.raises(ValueError, match=r"set/b.bin is missing"):
        read_members(tmp_path)
    (tmp_path / "set" / "b.bin").write_bytes(there["b.bin"])
    assert read_members(tmp_path) == there


def test_a_member_that_is_not_there(tmp_path: Path) -> None:
    data_archives.write_tar(tmp_path / "x.tar.gz", {"set/a.txt": b""})
    with pytest.raises(ValueError, match=r"x.tar.gz holds no file b.bin"):
        read_members(tmp_path)


def test_damage_behind_the_last_member_is_seen(tmp_path: Path) -> None:
    """The checksum of the compressed stream stands at its end."""
    path = data_archives.write_tar(tmp_path / "x.tar.gz", FILES)
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or cut off"):
        read_members(tmp_path)


def test_a_tree_finds_files_in_folders_and_archives(tmp_path: Path) -> None:
    data_archives.write_zip(tmp_path / "lists.zip", {"Inner/a.pkl": b"a"})
    data_archives.write_zip(tmp_path / "clips.zip", {"clips/bird/1.png": b"1"})
    (tmp_path / "real" / "bird").mkdir(parents=True)
    (tmp_path / "real" / "bird" / "2.png").write_bytes(b"2")
    (tmp_path / "Inner" / "sketch").mkdir(parents=True)
    (tmp_path / "Inner" / "sketch" / "3.png").write_bytes(b"3")
    tree = FileTree(tmp_path, "Inner", ("lists.zip", "clips.zip", "none.zip"))
    for path, content in [
        ("a.pkl", b"a"),
        ("Inner/clips/bird/1.png", b"1"),
        ("Inner/real/bird/2.png", b"2"),
        ("Inner/sketch/3.png", b"3"),
    ]:
        assert tree.read(path, source="LIST") == content
    with pytest.raises(ValueError, match=r"4.png, which LIST names, is missing"):
        tree.read("Inner/4.png", source="LIST")
    with pytest.raises(ValueError, match=r"LIST names the path '\.\./x'"):
        tree.read("../x", source="LIST")
    tree.close()


def test_a_damaged_member_of_a_zip(tmp_path: Path) -> None:
    path = data_archives.write_zip(tmp_path / "x.zip", {"Inner/a": b"A" * 1000})
    path.write_bytes(path.read_bytes().replace(b"A" * 1000, b"A" * 999 + b"B"))
    tree = FileTree(tmp_path, "Inner", ("x.zip",))
    with pytest.raises(ValueError, match=r"x.zip is damaged or cut off \(Bad CRC-32"):
        tree.read("a", source="LIST")
    tree.close()
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"x.zip is damaged"):
        FileTree(tmp_path, "Inner", ("x.zip",))


def test_safe_paths() -> None:
    assert str(safe_path("a/b.png", source="x")) == "a/b.png"
    for bad in ("/a", "a/../b", "..", "", "a\\..\\..\\b", "C:/x"):
        with pytest.raises(ValueError, match="leads out"):
            safe_path(bad, source="x")
