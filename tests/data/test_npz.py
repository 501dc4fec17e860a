from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedl2p.data.files.npz_client import read_npz_client
from fedl2p.data.npz import NpzFolder

Arrays = dict[str, object]


def client(n: int = 10, **changes: object) -> Arrays:
    """Arrays of a good file, some of them changed, or left out where the change is None."""
    rng = np.random.default_rng(n)
    arrays: Arrays = {
        "x_train": rng.normal(size=(n, 1, 4, 4)),
        "y_train": np.arange(n) % 3,
        "x_test": rng.normal(size=(6, 1, 4, 4)),
        "y_test": np.arange(6) % 3,
        **changes,
    }
    return {name: array for name, array in arrays.items() if array is not None}


def write(path: Path, arrays: Arrays) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


def test_a_flat_folder_is_all_seen_in_alphabetical_order(tmp_path: Path) -> None:
    for name in ("zoe", "adam", "mia"):
        write(tmp_path / f"{name}.npz", client())
    (tmp_path / "notes.txt").write_text("not a client")
    (tmp_path / "._adam.npz").write_bytes(b"a Mac's")
    population = NpzFolder(tmp_path).open(0)
    assert population.seen == ("adam", "mia", "zoe")
    assert population.unseen == ()
    assert population.shape == (1, 4, 4)
    assert population.classes == 3
    assert population.about("adam").keys() == {"label_entropy"}
    with pytest.raises(KeyError, match="no client 'eve'"):
        population.open("eve")


def test_sub_folders_tell_seen_from_unseen(tmp_path: Path) -> None:
    write(tmp_path / "seen" / "b.npz", client())
    write(tmp_path / "unseen" / "a.npz", client(y_train=np.full(10, 4)))
    population = NpzFolder(tmp_path).open(0)
    assert population.names == ("b", "a")
    assert (population.seen, population.unseen) == (("b",), ("a",))
    assert population.classes == 5


def test_parts_types_and_values(tmp_path: Path) -> None:
    arrays = client(
        x_validation=np.ones((2, 1, 4, 4), dtype=np.float16),
        y_validation=np.array([0, 2], dtype=np.uint8),
    )
    write(tmp_path / "a.npz", arrays)
    data = NpzFolder(tmp_path).open(0).open("a")
    assert data.validation is not None
    assert data.test is not None
    assert (len(data.train.y), len(data.validation.y), len(data.test.y)) == (10, 2, 6)
    np.testing.assert_allclose(data.train.x.numpy(), arrays["x_train"], rtol=1e-6)
    assert data.validation.y.tolist() == [0, 2]
    for part in (data.train, data.validation, data.test):
        assert (part.x.dtype, part.y.dtype) == (torch.float32, torch.int64)


def test_bytes_become_fractions(tmp_path: Path) -> None:
    x = np.arange(2 * 9, dtype=np.uint8).reshape(2, 1, 3, 3) * 15
    path = write(tmp_path / "a.npz", {"x_train": x, "y_train": np.array([0, 1])})
    data = read_npz_client(path, split=False)
    assert data.train.x.dtype == torch.float32
    np.testing.assert_array_equal(data.train.x.numpy(), x.astype(np.float32) / np.float32(255))


def test_other_byte_order_and_memory_order(tmp_path: Path) -> None:
    x = np.asfortranarray(np.arange(24.0).reshape(4, 6)).astype(">f8")
    arrays: Arrays = {"x_train": x, "y_train": np.array([0, 1, 0, 1], dtype=">i4")}
    data = read_npz_client(write(tmp_path / "a.npz", arrays), split=False)
    assert data.train.x.tolist() == np.arange(24.0).reshape(4, 6).tolist()
    assert data.train.y.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(("n", "held"), [(2, 1), (3, 1), (10, 2), (100, 20)])
def test_a_missing_validation_part_is_a_fifth_of_training(
    tmp_path: Path, n: int, held: int
) -> None:
    x = np.arange(n, dtype=np.float64)[:, None]
    arrays: Arrays = {"x_train": x, "y_train": np.arange(n) % 2}
    data = read_npz_client(write(tmp_path / "a.npz", arrays))
    assert data.validation is not None
    assert data.test is None
    assert len(data.validation.y) == held
    both = torch.cat([data.train.x, data.validation.x]).flatten()
    assert both.sort().values.tolist() == list(range(n))
    assert torch.equal(data.train.x.flatten().long() % 2, data.train.y)


