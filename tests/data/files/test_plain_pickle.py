"""Pickles from outside: plain data comes through, everything else is refused unexecuted."""

from __future__ import annotations

import os
import pickle
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedl2p.data.files.plain_pickle import load_plain
from support import data_archives


def read(content: bytes) -> Any:
    return load_plain(content, source="FILE")


def test_a_python_2_batch_comes_through() -> None:
    data = np.arange(2 * 3072).astype(np.uint8).reshape(2, 3072)
    content = data_archives.cifar_batch(data, [3, 9], "data_batch_1")
    assert content.startswith(b"\x80\x02")
    assert b"numpy.core.multiarray" in content
    said = read(content)
    assert set(said) == {b"batch_label", b"labels", b"data", b"filenames"}
    np.testing.assert_array_equal(said[b"data"], data)
    assert said[b"labels"] == [3, 9]
    assert said[b"filenames"][1] == b"data_batch_1_1.png"


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.uint8).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array([1, -2], dtype=">i4"),
        np.array(["bird", "ice_cream"]),
        np.array([True, False]),
        np.array([b"a", b"bc"]),
        np.zeros((0, 3), dtype=np.float32),
    ],
    ids=lambda a: a.dtype.str,
)
def test_plain_arrays_come_through(array: np.ndarray, protocol: int) -> None:
    said = read(pickle.dumps(("a", [array]), protocol=protocol))
    np.testing.assert_array_equal(said[1][0], array)


def test_arrays_of_text_objects_come_as_lists_and_scalars_as_pythons() -> None:
    pair = (np.array(["a/b.jpg", "c"], dtype=object), [np.int64(3), np.float32(0.5)])
    assert read(pickle.dumps(pair, protocol=4)) == (["a/b.jpg", "c"], [3, 0.5])


def test_plain_containers_come_through() -> None:
    value = {"a": [1, 2.5, None, True], b"b": (("x",), b"\xff"), 3: {}}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert read(pickle.dumps(value, protocol=protocol)) == value


class Runs:
    """Runs a command when it is unpickled the usual way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_nothing_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    content = pickle.dumps((["a"], [Runs(mark)]))
    with pytest.raises(ValueError, match=r"FILE holds \w+\.system, not only plain data"):
        read(content)
    assert not mark.exists()
    pickle.loads(content)  # the test could fail: the usual way executes it
    assert mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cbuiltins\neval\n.",
        b"(S'1'\nibuiltins\neval\n.",
        b"cnumpy\nload\n.",
        b"cnumpy\nndarray\n.",
        b"cnumpy.core.multiarray\n_reconstruct\n.",
        b"\x80\x02Pid\n.",
        b"\x80\x02S'id'\nQ.",
        pickle.dumps({1, 2}),
        pickle.dumps(date(2020, 1, 1)),
        pickle.dumps(np.zeros(2, dtype="i4,f4")),
        pickle.dumps(np.array([["a"]], dtype=object)),
        pickle.dumps(np.array(["2020"], dtype="M8[Y]")),
        # setting attributes of what stands for numpy's function
        b"cnumpy.core.multiarray\n_reconstruct\n(dS'x'\nI1\nsb.",
        # _reconstruct with a class other than numpy.ndarray
        b"cnumpy.core.multiarray\n_reconstruct\n(c_codecs\nencode\n(I0\ntS'b'\ntR.",
        b"c_codecs\nencode\n(S'x'\nS'zip'\ntR.",
    ],
)
def test_what_is_not_plain_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^FILE (holds|is damaged)") as refused:
        read(content)
    assert "\n" not in str(refused.value)


def test_an_array_that_claims_references_but_brings_bytes() -> None:
    """The form by which numpy's own unpickling can be led to wild addresses."""
    dtype = b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    content = array + b"(I1\n(I1\nt" + dtype + b"I00\nS'AAAAAAAA'\ntb."
    with pytest.raises(ValueError, match="objects"):
        read(content)


def test_too_few_bytes_for_the_shape() -> None:
    content = data_archives.python2_pickle(np.zeros((2, 5), np.uint8))
    with pytest.raises(ValueError, match="do not fit its shape"):
        read(content.replace(b"K\x02K\x05", b"K\x03K\x05"))


def test_cut_off_anywhere_is_one_line() -> None:
    content = data_archives.cifar_batch(np.zeros((1, 3072), np.uint8), [1], "data_batch_1")
    for end in [*range(0, 300), len(content) - 1]:
        with pytest.raises(ValueError, match=r"^FILE is damaged") as refused:
            read(content[:end])
        assert "\n" not in str(refused.value)


def test_a_value_that_holds_itself() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="FILE"):
        read(pickle.dumps(loop))
