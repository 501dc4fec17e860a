"""CIFAR-10 from archives in the published format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedl2p.data import cifar10
from fedl2p.data.cifar10 import FOLDER, NORMALISE, Cifar10
from fedl2p.data.files.folders import ROOT_VARIABLE
from fedl2p.data.pools.shared_pool import SharedPool
from support import data_archives
from support.rounds import one_round

SMALL: dict[str, Any] = {"seen": 8, "unseen": 4, "train": 8, "validation": 4, "test": 5}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar10")
    data_archives.write_cifar10(folder)
    return folder


def positions(population: SharedPool) -> dict[str, list[int]]:
    return {
        name: torch.cat([held.train, held.validation, held.test]).tolist()
        for name, held in population.indices.items()
    }


def test_a_client_holds_images_of_the_archive(root: Path) -> None:
    population = Cifar10(root=root, **SMALL).open(0)
    assert (population.shape, population.classes) == ((3, 32, 32), 10)
    assert population.seen == tuple(f"seen-{i:02d}" for i in range(8))
    assert population.unseen == tuple(f"unseen-{i:02d}" for i in range(4))
    files = data_archives.cifar10_files()
    content = b"".join(files[f"{FOLDER}/{name}"] for name in cifar10.BATCHES)
    rows = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    data, labels = rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]
    mean, sd = (torch.tensor(v).view(1, 3, 1, 1) for v in (NORMALISE.mean, NORMALISE.sd))
    for name in population.names:
        client = population.open(name)
        for part, count in zip(("train", "validation", "test"), (8, 4, 5), strict=True):
            examples = getattr(client, part)
            held = getattr(population.indices[name], part)
            assert examples.x.shape == (count, 3, 32, 32)
            assert examples.x.dtype == torch.float32
            assert examples.y.dtype == torch.int64
            expected = (torch.from_numpy(data[held]).float() / 255 - mean) / sd
            torch.testing.assert_close(examples.x, expected)
            assert examples.y.tolist() == labels[held].tolist()
            assert bool((held >= 200).all()) == (part == "test")


def test_no_two_clients_share_an_image(root: Path) -> None:
    for alpha in (0.1, 1000.0):
        held = positions(Cifar10(root=root, alpha=alpha, **SMALL).open(3))
        together = [p for own in held.values() for p in own]
        assert len(together) == len(set(together)) == 12 * 17


def test_the_parts_of_a_client_share_its_class_distribution(root: Path) -> None:
    few = {"seen": 10, "unseen": 0, "train": 16, "validation": 4, "test": 6}
    population = Cifar10(root=root, alpha=0.1, **few).open(0)
    shared = []
    # who is dealt last gets what is left, so not every client can
    for name in population.names:
        client = population.open(name)
        assert client.test is not None
        top = int(torch.bincount(torch.cat([client.train.y, client.validation.y])).argmax())
        shared.append(float((client.test.y == top).float().mean()))
    assert sum(shared) / len(shared) > 0.4  # 0.1 if it were not so


def test_alpha_is_the_skew(root: Path) -> None:
    skew = {}
    for alpha in (0.1, 1000.0):
        population = Cifar10(root=root, alpha=alpha, **SMALL).open(0)
        rows = [float(population.about(name)["label_entropy"]) for name in population.names]
        skew[alpha] = sum(rows) / len(rows)
    assert skew[0.1] + 0.5 < skew[1000.0]


def test_a_seed_fixes_everything_and_the_order_of_opening_nothing(root: Path) -> None:
    source = Cifar10(root=root, **SMALL)
    first, second, other = source.open(0), source.open(0), source.open(1)
    forward = [first.open(name).train for name in first.names]
    backward = [second.open(name).train for name in reversed(second.names)][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.y, b.y)
    assert positions(first) != positions(other)


def test_the_unseen_are_not_always_those_dealt_last(root: Path) -> None:
    """With all images dealt out, the last ones get what is left, whatever their distribution."""
    full = {"seen": 16, "unseen": 4, "train": 8, "validation": 2, "test": 3}
    entropy: dict[str, list[float]] = {"seen": [], "unseen": []}
    for seed in range(8):
        population = Cifar10(root=root, alpha=0.1, **full).open(seed)
        for pool in entropy:
            names = getattr(population, pool)
            entropy[pool] += [float(population.about(n)["label_entropy"]) for n in names]
    means = {pool: sum(v) / len(v) for pool, v in entropy.items()}
    assert abs(means["seen"] - means["unseen"]) < 0.25


def test_training_batches_are_augmented_and_nothing_else(root: Path) -> None:
    client = Cifar10(root=root, **SMALL).open(0).open("seen-00")
    assert client.augment is not None
    x = client.augment(client.train.x, torch.Generator().manual_seed(0))
    assert x.shape == client.train.x.shape
    assert not torch.equal(x, client.train.x)


def test_the_files_are_read_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Cifar10(root=root, **SMALL).open(0)
    monkeypatch.setattr(cifar10, "map_batch", None)
    Cifar10(root=root, alpha=0.5, **SMALL).open(7).open("seen-00")


def test_the_default_folder(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cifar10").symlink_to(root)
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    assert len(Cifar10(**SMALL).open(0).names) == 12
    monkeypatch.delenv(ROOT_VARIABLE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data/cifar10/cifar-10-batches-bin is missing; get"):
        Cifar10(**SMALL).open(0)


def test_one_round(root: Path) -> None:
    one_round(Cifar10(root=root, **SMALL).open(0), clients=4)


def test_more_clients_than_images(root: Path) -> None:
    with pytest.raises(ValueError, match=r"50 clients x 12 examples cannot be dealt from .* 200"):
        Cifar10(root=root, **(SMALL | {"seen": 46})).open(0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("seen", 0), ("unseen", -1), ("train", 0), ("validation", 0), ("test", 0), ("alpha", 0.0)],
)
def test_a_setting_out_of_range_is_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be"):
        Cifar10(**{field: value})  # type: ignore[arg-type]


WHOLE = data_archives.cifar_batch(np.zeros((40, 3072), np.uint8), [i % 10 for i in range(40)])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("data_batch_2.bin", WHOLE[:-1], "has 122919 bytes, but must have a multiple of 3073"),
        ("data_batch_2.bin", b"", "has 0 bytes, but must have a multiple of 3073"),
        ("data_batch_2.bin", b"\x0a" + WHOLE[1:], "holds the label 10, not 0 to 9"),
        (
            "test_batch.bin",
            data_archives.cifar_batch(np.zeros((9, 3072), np.uint8), range(9)),
            r"holds no test image of class 9 \(truck\)",
        ),
    ],
)
def test_a_bad_file_is_named_and_leaves_nothing(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    data_archives.write_cifar10(tmp_path, changed={name: content})
    folder = tmp_path / FOLDER
    with pytest.raises(ValueError, match=f"{said}.*; move {folder} away, if it is") as refused:
        Cifar10(root=tmp_path, **SMALL).open(0)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.glob("cache/**/*")) == []


def test_check_names_what_is_wrong(root: Path, tmp_path: Path) -> None:
    assert cifar10.check(root) == []
    assert f"{FOLDER} is missing; get it with" in cifar10.check(tmp_path)[0]
    data_archives.write_cifar10(tmp_path, changed={"data_batch_3.bin": WHOLE[:-1]})
    (tmp_path / FOLDER / "data_batch_1.bin").unlink()
    lines = cifar10.check(tmp_path)
    assert len(lines) == 2
    assert "data_batch_1.bin is missing; move" in lines[0]
    assert "data_batch_3.bin has 122919 bytes" in lines[1]
