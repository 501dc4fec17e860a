"""Fashion-MNIST from small idx files, plain and corrupted."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fedl2p.data import fashion
from fedl2p.data.fashion import CORRUPTIONS, FILES, NORMALISE, Fashion, FashionC
from fedl2p.data.files import folders
from fedl2p.data.files.folders import ROOT_VARIABLE, no_progress, root_of
from fedl2p.data.pools.sensors import SENSORS
from support import data_archives
from support.rounds import one_round


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fashion")
    return data_archives.write_folder(folder, data_archives.fashion_files())


def bytes_of(x: torch.Tensor) -> torch.Tensor:
    return ((x * NORMALISE.sd[0] + NORMALISE.mean[0]) * 255).round().long()


def numbers(x: torch.Tensor) -> list[int]:
    high, low = bytes_of(x)[:, 0, 0, :2].unbind(1)
    return (256 * high + low).tolist()


def test_a_client_holds_images_of_the_files(root: Path) -> None:
    source = Fashion(root=root, seen=4, unseen=2, train=30, validation=8, test=12)
    population = source.open(0)
    assert population.seen == ("seen-00", "seen-01", "seen-02", "seen-03")
    assert (population.classes, population.shape) == (10, (1, 28, 28))
    used = []
    for name in population.names:
        data = population.open(name)
        for part, count, begin, end in (
            ("train", 30, 0, 400),
            ("validation", 8, 0, 400),
            ("test", 12, 400, 600),
        ):
            examples = getattr(data, part)
            assert examples.x.shape == (count, 1, 28, 28)
            assert examples.x.dtype == torch.float32
            assert torch.equal(bytes_of(examples.x)[:, 0, 0, 2], examples.y)
            used += numbers(examples.x)
            assert all(begin <= number < end for number in numbers(examples.x))
    assert len(set(used)) == len(used) == 6 * 50  # no two clients share an image


def test_the_paper_has_a_thousand_clients_of_fifty() -> None:
    source = Fashion()
    assert (source.seen, source.unseen, source.train + source.validation) == (1000, 0, 50)


def test_a_seed_fixes_everything(root: Path) -> None:
    source = Fashion(root=root, seen=4, alpha=0.3)
    first, second, other = source.open(0), source.open(0), source.open(1)
    for name in first.names:
        assert torch.equal(first.open(name).train.x, second.open(name).train.x)
    assert not torch.equal(first.open("seen-00").train.x, other.open("seen-00").train.x)


def test_one_round(root: Path) -> None:
    one_round(Fashion(root=root, seen=3).open(0))


def test_images_of_another_size_and_other_classes_are_read(tmp_path: Path) -> None:
    files = data_archives.fashion_files(side=9)
    for part in ("train", "t10k"):
        count = 400 if part == "train" else 200
        labels = (np.arange(count) % 4).astype(np.uint8)
        files[f"{part}-labels-idx1-ubyte"] = data_archives.idx(labels)
    population = Fashion(root=data_archives.write_folder(tmp_path, files), seen=2).open(0)
    assert (population.shape, population.classes) == ((1, 9, 9), 4)


LABELS = np.arange(400, dtype=np.uint8) % 10


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train-images-idx3-ubyte.gz", b"", "begins with the bytes of an empty file"),
        ("train-labels-idx1-ubyte", data_archives.idx(LABELS[1:]), "a label for each of the 400"),
        ("train-labels-idx1-ubyte", data_archives.idx(LABELS % 9), "no image of class 9"),
        (
            "t10k-images-idx3-ubyte.gz",
            data_archives.idx(np.zeros((200, 9, 9), np.uint8)),
            "holds images of 28 x 28 pixels and .* of 9 x 9",
        ),
        (
            "t10k-images-idx3-ubyte.gz",
            data_archives.idx(np.zeros((200, 784), np.uint8)),
            r"must hold images, uint8 of shape \(n, height, width\)",
        ),
        (
            "train-labels-idx1-ubyte",
            data_archives.idx(LABELS.astype(np.int32), code=0x0C),
            r"holds int32 of shape \(400,\)",
        ),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    data_archives.write_folder(tmp_path, data_archives.fashion_files() | {name: content})
    with pytest.raises(ValueError, match=said) as refused:
        Fashion(root=tmp_path, seen=2).open(0)
    assert "\n" not in str(refused.value)


def test_a_missing_file_comes_with_both_remedies(tmp_path: Path) -> None:
    files = data_archives.fashion_files()
    del files["t10k-labels-idx1-ubyte"]
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte.gz is missing; install Debian's"):
        Fashion(root=data_archives.write_folder(tmp_path, files)).open(0)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    data_archives.write_folder(tmp_path, data_archives.fashion_files())
    assert len(fashion.load(tmp_path).labels) == 600
    data_archives.write_folder(tmp_path, data_archives.fashion_files(train=500))
    for path in tmp_path.iterdir():
        os.utime(path, ns=(1, 1))
    assert len(fashion.load(tmp_path).labels) == 700


def test_where_the_files_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    monkeypatch.setitem(folders.INSTALLED, "fashion", root)
    assert root_of("fashion") == root
    assert root_of("fashion", tmp_path / "given") == tmp_path / "given"
    assert root_of("cifar10") == tmp_path / "cifar10"
    assert Fashion(seen=2).open(0).seen == ("seen-00", "seen-01")
    (tmp_path / "fashion").mkdir()  # a folder of one's own comes first, also an empty one
    with pytest.raises(ValueError, match=r"fashion/train-images-idx3-ubyte\.gz is missing"):
        Fashion(seen=2).open(0)
    monkeypatch.setitem(folders.INSTALLED, "fashion", tmp_path / "not there")
    (tmp_path / "fashion").rmdir()
    assert root_of("fashion") == tmp_path / "fashion"


def test_check_compares_contents_however_compressed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(fashion.check(root)) == 4
    assert all("is not Fashion-MNIST's: the MD5 of its content" in p for p in fashion.check(root))
    contents = {
        f"{part}-{kind}": data_archives.idx(np.arange(6, dtype=np.uint8).reshape(2, 3))
        for part in ("train", "t10k")
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    }
    for name, content in contents.items():
        digits = hashlib.md5(content, usedforsecurity=False).hexdigest()
        monkeypatch.setitem(fashion.CHECKSUMS, name, ("", digits))
    data_archives.write_folder(tmp_path, contents)
    assert fashion.check(tmp_path) == fashion.get(tmp_path, no_progress) == []
    (tmp_path / FILES[2]).unlink()
    (problem,) = fashion.check(tmp_path)
    assert problem.startswith(f"{tmp_path / FILES[2]}.gz is missing")


# --- corrupted --------------------------------------------------------------------------------


def test_a_client_has_one_corruption(root: Path) -> None:
    source = FashionC(root=root, corruptions=("inversion", "thin"), severity=1.0, seen=2, unseen=1)
    population = source.open(0)
    assert population.seen == ("inversion-00", "inversion-01", "thin-00", "thin-01")
    assert population.unseen == ("inversion-02", "thin-02")
    for name in population.names:
        kind = name.partition("-")[0]
        assert population.about(name)["corruption"] == kind
        client = population.open(name)
        counts = [len(getattr(client, part).y) for part in ("train", "validation", "test")]
        assert counts == [43, 10, 13]
        third = bytes_of(client.train.x)[:, 0, 0, 2]  # the label, where the image is plain
        assert torch.equal(255 - third, client.train.y) == (kind == "inversion")


def test_no_photograph_crosses_parts_under_any_corruption(root: Path) -> None:
    """Both corruptions leave the numbers that the images carry, or make 255 minus them."""
    kinds = ("none", "inversion")
    source = FashionC(root=root, corruptions=kinds, severity=1.0, seen=4, alpha=0.1)
    population = source.open(1)
    used: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for name in population.names:
        for part, found in used.items():
            x = bytes_of(getattr(population.open(name), part).x)[:, 0, 0, :2]
            high, low = (255 - x if name.startswith("inversion") else x).unbind(1)
            found += (256 * high + low).tolist()
    sets = {part: set(found) for part, found in used.items()}
    assert not sets["train"] & sets["test"]
    assert not sets["train"] & sets["validation"]
    assert not sets["validation"] & sets["test"]
    assert set.union(*sets.values()) <= set(range(400, 600))  # of the test images
    # within a corruption no photograph comes twice
    assert all(found.count(number) <= 2 for found in used.values() for number in found)


def test_the_global_model_comes_from_clean_clients_of_the_same_skew(root: Path) -> None:
    source = FashionC(root=root, corruptions=("thin",), seen=2, alpha=0.3, clean=5)
    clean = source.open(3).pretraining()
    assert clean is not None
    assert len(clean.seen) == 5
    expected = Fashion(root=root, seen=5, alpha=0.3).open(3)
    for name in expected.names:
        assert torch.equal(clean.open(name).train.x, expected.open(name).train.x)
    assert expected.pretraining() is None


def test_the_papers_number_of_clients_and_corruptions() -> None:
    source = FashionC()
    assert len(set(source.corruptions)) == len(CORRUPTIONS) == 10
    assert set(CORRUPTIONS) < set(SENSORS) - {"none"}
    assert len(source.corruptions) * source.seen == 250


@pytest.mark.parametrize(
    ("source", "field", "value", "said"),
    [
        (Fashion, "seen", 0, "seen must be"),
        (Fashion, "alpha", 0.0, "alpha must be"),
        (Fashion, "test", 0, "test must be"),
        (FashionC, "clean", 0, "clean must be"),
        (FashionC, "severity", 1.5, "severity must be"),
        (FashionC, "corruptions", (), "corruptions must be"),
        (FashionC, "corruptions", ("blur", "blur"), "corruptions must be"),
        (FashionC, "corruptions", ("fog",), "there is no corruption 'fog'; there are none"),
    ],
)
def test_a_setting_out_of_range_is_named(
    source: type, field: str, value: object, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        source(**{field: value})
