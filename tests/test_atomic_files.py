"""Files are read with a bound, and never written through a symbolic link."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedl2p import atomic_files
from fedl2p.core.metanets import MetaNets
from fedl2p.runs.files import read_json
from fedl2p.runs.tensors import load_tensors

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX systems")


def test_text_of_a_regular_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes("é\r\n".encode())
    assert atomic_files.read_text(path) == "é\r\n"
    assert atomic_files.read_text(path, limit=4) == "é\r\n"
    with pytest.raises(ValueError, match="it is larger than 3 bytes"):
        atomic_files.read_text(path, limit=3)
    with pytest.raises(ValueError, match="it is a folder"):
        atomic_files.read_text(tmp_path)
    with pytest.raises(FileNotFoundError):
        atomic_files.read_text(tmp_path / "none")


@pytest.fixture(params=["device", "pipe"])
def endless(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What never ends, or never begins, under the name of meta-nets."""
    path = tmp_path / "metanets.json"
    if request.param == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    return path


def test_what_never_ends_is_refused(endless: Path) -> None:
    with pytest.raises(ValueError, match=r"metanets\.json is damaged: it is no regular file"):
        read_json(endless)
    with pytest.raises(ValueError, match=r"cannot be read \(it is no regular file"):
        MetaNets.load(endless.parent)
    with pytest.raises(ValueError, match=r"not a readable safetensors file \(it is no regular"):
        load_tensors(endless)


def test_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    other, link = tmp_path / "other", tmp_path / "link"
    other.write_text("mine")
    link.symlink_to(other)
    with pytest.raises(OSError, match="link"):
        atomic_files.open_to_append(link)
    atomic_files.write_text(link, "yours")
    assert (other.read_text(), link.read_text(), link.is_symlink()) == ("mine", "yours", False)
    with atomic_files.open_to_append(link) as file:
        file.write("\r\n")
    assert link.read_bytes() == b"yours\r\n"


def test_links_anywhere_in_a_folder_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    atomic_files.refuse_special_files(tmp_path)
    atomic_files.refuse_special_files(tmp_path / "none")
    (folder / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="a/b/link is a symbolic link"):
        atomic_files.refuse_special_files(tmp_path)
    (tmp_path / "folder").symlink_to(folder)
    with pytest.raises(ValueError, match="folder is a symbolic link"):
        atomic_files.refuse_special_files(tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is no regular file"):
        atomic_files.refuse_special_files(tmp_path / "pipe")


def test_small_files_need_no_torch() -> None:
    code = "import sys, fedl2p.atomic_files; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
