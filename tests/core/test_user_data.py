"""Examples out of what users have, and the one sentence for everything else."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fedl2p import ClientData, Examples
from fedl2p.core import trees
from fedl2p.core.user_data import inputs_of_batch, read_examples

X = torch.arange(12.0).reshape(4, 3)
Y = torch.tensor([0, 1, 2, 1])


class Columns(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"a": X[i], "b": [1.0, 2.0], "label": int(Y[i])}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(zip(X, Y, strict=True))


GIVEN: dict[str, Any] = {
    "a pair": (X, Y),
    "examples": Examples(X, Y),
    "arrays": (X.numpy(), Y.numpy().astype(np.int32)),
    "lists": (X.tolist(), Y.tolist()),
    "a pair in a list": [X, Y],
    "a list of examples": [(X[i], int(Y[i])) for i in range(4)],
    "a data set": TensorDataset(X, Y),
    "a stream": Stream(),
    "a loader": DataLoader(TensorDataset(X, Y), batch_size=3),
    "a loader without batches": DataLoader(TensorDataset(X, Y), batch_size=None),
    "columns": {"x": X, "labels": Y},
    "a table": datasets.Dataset.from_dict({"x": X.tolist(), "label": Y.tolist()}),
}


@pytest.mark.parametrize("data", GIVEN.values(), ids=GIVEN.keys())
def test_all_forms_give_the_same_examples(data: Any) -> None:
    x, y = ClientData(data).train
    assert isinstance(x, Tensor)
    assert isinstance(y, Tensor)
    assert torch.equal(x, X)
    assert torch.equal(y.long(), Y)


def test_several_inputs_come_as_a_tuple_or_by_name() -> None:
    pairs = TensorDataset(X, Y)
    for data in (
        ((X, Y), Y),
        [((X[i], Y[i]), Y[i]) for i in range(4)],
        DataLoader([((X[i], Y[i]), Y[i]) for i in range(4)], batch_size=3),  # type: ignore[arg-type]
    ):
        x, _ = read_examples(data)
        assert isinstance(x, tuple)
        assert torch.equal(x[0], X)
        assert torch.equal(x[1], Y)
    x, y = read_examples(Columns())
    assert isinstance(x, dict)
    assert list(x) == ["a", "b"]
    assert torch.equal(y, Y)
    assert x["b"].shape == (4, 2)
    table = datasets.Dataset.from_dict(
        {"input_ids": [[1, 2], [3, 4]], "mask": [[1, 0], [1, 1]], "labels": [0, 1]}
    )
    x, y = read_examples(table)
    assert isinstance(x, dict)
    assert x["mask"].tolist() == [[1, 0], [1, 1]]
    assert y.tolist() == [0, 1]
    del pairs


def test_images_are_scaled_and_nothing_else_is_converted() -> None:
    images = torch.randint(256, (4, 3, 2, 2), dtype=torch.uint8)
    expected = images.float() / 255
    for data in (
        (images, Y),
        (images.numpy(), Y),
        TensorDataset(images, Y),
        ({"pixels": images, "mask": torch.ones(4, 2, dtype=torch.bool)}, Y),
    ):
        x, _ = ClientData(data).train
        assert torch.equal(trees.first_leaf(x), expected)
    flat, _ = read_examples((images.flatten(1), Y))
    assert torch.equal(trees.first_leaf(flat), expected.flatten(1))
    doubles, _ = read_examples((X.double(), Y))
    assert trees.first_leaf(doubles).dtype == torch.float64
    tokens, _ = read_examples((Y[:, None], Y))
    assert trees.first_leaf(tokens).dtype == torch.int64


def test_a_shuffling_loader_is_read_alike_every_time_and_leaves_the_generator_alone() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = read_examples(loader)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    second = read_examples(loader)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_mapped_arrays_are_not_copied(tmp_path: Any, recwarn: pytest.WarningsRecorder) -> None:
    np.save(tmp_path / "x.npy", X.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    x, _ = read_examples((mapped, Y))
    assert trees.first_leaf(x).data_ptr() == mapped.ctypes.data
    assert not recwarn.list


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "train: a int came; give a pair"),
        (None, "train: a NoneType came; give a pair"),
        ("cifar", "train: a str came; give a pair"),
        ((X, Y, Y), r"3 parts came where a pair \(inputs, targets\) is wanted"),
        ((X, Y[:3]), "4 inputs but 3 targets; give one of each per example"),
        (({"a": X, "b": X[:2]}, Y), r"4 inputs\['a'\] but 2 inputs\['b'\]"),
        ((X[:0], Y[:0]), "train has no examples; a client needs at least one"),
        ((X, "abcd"), "targets: a str came; give a tensor, an array"),
        ((X, np.array(["a", "b"])), "no tensor can be made of this ndarray"),
        ((X, [[1], [2, 3]]), "no tensor can be made of this list"),
        ((X, torch.tensor(1)), "targets are one number"),
        (({}, Y), "inputs: an empty dict came"),
        (({"m": torch.ones(4, 2, dtype=torch.uint8)}, Y), "uint8 is for images"),
        ([X, X, X], "a Tensor came where a pair"),
        ([(X[0], Y[0]), (X[0, :2], Y[0])], "differ in shape"),
        ([], "the list has no examples"),
        ({"x": X}, "there are the columns 'x'; name the targets"),
        (datasets.Dataset.from_dict({"t": ["a", "b"], "label": [0, 1]}), "column 't' holds text"),
        (
            datasets.Dataset.from_dict({"x": [[1], [1, 2]], "label": [0, 1]}),
            "column 'x' has rows of unequal shapes; pad",
        ),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_everything_else_is_named_in_one_sentence(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        ClientData(data)
    assert "\n" not in str(raised.value)


def test_an_empty_part_other_than_training_can_be_left_out() -> None:
    with pytest.raises(ValueError, match=r"validation has no examples; leave the part out"):
        ClientData((X, Y), validation=(X[:0], Y[:0]))


def test_balanced_batches_need_class_labels() -> None:
    with pytest.raises(ValueError, match="balanced batches need class labels"):
        ClientData((X, X), balanced=True)


def test_a_batch_yields_its_inputs() -> None:
    assert inputs_of_batch(X) is X
    assert inputs_of_batch((X, Y)) is X
    assert inputs_of_batch({"a": X, "labels": Y}) == {"a": X}
    assert inputs_of_batch(Examples((X, Y), Y)) == (X, Y)
