"""``fedl2p data``: get, check, make; one line and status 2 where something is wrong."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fedl2p.cli import entry as cli
from fedl2p.data import cifar10, domainnet, fashion, office10
from fedl2p.data.files import folders
from fedl2p.data.files.downloads import RemoteFile
from support import data_archives
from support.web_server import Served, serve


def call(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(arg) for arg in args])
    return int(stop.value.code or 0)


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> list[str]:
    """Check that the command ends in status 2, and return its lines."""
    assert call(*args) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert all(line.startswith("fedl2p: error: ") for line in lines)
    return lines


def cifar10_archive(folder: Path) -> bytes:
    """The content of a small CIFAR-10 archive."""
    path = data_archives.write_tar(folder / cifar10.ARCHIVE.name, data_archives.cifar10_files())
    content = path.read_bytes()
    path.unlink()
    return content


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def remote_of(content: bytes, served: Served) -> RemoteFile:
    return dataclasses.replace(cifar10.ARCHIVE, url=served.url, checksum=f"md5:{md5(content)}")


def test_the_help_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("data", "--help") == 0
    said = capsys.readouterr().out
    for name in ("cifar10", "cifar10c", "office10", "domainnet", "resnet18-imagenet"):
        assert name in said
    assert call("data", "get", "cifar10", "--help") == 0
    assert "--root" in capsys.readouterr().out
    assert call("--help") == 0
    assert "fedl2p data get|check|make" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "missing: one of {get, check, make}; see fedl2p data --help"),
        (["get"], "missing from fedl2p data get: NAME"),
        (["fetch", "cifar10"], "fetch, cifar10; available subcommands: get, check, make"),
        (["make"], "missing: one of {spoken}"),
        (["get", "cifar100"], "no data set 'cifar100' to get; there are cifar10, "),
        (["make", "cifar10"], "unrecognized options: cifar10; available subcommands: spoken"),
        (["get", "digits"], "no data set 'digits' to get"),
        (["check", "cifar10", "--rot", "x"], "--rot"),
        (
            ["check", "cifar10"],
            "data/cifar10/cifar-10-batches-bin is missing; get it with `fedl2p",
        ),
        (["check", "office10"], "office_caltech_10_dataset.zip is missing"),
        (["check", "domainnet", "--root", "d"], "d/domainnet_dataset.zip is missing"),
        (["check", "resnet18-imagenet"], "resnet18-f37072fd.pth is missing; download https"),
    ],
)
def test_one_line_and_status_2(
    args: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(folders.ROOT_VARIABLE, raising=False)
    (line,) = refused(capsys, "data", *args)
    assert said in line
    assert list(tmp_path.iterdir()) == []


def test_get_downloads_and_check_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = cifar10_archive(tmp_path)
    monkeypatch.setenv(folders.ROOT_VARIABLE, str(tmp_path / "data"))
    with serve(Served(content)) as server:
        monkeypatch.setattr(cifar10, "ARCHIVE", remote_of(content, server))
        assert call("data", "get", "cifar10") == 0
        said = capsys.readouterr()
        assert said.out == f"cifar10: complete in {tmp_path / 'data' / 'cifar10'}\n"
        assert said.err == ""
        assert call("data", "get", "cifar10") == 0
        assert server.asked == 1
    assert call("data", "check", "cifar10") == 0
    small = cifar10.Cifar10(seen=4, train=8, validation=2, test=4)
    assert len(small.open(0).names) == 4
    (tmp_path / "data" / "cifar10" / cifar10.ARCHIVE.name).unlink()
    assert call("data", "get", "cifar10") == 0, "the archive is not needed any more"


def test_get_downloads_the_four_files_of_fashion_unless_they_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    packed = data_archives.idx(array, compressed=True)
    for name in fashion.FILES:  # the server has one file for all names
        sums = (md5(packed), md5(data_archives.idx(array)))
        monkeypatch.setitem(fashion.CHECKSUMS, name, sums)
    monkeypatch.setenv(folders.ROOT_VARIABLE, str(tmp_path))
    monkeypatch.setitem(folders.INSTALLED, "fashion", tmp_path / "installed")
    with serve(Served(packed)) as server:
        monkeypatch.setattr(fashion, "SITE", server.url.rstrip("/"))
        assert call("data", "get", "fashion") == 0
        assert capsys.readouterr().out == f"fashion: complete in {tmp_path / 'fashion'}\n"
        assert call("data", "get", "fashion") == 0
        assert server.asked == 4
        (tmp_path / "fashion").rename(tmp_path / "installed")
        assert call("data", "get", "fashion") == 0
        assert server.asked == 4
    assert f"fashion: complete in {tmp_path / 'installed'}\n" in capsys.readouterr().out
    damaged = tmp_path / "installed" / f"{fashion.FILES[0]}.gz"
    damaged.write_bytes(data_archives.idx(array + 1, compressed=True))
    (line,) = refused(capsys, "data", "check", "fashion")
    assert f"{damaged} is not Fashion-MNIST's" in line


def test_a_damaged_archive_is_neither_unpacked_nor_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / cifar10.ARCHIVE.name
    archive.write_bytes(cifar10_archive(tmp_path))  # sound, but not the published one
    (line,) = refused(capsys, "data", "get", "cifar10", "--root", tmp_path)
    assert f"{archive} is damaged: its MD5 is" in line
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]


def test_get_says_what_to_place_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the server has only some of the archives, the others are named one by one."""
    lists, images = data_archives.fedbn_lists(
        "DomainNet",
        {domain: (20, 10) for domain in domainnet.DOMAINS.domains},
        domainnet.DOMAINS.classes,
    )
    packed = {f"DomainNet/{k}": v for k, v in lists.items()}
    there = data_archives.write_zip(tmp_path / "l.zip", packed)
    root = tmp_path / "data"
    with serve(Served(there.read_bytes())) as good, serve(Served(b"", status=404)) as bad:
        served = dataclasses.replace(domainnet.LISTS, url=good.url)
        monkeypatch.setattr(domainnet, "LISTS", served)
        gone = [dataclasses.replace(remote, url=bad.url) for remote in domainnet.IMAGES]
        monkeypatch.setattr(domainnet, "IMAGES", gone)
        monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)
        lines = refused(capsys, "data", "get", "domainnet", "--root", root)
        assert len(lines) == 6
        for domain, line in zip(domainnet.DOMAINS.domains, lines, strict=True):
            assert "404 Client Error" in line
            assert f"place it as {root / f'{domain}.zip'}" in line
    for domain, pictures in images.items():
        data_archives.write_zip(root / f"{domain}.zip", pictures)
    assert call("data", "get", "domainnet", "--root", root) == 0
    capsys.readouterr()
    (root / "real.zip").unlink()
    (line,) = refused(capsys, "data", "check", "domainnet", "--root", root)[:1]
    assert "20 of 20 images that real_train.pkl lists are missing" in line


