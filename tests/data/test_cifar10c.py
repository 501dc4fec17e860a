"""CIFAR-10-C from archives in the published format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedl2p.data import cifar10c
from fedl2p.data.cifar10 import NORMALISE
from fedl2p.data.cifar10c import CORRUPTIONS, Cifar10C
from support import data_archives
from support.rounds import one_round

KINDS = ("frost", "fog")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar10c")
    return data_archives.write_folder(folder, data_archives.cifar10c_files(KINDS))


def first_pixels(x: torch.Tensor) -> torch.Tensor:
    mean, sd = (torch.tensor(v) for v in (NORMALISE.mean, NORMALISE.sd))
    return ((x[:, :, 0, 0] * sd + mean) * 255).round().long()


@pytest.mark.parametrize("severity", [0, 2, 4])
def test_a_client_has_one_corruption_at_one_severity(root: Path, severity: int) -> None:
    source = Cifar10C(root=root, corruptions=KINDS, severity=severity, seen=2, unseen=1)
    population = source.open(0)
    assert population.seen == ("frost-00", "frost-01", "fog-00", "fog-01")
    assert population.unseen == ("frost-02", "fog-02")
    for name in population.names:
        kind = name.partition("-")[0]
        assert population.about(name)["corruption"] == kind
        client = population.open(name)
        for part, count in (("train", 60 // 3), ("validation", 20 // 3), ("test", 20 // 3)):
            examples = getattr(client, part)
            assert examples.x.shape == (count, 3, 32, 32)
            number, level, corruption = first_pixels(examples.x).unbind(1)
            assert set(level.tolist()) == {severity}
            assert set(corruption.tolist()) == {KINDS.index(kind)}
            assert torch.equal(number % 10, examples.y)


def test_no_photograph_crosses_parts_under_any_corruption(root: Path) -> None:
    population = Cifar10C(root=root, corruptions=KINDS, seen=4, alpha=0.1).open(1)
    used: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for name in population.names:
        client = population.open(name)
        for part, numbers in used.items():
            numbers += first_pixels(getattr(client, part).x)[:, 0].tolist()
    sets = {part: set(numbers) for part, numbers in used.items()}
    assert not sets["train"] & sets["test"]
    assert not sets["train"] & sets["validation"]
    assert not sets["validation"] & sets["test"]
    # and within a corruption no photograph comes twice: here both show all of them
    assert sorted(used["train"]) == sorted([*sets["train"]] * 2)
    assert sum(map(len, used.values())) == 200


def test_one_round(root: Path) -> None:
    one_round(Cifar10C(root=root, corruptions=KINDS, seen=2).open(0))


def test_the_published_population() -> None:
    published = Cifar10C()
    assert len(published.corruptions) * published.seen == 250
    assert published.severity == 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"fog": np.zeros((500, 32, 31, 3), np.uint8)},
            r"fog.npy holds uint8 of shape .*, 31, 3\)",
        ),
        (
            {"fog": np.zeros((500, 32, 32, 3), np.float32)},
            "fog.npy holds float32 .* must hold uint8",
        ),
        (
            {"fog": np.zeros((490, 32, 32, 3), np.uint8)},
            "fog.npy holds 490 rows, .*labels.npy 500",
        ),
        ({"labels": np.full(500, 10, np.uint8)}, "label that is not one of 0 to 9"),
        ({"labels": np.zeros(500, np.uint8)}, r"labels.npy holds no image of class 1 \(automobile"),
        ({"labels": np.array([None] * 500)}, "labels.npy is no .npy file of numbers"),
        ({"fog": None}, "fog.npy is missing; move"),
    ],
)
def test_a_bad_file_is_named_and_leaves_nothing(
    tmp_path: Path, changed: dict[str, np.ndarray | None], said: str
) -> None:
    files = data_archives.cifar10c_files(KINDS)
    for name, array in changed.items():
        if array is None:
            del files[f"CIFAR-10-C/{name}.npy"]
        else:
            files[f"CIFAR-10-C/{name}.npy"] = data_archives.npy(array)
    data_archives.write_folder(tmp_path, files)
    with pytest.raises(ValueError, match=said) as refused:
        Cifar10C(root=tmp_path, corruptions=KINDS, seen=2).open(0)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.glob("cache/**/*")) == []


def test_more_clients_than_images(root: Path) -> None:
    with pytest.raises(ValueError, match="frost has 20 validation examples for 25 clients"):
        Cifar10C(root=root, corruptions=KINDS, seen=25).open(0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"severity": 5}, "severity must be 0 to 4"),
        ({"corruptions": ("rain",)}, "no corruption 'rain'; there are brightness"),
        ({"corruptions": ()}, "corruptions must be different names"),
        ({"corruptions": ("fog", "fog")}, "corruptions must be different names"),
        ({"seen": 0}, "seen must be"),
        ({"alpha": -1.0}, "alpha must be"),
    ],
)
def test_a_setting_out_of_range_is_named(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Cifar10C(**changes)  # type: ignore[arg-type]


def test_check_names_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "CIFAR-10-C is missing; get it with" in cifar10c.check(tmp_path)[0]
    files = data_archives.cifar10c_files(cifar10c.ALL_CORRUPTIONS, per_severity=10)
    data_archives.write_folder(tmp_path, files)
    monkeypatch.setattr(cifar10c, "PUBLISHED", 10)
    assert cifar10c.check(tmp_path) == []
    folder = tmp_path / "CIFAR-10-C"
    (folder / "fog.npy").unlink()
    (folder / "snow.npy").write_bytes((folder / "snow.npy").read_bytes()[:-1])
    (folder / "frost.npy").write_bytes(b"no array")
    lines = cifar10c.check(tmp_path)
    assert len(lines) == 3
    assert "frost.npy is no .npy file" in lines[0]
    assert "snow.npy is no .npy file of numbers, or cut off (mmap length" in lines[1]
    assert "fog.npy is missing" in lines[2]
    monkeypatch.undo()
    assert len(cifar10c.check(tmp_path)) == len(CORRUPTIONS) + 10