def test_the_split_depends_on_the_name_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.npz", client(40))
    first, second = NpzFolder(tmp_path).open(0), NpzFolder(tmp_path).open(7)
    assert torch.equal(first.open("a").train.x, second.open("a").train.x)
    assert torch.equal(first.open("a").train.x, read_npz_client(tmp_path / "a.npz").train.x)
    assert not torch.equal(first.open("a").train.x, first.open("b").train.x)


def test_without_a_split_training_keeps_everything(tmp_path: Path) -> None:
    data = read_npz_client(write(tmp_path / "a.npz", client(1)), split=False)
    assert data.validation is None
    assert len(data.train.y) == 1


def test_other_arrays_may_lie_beside(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", client(ids=np.arange(10)))
    assert len(read_npz_client(path).train.y) == 8


def with_value(value: float) -> np.ndarray:
    x = np.zeros((10, 1, 4, 4))
    x[3, 0, 1, 2] = value
    return x


BAD = {
    "no inputs": (client(x_train=None), "x_train missing; add it"),
    "no labels": (client(y_train=None), "y_train missing; add it"),
    "no training": (client(x_train=None, y_train=None), "x_train, y_train missing"),
    "half a part": (client(y_test=None), "y_test missing"),
    "other half": (client(x_validation=None, y_validation=np.zeros(2, int)), "x_validation miss"),
    "misspelt": (client(x_val=np.zeros((2, 1, 4, 4))), "unknown array x_val; the names are"),
    "flat inputs": (client(x_train=np.zeros(10)), r"x_train has shape \(10,\); give"),
    "no targets": (client(y_train=np.zeros((10, 0))), r"y_train has shape \(10, 0\)"),
    "infinite targets": (client(y_train=np.full(10, np.inf)), "y_train has values that are not"),
    "mixed inputs": (
        client(x_test=np.zeros((3, 1, 4, 4), int), y_test=np.zeros(3, int)),
        "x_train is floating and x_test is integer; store the inputs of all parts the same way",
    ),
    "mixed targets": (
        client(x_test=np.zeros((3, 1, 4, 4)), y_test=np.zeros(3)),
        "y_train is integer and y_test is floating; store the targets of all parts the same way",
    ),
    "bool labels": (client(y_train=np.zeros(10, bool)), "y_train is of type bool"),
    "text labels": (client(y_train=np.array(["a"] * 10)), "y_train is of type <U1"),
    "negative": (client(y_train=np.arange(10) - 1), "y_train has the label -1; number"),
    "vast label": (client(y_train=np.full(10, 2**63, np.uint64)), "y_train has the label 9223"),
    "NaN": (client(x_train=with_value(np.nan)), "not finite .* in 1 of 10 examples"),
    "infinite": (client(x_train=with_value(np.inf)), "not finite"),
    "beyond float32": (client(x_train=with_value(1e60)), "not finite numbers in float32"),
    "complex": (client(x_train=np.zeros((10, 1, 4, 4), complex)), "complex128; give floats"),
    "lengths": (client(y_train=np.zeros(9, int)), "has 10 examples but y_train 9"),
    "nothing": (
        client(x_train=np.zeros((0, 1, 4, 4)), y_train=np.zeros(0, int)),
        "x_train has no examples",
    ),
    "empty test": (
        client(x_test=np.zeros((0, 1, 4, 4)), y_test=np.zeros(0, int)),
        "x_test has no examples",
    ),
    "no pixels": (client(x_train=np.zeros((10, 1, 0, 4))), "no dimension may be empty"),
    "unlike parts": (client(x_test=np.zeros((6, 1, 4, 5))), r"\(1, 4, 5\) where \(1, 4, 4\)"),
    "bytes and floats": (
        client(x_test=np.zeros((6, 1, 4, 4), np.uint8)),
        "x_train is floating and x_test is uint8",
    ),
    "one example": (client(1), "only 1 example, which cannot be split"),
    "pickled": (client(x_train=np.array([{}, []], dtype=object)), "allow_pickle=False"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_a_bad_file_is_named_in_one_line(tmp_path: Path, case: str) -> None:
    arrays, message = BAD[case]
    path = write(tmp_path / "broken.npz", arrays)
    write(tmp_path / "whole.npz", client())
    for read in (lambda: read_npz_client(path), lambda: NpzFolder(tmp_path).open(0)):
        with pytest.raises(ValueError, match=message) as caught:
            read()
        text = str(caught.value)
        assert text.startswith(str(path))
        assert "\n" not in text


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[400] ^= 0xFF
    path.write_bytes(raw)


def foreign_member(path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_train", b"text")
        archive.writestr("y_train", b"text")


SPOILED: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("x_train,y_train\n"),
    "empty": lambda path: path.write_bytes(b""),
    "a pickle": lambda path: path.write_bytes(b"\x80\x04N."),
    "single array": lambda path: path.write_bytes(npy()),
    "cut off": cut,
    "bit error": flip,
    "foreign members": foreign_member,
    "absent": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def npy() -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


@pytest.mark.parametrize("case", list(SPOILED))
def test_a_file_that_is_no_npz_is_named_in_one_line(tmp_path: Path, case: str) -> None:
    path = write(tmp_path / "broken.npz", client())
    SPOILED[case](path)
    with pytest.raises(ValueError) as caught:
        read_npz_client(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "; " in text
    assert "\n" not in text


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "sprung",))  # type: ignore[return-value]

    path = write(tmp_path / "a.npz", client(y_train=np.array([Trap()] * 10, dtype=object)))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_npz_client(path)
    assert not (tmp_path / "sprung").exists()


def test_clients_must_be_alike(tmp_path: Path) -> None:
    write(tmp_path / "a.npz", client())
    other = client(x_train=np.zeros((10, 3, 4, 4)), x_test=np.zeros((6, 3, 4, 4)))
    write(tmp_path / "b.npz", other)
    with pytest.raises(ValueError, match=r"b\.npz: x_train .*\(3, 4, 4\) where \(1, 4, 4\)"):
        NpzFolder(tmp_path).open(0)


def test_tokens_and_a_label_for_each_are_taken_as_they_are(tmp_path: Path) -> None:
    tokens = np.arange(20, dtype=np.int32).reshape(10, 2)
    labels = tokens % 3
    labels[:, 1] = -100
    path = write(tmp_path / "a.npz", {"x_train": tokens, "y_train": labels})
    x, y = read_npz_client(path, split=False).train
    assert torch.equal(x, torch.from_numpy(tokens).long())
    assert torch.equal(y, torch.from_numpy(labels).long())
    population = NpzFolder(tmp_path).open(0)
    assert (population.shape, population.classes) == ((2,), 3)
    assert population.about("a") == {}


@pytest.mark.parametrize(("shape", "classes"), [((10,), 1), ((10, 3), 3), ((10, 3, 4, 4), 3)])
def test_floating_targets_have_values_instead_of_classes(
    tmp_path: Path, shape: tuple[int, ...], classes: int
) -> None:
    targets = np.random.default_rng(0).normal(size=shape)
    tested = targets[: len(client()["y_test"])]
    path = write(tmp_path / "a.npz", client(y_train=targets, y_test=tested))
    _, y = read_npz_client(path, split=False).train
    assert torch.equal(y, torch.from_numpy(targets).float())
    assert NpzFolder(tmp_path).open(0).classes == classes


def test_all_clients_have_targets_of_one_kind(tmp_path: Path) -> None:
    write(tmp_path / "a.npz", client())
    tested = np.zeros(len(client()["y_test"]))
    write(tmp_path / "b.npz", client(y_train=np.zeros(10), y_test=tested))
    with pytest.raises(ValueError, match=r"b.npz: its targets are .* than those of a.npz"):
        NpzFolder(tmp_path).open(0)


def test_labels_must_fit_given_classes(tmp_path: Path) -> None:
    write(tmp_path / "a.npz", client())
    assert NpzFolder(tmp_path, classes=7).open(0).classes == 7
    with pytest.raises(ValueError, match=r"a\.npz: y_train has the label 2 but there are 2"):
        NpzFolder(tmp_path, classes=2).open(0)
    with pytest.raises(ValueError, match="classes must be 0"):
        NpzFolder(tmp_path, classes=-1)


def test_folders_that_cannot_serve(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        NpzFolder(tmp_path / "absent").open(0)
    with pytest.raises(ValueError, match="no seen clients"):
        NpzFolder(tmp_path).open(0)
    write(tmp_path / "unseen" / "a.npz", client())
    with pytest.raises(ValueError, match="no seen clients"):
        NpzFolder(tmp_path).open(0)
    write(tmp_path / "seen" / "a.npz", client())
    with pytest.raises(ValueError, match="the name of a seen client"):
        NpzFolder(tmp_path).open(0)
    write(tmp_path / "b.npz", client())
    with pytest.raises(ValueError, match="beside the sub-folders"):
        NpzFolder(tmp_path).open(0)
