"""Pickles from outside: plain data comes through, everything else is refused unexecuted."""

from __future__ import annotations

import contextlib
import os
import pickle
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedl2p.data.files import plain_pickle
from fedl2p.data.files.plain_pickle import load_plain


def read(content: bytes) -> Any:
    return load_plain(content, source="FILE")


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize(
    "array",
    [
        np.array(["bird", "ice_cream", "ä"]),
        np.array(["bird", "ice_cream"]).astype(">U9"),
        np.array([b"a", b"bc"]),
        np.array([["a", "b", "c"], ["d", "e", "f"]]),
        np.array(["a/b.jpg", "c"], dtype=object),
    ],
    ids=lambda a: f"{a.dtype.str}{a.shape}",
)
def test_arrays_of_text_come_as_lists(array: np.ndarray, protocol: int) -> None:
    assert read(pickle.dumps(("a", [array]), protocol=protocol)) == ("a", [array.tolist()])


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(3),
        np.arange(6, dtype=">i2").reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array([0.5, -1], dtype=np.float32),
    ],
    ids=lambda a: f"{a.dtype.str}{a.shape}",
)
def test_arrays_of_numbers_come_as_lists(array: np.ndarray, protocol: int) -> None:
    assert read(pickle.dumps(("a", [array]), protocol=protocol)) == ("a", [array.tolist()])


def test_scalars_of_numbers_come_as_numbers() -> None:
    assert read(pickle.dumps([np.float64(3), np.int8(-2)])) == [3.0, -2]


def test_one_object_as_an_array_is_a_list_of_it() -> None:
    assert read(pickle.dumps(np.array({"a": [1]}, dtype=object))) == [{"a": [1]}]


def test_a_huge_shape_without_values_takes_no_memory() -> None:
    content = pickle.dumps(np.zeros((2, 0)), protocol=4)
    assert content.count(b"K\x02K\x00") == 1
    assert read(content.replace(b"K\x02K\x00", b"J\xff\xff\xff\x7fK\x00")) == []


def test_scalars_of_text_come_as_text() -> None:
    columns = [list(np.array(["a", "bc"])), [1, 2.5]]
    assert read(pickle.dumps(columns)) == columns
    assert {type(value) for value in read(pickle.dumps(columns))[0]} == {str}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_containers_come_through(protocol: int) -> None:
    value = {"a": [1, 2.5, None, True], "b": (("x",), 2**70), 3: {}}
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


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cbuiltins\neval\n.",
        b"(S'1'\nibuiltins\neval\n.",
        b"cnumpy\nload\n.",
        b"cnumpy\nndarray\n(I1\ntR.",
        b"\x80\x02Pid\n.",
        b"\x80\x02S'id'\nQ.",
        pickle.dumps(date(2020, 1, 1)),
        pickle.dumps(np.arange(3) > 1),
        pickle.dumps(np.array(1j)),
        pickle.dumps(np.zeros(2, dtype="i4,f4")),
        pickle.dumps(np.array([["a"]], dtype=object)),
        pickle.dumps(np.array(["2020"], dtype="M8[Y]")),
    ],
)
def test_what_is_not_plain_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^FILE (holds|is damaged)") as refused:
        read(content)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name",
    [RECONSTRUCT, b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\nscalar\n", b"c_codecs\nencode\n"],
)
@pytest.mark.parametrize("state", [b"(dS'text'\nI1\ns", b"(N(dS'text'\nI1\nst"])
def test_a_file_cannot_change_what_stands_for_numpys_names(name: bytes, state: bytes) -> None:
    def attributes() -> dict[str, dict[str, Any]]:
        kinds = (plain_pickle._Array, plain_pickle._DType, plain_pickle._Unpickler)
        return {kind.__name__: dict(vars(kind)) for kind in kinds}

    before = attributes()
    with contextlib.suppress(ValueError):
        read(name + state + b"b.")
    assert attributes() == before


def test_an_array_that_claims_references_but_brings_bytes() -> None:
    """The form by which numpy's own unpickling can be led to wild addresses."""
    dtype = b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
    array = RECONSTRUCT + b"(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    content = array + b"(I1\n(I1\nt" + dtype + b"I00\nS'AAAAAAAA'\ntb."
    with pytest.raises(ValueError, match="a numpy array of type O8"):
        read(content)


def test_too_few_bytes_for_the_shape() -> None:
    content = pickle.dumps(np.array([["a", "b"], ["c", "d"]]), protocol=2)
    with pytest.raises(ValueError, match=r"FILE is damaged .*reshape"):
        read(content.replace(b"K\x02K\x02", b"K\x02K\x03"))


def test_cut_off_anywhere_is_one_line() -> None:
    content = pickle.dumps((["a/b.png"] * 3, np.array(["bird", "cat", "dog"])))
    for end in range(len(content)):
        with pytest.raises(ValueError, match=r"^FILE is damaged") as refused:
            read(content[:end])
        assert "\n" not in str(refused.value)
