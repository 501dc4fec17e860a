"""idx files, plain and compressed: what is read, and what is refused in one line."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fedl2p.data.files.idx import read_idx
from support.data_archives import idx


def write(folder: Path, content: bytes) -> Path:
    path = folder / "file"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("code", "dtype"),
    [(0x08, "u1"), (0x09, "i1"), (0x0B, "i2"), (0x0C, "i4"), (0x0D, "f4"), (0x0E, "f8")],
)
def test_every_type_comes_back(tmp_path: Path, code: int, dtype: str, compressed: bool) -> None:
    array = np.arange(-12, 12).astype(dtype).reshape(2, 3, 4)
    read = read_idx(write(tmp_path, idx(array, code=code, compressed=compressed)))
    assert read.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(read, array)


def test_an_array_without_values(tmp_path: Path) -> None:
    assert read_idx(write(tmp_path, idx(np.zeros((0, 3), np.uint8)))).shape == (0, 3)


GOOD = idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
PACKED = gzip.compress(GOOD, mtime=0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "begins with the bytes of an empty file, not"),
        (b"PK\x03\x04", "begins with the bytes 50 4b 03 04, not with those of an idx file"),
        (b"\0\0\x07\x01", "not with those of an idx file"),
        (b"\0\0\x08\x00", "says that it has 0 dimensions"),
        (b"\0\0\x08\xff", "says that it has 255 dimensions"),
        (GOOD[:9], "is cut off in its header"),
        (GOOD[:-1], "must hold 24 bytes of values by its header, but holds 23"),
        (GOOD + b"\0", "must hold 24 bytes of values by its header, but holds more"),
        (PACKED[:-9], "is damaged"),
        (PACKED[:12], "is damaged"),
        (PACKED[:15] + b"\xff\xff\xff" + PACKED[18:], "is damaged"),
        (PACKED[:-8] + b"\0" * 8, "is damaged"),
        (gzip.compress(b"text", mtime=0), "not with those of an idx file"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[:4].hex(),
)
def test_damage_is_named_in_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ValueError) as refused:
        read_idx(path)
    assert str(refused.value).startswith(f"{path} ")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_cut_off_anywhere_is_one_line(tmp_path: Path) -> None:
    for content in (GOOD, PACKED):
        for end in range(len(content)):
            with pytest.raises(ValueError, match=r"file .*[^\n]+$"):
                read_idx(write(tmp_path, content[:end]))


def test_a_missing_file_or_a_folder_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ValueError, match=r"cannot read .*name a readable idx file"):
            read_idx(path)


def test_no_more_is_read_than_allowed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="says that it holds 24 bytes of values, but at most 23"):
        read_idx(write(tmp_path, GOOD), largest=23)
    assert read_idx(write(tmp_path, GOOD), largest=24).size == 24


@pytest.mark.parametrize("compressed", [False, True])
def test_memory_is_that_of_the_content_not_of_what_the_header_says(
    tmp_path: Path, compressed: bool
) -> None:
    content = b"\0\0\x08\x01\x70\0\0\0" + b"\1" * 1000  # claims 1.9 GB
    path = write(tmp_path, gzip.compress(content) if compressed else content)
    tracemalloc.start()
    with pytest.raises(ValueError, match="but holds 1000"):
        read_idx(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_a_small_file_that_unpacks_to_much_is_not_unpacked(tmp_path: Path) -> None:
    content = gzip.compress(idx(np.zeros(8, np.uint8)) + bytes(200 << 20), compresslevel=1)
    tracemalloc.start()
    with pytest.raises(ValueError, match="but holds more"):
        read_idx(write(tmp_path, content))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
