"""Archives: unpacked completely or not at all, never outside; zip archives read in place."""

from __future__ import annotations

import io
import resource
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fedl2p.data.files import archives
from fedl2p.data.files.archives import ZipTree, unpack
from support import data_archives

FILES = {"set/a.txt": b"one", "set/deep/b.bin": bytes(range(256)) * 1000}
LIMITS = {"max_bytes": 1 << 20, "max_files": 10}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_everything_is_unpacked(tmp_path: Path, name: str) -> None:
    archive = data_archives.write_tar(tmp_path / name, FILES)
    counts: list[int] = []
    unpack(archive, tmp_path / "out", **LIMITS, progress=lambda what, done, _: counts.append(done))
    assert contents(tmp_path / "out") == FILES
    assert counts == [1, 2]
    assert {p.name for p in tmp_path.iterdir()} == {name, "out"}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    with pytest.raises(ValueError, match=r"cannot unpack .*; free some space, move away what is"):
        unpack(archive, tmp_path / "out", **LIMITS)


def test_a_folder_of_its_name_around_the_files_is_left_out(tmp_path: Path) -> None:
    unpack(data_archives.write_tar(tmp_path / "x.tar", FILES), tmp_path / "set", **LIMITS)
    assert contents(tmp_path / "set") == {
        name.removeprefix("set/"): content for name, content in FILES.items()
    }
    assert {p.name for p in tmp_path.iterdir()} == {"x.tar", "set"}