def test_a_run_on_missing_data_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="fedl2p data get office10 --root data/office10"):
        office10.Office10(root=Path("data/office10")).open(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Make:
    """How to make it.

    Parameters
    ----------
    voices
        How many.
    """

    voices: int = 3

    def __post_init__(self) -> None:
        if self.voices < 1:
            raise ValueError(f"voices must be at least 1, got {self.voices}")

    def run(self, root: Path, tell: folders.ProgressCallback) -> None:
        root.mkdir(parents=True)
        (root / "made.txt").write_text(str(self.voices))
        tell("speaking", 1, 1)


def test_make_takes_the_options_of_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module: Any = ModuleType("fedl2p.data.invented")
    module.Make = Make
    monkeypatch.setattr("fedl2p.cli.data.module_of", lambda name, verb: module)
    monkeypatch.setattr("fedl2p.cli.data.names", lambda verb: ("invented",))
    root = tmp_path / "x"
    assert call("data", "make", "invented", "--root", root, "--voices", 5) == 0
    assert (root / "made.txt").read_text() == "5"
    capsys.readouterr()
    (line,) = refused(capsys, "data", "make", "invented", "--voices", 0)
    assert "voices must be at least 1" in line
    assert call("data", "make", "invented", "--help") == 0
    assert "How many." in capsys.readouterr().out


def test_progress_is_shown_to_a_person(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    content = cifar10_archive(tmp_path)
    with serve(Served(content)) as server:
        monkeypatch.setattr(cifar10, "ARCHIVE", remote_of(content, server))
        assert call("data", "get", "cifar10", "--root", tmp_path / "x") == 0
    said = capsys.readouterr()
    assert cifar10.ARCHIVE.name in said.err
    assert "100 %" in said.err
