"""Data sets in the hub's form, from Parquet files in a folder."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedl2p import recipes
from fedl2p.data.huggingface import HuggingFace
from fedl2p.data.pools.flwr_partitioners import parse_partitioner
from support.rounds import one_round

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("flwr_datasets")

DIRICHLET = (
    "DirichletPartitioner(num_partitions=6, partition_by='label', alpha=2.0, min_partition_size=3)"
)


def png(value: int, size: tuple[int, int] = (12, 10)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (value, value, 255 - value)).save(out, "PNG")
    return out.getvalue()


def write(
    folder: Path,
    *,
    labels: list[Any],
    images: list[Any] | None = None,
    files: int = 2,
    column: str = "image",
    **more: list[Any],
) -> Path:
    """Write Parquet files as the hub has them: images as {bytes, path}."""
    folder.mkdir(parents=True, exist_ok=True)
    if images is None:
        images = [{"bytes": png(i % 256), "path": f"{i}.png"} for i in range(len(labels))]
    table = arrow.table({column: images, "label": labels, **more})
    per_file = -(-len(labels) // files)
    for i in range(files):
        name = f"train-{i:05d}-of-{files:05d}.parquet"
        parquet.write_table(table.slice(i * per_file, per_file), folder / name)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ["cat", "dog", "emu"]
    count = 150
    return write(
        tmp_path_factory.mktemp("pets"),
        labels=[names[i % 3] for i in range(count)],
        writer=[f"w{i % 5}" for i in range(count)],
    )


@pytest.fixture
def source(folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {"dataset": str(folder), "root": tmp_path / "decoded"}


def numbers(x: torch.Tensor) -> list[int]:
    return ((x[:, 0, 0, 0] * 0.5 + 0.5) * 255).round().long().tolist()


def test_every_example_is_dealt_out_once_with_its_label(source: dict[str, Any]) -> None:
    population = HuggingFace(partitioner=DIRICHLET, unseen=2, **source).open(0)
    assert len(population.seen) == 4
    assert len(population.unseen) == 2
    assert set(population.names) == {f"client-0{i}" for i in range(6)}
    assert (population.shape, population.classes) == ((3, 10, 12), 3)
    found: list[int] = []
    for name in population.names:
        client = population.open(name)
        for part in (client.train, client.validation, client.test):
            assert part is not None
            assert torch.equal(torch.tensor(numbers(part.x)) % 3, part.y)
            found += numbers(part.x)
        assert client.test is not None
        total = sum(len(p) for p in vars(population.indices[name]).values() if torch.is_tensor(p))
        assert abs(len(client.test.y) - 0.2 * total) <= 1
    assert sorted(found) == list(range(150))


def test_seeds(source: dict[str, Any]) -> None:
    def held(seed: int, partitioner: str = DIRICHLET) -> list[list[int]]:
        population = HuggingFace(partitioner=partitioner, **source).open(seed)
        return [numbers(population.open(name).train.x) for name in population.names]

    assert held(0) == held(0)
    assert sorted(map(len, held(0))) != sorted(map(len, held(1)))
    own = DIRICHLET.replace(")", ", seed=7)")
    assert [sorted(h) for h in held(0, own)] != [sorted(h) for h in held(0)]
    assert [len(h) for h in held(0, own)] == [len(h) for h in held(1, own)]


def test_a_natural_partition_by_another_column(source: dict[str, Any]) -> None:
    named = "NaturalIdPartitioner(partition_by='writer')"
    population = HuggingFace(partitioner=named, **source).open(0)
    assert len(population.names) == 5
    for name in population.names:
        (writer,) = {n % 5 for n in numbers(population.open(name).train.x)}
        assert 0 <= writer < 5


def test_one_round(source: dict[str, Any]) -> None:
    one_round(HuggingFace(partitioner=DIRICHLET, augment="crop-flip", **source).open(0))


def test_the_recipe_is_called_by_its_name(folder: Path) -> None:
    study = recipes.huggingface(dataset=str(folder), partitioner=DIRICHLET)
    assert study.recipe == "huggingface"
    assert isinstance(study.data, HuggingFace)
    assert study.data.partitioner == DIRICHLET
    assert recipes.get("huggingface").recipe == "huggingface"
    with pytest.raises(AttributeError, match="no attribute 'hugginface'"):
        _ = recipes.hugginface


def test_images_are_resized_and_made_grey_on_demand(source: dict[str, Any]) -> None:
    plain = "IidPartitioner(num_partitions=3)"
    for size, channels in [((8, 6), 3), (None, 1)]:
        made = HuggingFace(partitioner=plain, size=size, channels=channels, **source)  # type: ignore[arg-type]
        assert made.open(0).shape == (channels, *(size or (10, 12)))


def test_integer_labels(tmp_path: Path) -> None:
    data = write(tmp_path / "d", labels=[i % 4 + 1 for i in range(40)])
    population = HuggingFace(
        dataset=str(data), root=tmp_path / "r", partitioner="IidPartitioner(num_partitions=4)"
    ).open(0)
    assert population.classes == 5


BAD_IMAGES = [{"bytes": png(1), "path": None} for _ in range(20)]


@pytest.mark.parametrize(
    ("written", "settings", "said"),
    [
        ({}, {"image": "picture"}, "has no column 'picture'; there are image, label"),
        ({}, {"label": "class"}, "has no column 'class'"),
        ({}, {"image": "label"}, "column 'label' of .* holds .*, not images"),
        ({}, {"split": "test"}, "cannot load the data set"),
        ({}, {"partitioner": "RandomPartitioner(3)"}, "no partitioner 'RandomPartitioner'; there"),
        ({}, {"partitioner": "IidPartitioner(parts=3)"}, "cannot be made: .*parts"),
        ({}, {"partitioner": "IidPartitioner(num_partitions=9)"}, "2 examples, too few to split"),
        ({}, {"partitioner": "NaturalIdPartitioner(partition_by='who')"}, "cannot deal out"),
        ({}, {"unseen": 4}, "unseen is 4, but there are only 4 clients"),
        ({"labels": [-1] * 20}, {}, "holds -1; labels must"),
        ({"labels": [0.5] * 20}, {}, "holds 0.5; labels must"),
        (
            {"images": [*BAD_IMAGES[:-1], {"bytes": png(1, (9, 9)), "path": None}]},
            {},
            r"image 19 of .* is 9 x 9, the first 10 x 12; give a size for all",
        ),
        (
            {"images": [*BAD_IMAGES[:-1], {"bytes": b"no picture", "path": None}]},
            {},
            "image 19 of .* is no readable image",
        ),
        ({"images": [*BAD_IMAGES[:-1], None]}, {}, "example 19 of .* has no image"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, written: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    data = write(tmp_path / "d", **({"labels": [i % 2 for i in range(20)]} | written))
    usual = {"partitioner": "IidPartitioner(num_partitions=4)"}
    source = HuggingFace(dataset=str(data), root=tmp_path / "r", **(usual | settings))
    with pytest.raises(ValueError, match=said) as refused:
        source.open(0)
    assert "\n" not in str(refused.value)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    data = write(tmp_path / "d", labels=[0, 1] * 10)
    file = next(data.glob("*.parquet"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cannot load the data set .*files are whole") as refused:
        HuggingFace(dataset=str(data), root=tmp_path / "r").open(0)
    assert "\n" not in str(refused.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no .parquet file"):
        HuggingFace(dataset=str(tmp_path / "empty"), root=tmp_path / "r").open(0)
    with pytest.raises(ValueError, match="is not a folder"):
        HuggingFace(dataset=str(tmp_path / "none"), root=tmp_path / "r").open(0)
    with pytest.raises(ValueError, match="no data set is named"):
        HuggingFace(root=tmp_path / "r").open(0)


@pytest.mark.parametrize(
    "text",
    ["", "IidPartitioner", "os.system('x')", "A(open('x'))", "A(b=__import__)", "A(**{})", "A(1"],
)
def test_a_partitioner_is_a_call_with_literals(text: str) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        HuggingFace(partitioner=text)


def test_arguments_are_read_as_python() -> None:
    assert parse_partitioner("A(3, b='x', c=[0.5, None])") == (
        "A",
        [3],
        {"b": "x", "c": [0.5, None]},
    )


@pytest.mark.parametrize(
    ("field", "value"), [("unseen", -1), ("channels", 2), ("size", (0, 3)), ("sd", 0.0)]
)
def test_a_setting_out_of_range_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be"):
        HuggingFace(**{field: value})  # type: ignore[arg-type]


def test_no_pixel_is_lost(source: dict[str, Any]) -> None:
    population = HuggingFace(partitioner=DIRICHLET, **source).open(0)
    x = population.open("client-00").train.x
    bytes_ = ((x * 0.5 + 0.5) * 255).round().numpy().astype(np.uint8)
    assert (bytes_[:, 0] == 255 - bytes_[:, 2]).all()