def tar_with(path: Path, member: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as tar:
        good = tarfile.TarInfo("good.txt")
        good.size = 2
        tar.addfile(good, io.BytesIO(b"ok"))
        tar.addfile(member, io.BytesIO(b"x" * member.size))
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
    "member",
    [
        plain("../outside.txt"),
        plain("a/../../outside.txt"),
        special("link", tarfile.SYMTYPE, "/etc"),
        special("link", tarfile.SYMTYPE, "good.txt"),
        special("link", tarfile.LNKTYPE, "good.txt"),
        special("pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda member: f"{member.name}-{member.type!r}",
)
def test_what_is_no_file_in_the_folder_is_refused(tmp_path: Path, member: tarfile.TarInfo) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    archive = tar_with(folder / "x.tar", member)
    with pytest.raises(ValueError, match=r"outside the destination|neither a file") as refused:
        unpack(archive, folder / "out", **LIMITS)
    assert "\n" not in str(refused.value)
    assert str(archive) in str(refused.value)
    assert [p.name for p in folder.iterdir()] == [archive.name]
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_an_absolute_path_lands_in_the_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    unpack(tar_with(tmp_path / "x.tar", plain(str(outside))), tmp_path / "out", **LIMITS)
    assert not outside.exists()
    assert (tmp_path / "out" / str(outside).lstrip("/")).read_bytes() == b"x"


def bomb(path: Path) -> Path:
    """1 MB that unpacks to 1 GB."""
    member = tarfile.TarInfo("zeros")
    member.size = 1 << 30
    with tarfile.open(path, "w:gz", compresslevel=9) as tar, open("/dev/zero", "rb") as zeros:
        tar.addfile(member, zeros)
    assert path.stat().st_size < 1 << 21
    return path


@pytest.mark.slow
def test_a_bomb_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    archive = bomb(tmp_path / "x.tar.gz")
    with pytest.raises(ValueError, match=r"unpacks to more than 268435456 bytes or 16 files"):
        unpack(archive, tmp_path / "out", max_bytes=256 << 20, max_files=16)
    assert [p.name for p in tmp_path.iterdir()] == [archive.name]


@pytest.mark.parametrize("limits", [{"max_bytes": 256_002}, {"max_files": 1}])
def test_more_bytes_or_files_than_allowed_leave_nothing(
    tmp_path: Path, limits: dict[str, int]
) -> None:
    archive = data_archives.write_tar(tmp_path / "x.tar.gz", FILES)
    with pytest.raises(ValueError, match="unpacks to more than"):
        unpack(archive, tmp_path / "out", **(LIMITS | limits))
    assert [p.name for p in tmp_path.iterdir()] == [archive.name]


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
def test_a_cut_off_archive_leaves_nothing(tmp_path: Path, name: str, share: float) -> None:
    archive = data_archives.write_tar(tmp_path / name, FILES)
    content = archive.read_bytes()
    archive.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"is damaged or not .* \(.+\); delete it and fetch"):
        unpack(archive, tmp_path / "out", **LIMITS)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_damage_behind_the_last_member_is_seen(tmp_path: Path) -> None:
    """The checksum of the compressed stream stands at its end."""
    path = data_archives.write_tar(tmp_path / "x.tar.gz", FILES)
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        unpack(path, tmp_path / "out", **LIMITS)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    archive = data_archives.write_tar(tmp_path / "x.tar.gz", FILES)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # no file may be larger
    try:
        with pytest.raises(ValueError, match=r"^cannot unpack .*x.tar.gz as .* \(File too large\)"):
            unpack(archive, tmp_path / "out", **LIMITS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == [archive.name]


def test_a_tree_finds_files_in_folders_and_archives(tmp_path: Path) -> None:
    data_archives.write_zip(tmp_path / "lists.zip", {"Inner/a.pkl": b"a"})
    data_archives.write_zip(tmp_path / "clips.zip", {"clips/bird/1.png": b"1"})
    (tmp_path / "real" / "bird").mkdir(parents=True)
    (tmp_path / "real" / "bird" / "2.png").write_bytes(b"2")
    (tmp_path / "Inner" / "sketch").mkdir(parents=True)
    (tmp_path / "Inner" / "sketch" / "3.png").write_bytes(b"3")
    tree = ZipTree(tmp_path, "Inner", ("lists.zip", "clips.zip", "none.zip"))
    for path, content in [
        ("a.pkl", b"a"),
        ("Inner/clips/bird/1.png", b"1"),
        ("Inner/real/bird/2.png", b"2"),
        ("Inner/sketch/3.png", b"3"),
    ]:
        assert tree.read(path, source="LIST") == content
    for missing in ("Inner/4.png", "clips/bird"):
        with pytest.raises(ValueError, match=rf"{missing}, which LIST names, is missing"):
            tree.read(missing, source="LIST")


@pytest.mark.parametrize("path", ["/a", "a/../b", "..", "", "a\\..\\..\\b", "C:/x"])
def test_a_listed_path_that_leads_out_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(ValueError, match=r"LIST names the path '.*', which leads out"):
        ZipTree(tmp_path, "Inner", ()).read(path, source="LIST")


def test_a_damaged_member_of_a_zip(tmp_path: Path) -> None:
    path = data_archives.write_zip(tmp_path / "x.zip", {"Inner/a": b"A" * 1000})
    path.write_bytes(path.read_bytes().replace(b"A" * 1000, b"A" * 999 + b"B"))
    with pytest.raises(ValueError, match=r"x.zip/Inner/a is damaged or .* \(Bad CRC-32"):
        ZipTree(tmp_path, "Inner", ("x.zip",)).read("a", source="LIST")
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"x.zip is damaged"):
        ZipTree(tmp_path, "Inner", ("x.zip",))


@pytest.mark.parametrize("place", [data_archives.write_zip, None])
def test_a_file_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Callable[..., Path] | None
) -> None:
    monkeypatch.setattr(archives, "MAX_FILE", 1000)
    if place is None:
        (tmp_path / "a").write_bytes(b"A" * 1001)
        (tmp_path / "b").write_bytes(b"B" * 1000)
    else:
        place(tmp_path / "x.zip", {"a": b"A" * 1001, "b": b"B" * 1000})
    tree = ZipTree(tmp_path, "Inner", ("x.zip",))
    assert len(tree.read("b", source="LIST")) == 1000
    with pytest.raises(ValueError, match="/a has more than 1000 bytes"):
        tree.read("a", source="LIST")
