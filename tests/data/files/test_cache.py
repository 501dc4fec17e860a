"""The cache of decoded data: built once, whole or not at all, shared, renewed with its source."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from fedl2p.data.files.cache import Allocate, Columns, DecodedExamples, fingerprint, open_cache


class Builder:
    """Counts how often it builds."""

    def __init__(self, value: int = 3) -> None:
        self.value, self.calls = value, 0

    def __call__(self, allocate: Allocate) -> Columns:
        self.calls += 1
        x = allocate((4, 2), np.uint8)
        x[:] = self.value
        return {"label": [0, 1, 2, 1], "class": ["a", "b", "c"]}


def open_it(place: Path, build: Builder, key: object = "k") -> DecodedExamples:
    return open_cache(place, key={"of": key}, build=build)


def test_it_is_built_once_and_mapped(tmp_path: Path) -> None:
    build, place = Builder(), tmp_path / "deep" / "all"
    first, second = open_it(place, build), open_it(place, build)
    assert build.calls == 1
    for pool in (first, second):
        assert isinstance(pool.x, np.memmap)
        assert (pool.x == 3).all()
        assert pool.column("label").tolist() == [0, 1, 2, 1]
        assert list(pool.columns["class"]) == ["a", "b", "c"]
        with pytest.raises(ValueError, match="read-only"):
            pool.x[0] = 1
    assert [p.name for p in place.parent.iterdir()] == ["all"]
    assert sorted(p.name for p in place.iterdir()) == ["columns.json", "x.npy"]


def test_another_key_builds_again_and_old_maps_stay_good(tmp_path: Path) -> None:
    place = tmp_path / "all"
    old = open_it(place, Builder(3), "one")
    new = open_it(place, Builder(5), "two")
    assert (new.x == 5).all()
    assert (old.x == 3).all()
    assert [p.name for p in tmp_path.iterdir()] == ["all"]


@pytest.mark.parametrize("name", ["x.npy", "columns.json"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x93NUMPY"])
def test_a_damaged_cache_is_built_again(tmp_path: Path, name: str, content: bytes | None) -> None:
    place, build = tmp_path / "all", Builder()
    open_it(place, build)
    (place / name).unlink()
    if content is not None:
        (place / name).write_bytes(content)
    assert (open_it(place, build).x == 3).all()
    assert build.calls == 2


def test_a_cut_off_array_is_built_again(tmp_path: Path) -> None:
    place, build = tmp_path / "all", Builder()
    open_it(place, build)
    os.truncate(place / "x.npy", (place / "x.npy").stat().st_size - 1)
    open_it(place, build)
    assert build.calls == 2


def test_a_build_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    def fails(allocate: Allocate) -> Columns:
        allocate((4, 2), np.uint8)[0] = 1
        raise ValueError("image 2 is broken")

    place = tmp_path / "all"
    with pytest.raises(ValueError, match="image 2 is broken"):
        open_cache(place, key={}, build=fails)
    assert list(tmp_path.iterdir()) == []
    open_it(place, Builder())
    with pytest.raises(ValueError, match="image 2 is broken"):
        open_cache(place, key={"of": "other"}, build=fails)
    assert json.loads((place / "columns.json").read_text())["key"]["of"] == "k"
    assert [p.name for p in tmp_path.iterdir()] == ["all"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write into .*; decoded data is kept there"):
        open_it(tmp_path / "file" / "all", Builder())


def test_a_fingerprint_changes_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("one")
    before = fingerprint([file])
    assert fingerprint([file]) == before
    os.utime(file, ns=(1, 1))
    assert fingerprint([file]) != before


def test_two_processes_that_build_at_a_time(tmp_path: Path) -> None:
    """The second finds the first one's cache in its place and both go on with a whole one."""
    place, slow = tmp_path / "all", Builder(3)

    def builds_while_another_finishes(allocate: Allocate) -> Columns:
        open_it(place, Builder(3))
        return slow(allocate)

    assert (open_cache(place, key={"of": "k"}, build=builds_while_another_finishes).x == 3).all()
    assert [p.name for p in tmp_path.iterdir()] == ["all"]
