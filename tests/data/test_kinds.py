"""Clients of six kinds: what makes each kind, and that kind, size and sensor are drawn evenly."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path

import pytest
import torch

from fedl2p.data import digits, fashion
from fedl2p.data.digits import HIDDEN_SENSORS, SEEN_SENSORS, load_digits
from fedl2p.data.kinds import KINDS, Kinds, KindsPopulation
from fedl2p.data.pools.client_indices import PARTS
from support import data_archives
from support.rounds import one_round

pytest.importorskip("sklearn")

SOURCE = Kinds(dataset="digits", sizes=(6, 12, 24, 60), test=40, clean=400)


@pytest.fixture(scope="module")
def population() -> KindsPopulation:
    return SOURCE.open(0)


def of_kind(population: KindsPopulation, kind: str, pool: str = "seen") -> list[str]:
    names = getattr(population, pool)
    return [name for name in names if population.about(name)["kind"] == kind]


def true_labels(population: KindsPopulation, name: str) -> dict[str, torch.Tensor]:
    labels = load_digits()[1]
    return {part: labels[rows] for part, rows in population.indices(name).items()}


def test_the_published_default() -> None:
    source = Kinds()
    assert (source.dataset, source.test, source.clean, source.wrong) == (
        "fashion",
        300,
        20_000,
        0.4,
    )
    assert (source.seen, source.unseen) == (120, 90)
    assert (min(source.sizes), max(source.sizes), source.tiny) == (6, 200, 6)
    assert source.kinds == KINDS
    assert len(KINDS) == 6


@pytest.mark.slow
def test_kinds_and_the_sizes_within_each_are_even(population: KindsPopulation) -> None:
    for pool, each in (("seen", 20), ("unseen", 15)):
        for kind in KINDS:
            names = of_kind(population, kind, pool)
            assert len(names) == each
            counts = collections.Counter(
                len(population.open(n).train.y) + len(population.open(n).validation.y)
                for n in names
            )
            assert set(counts) == ({6} if kind == "tiny" else {6, 12, 24, 60})
            assert max(counts.values()) - min(counts.values()) <= 1


def test_a_third_of_the_labelled_images_is_for_validation(population: KindsPopulation) -> None:
    for name in population.names:
        train, validation, test = (len(getattr(population.open(name), p).y) for p in PARTS)
        assert (train, validation) in {(4, 2), (8, 4), (16, 8), (40, 20)}
        assert test == 40
    two = Kinds(dataset="digits", sizes=(2, 3), tiny=2, seen=12, clean=400).open(0)
    for name in two.seen:
        assert len(two.open(name).train.y) in (1, 2)
        assert len(two.open(name).validation.y) == 1


def test_the_description_begins_with_the_kind(population: KindsPopulation) -> None:
    """The report groups clients by the first text of their description."""
    about = population.about("seen-000")
    assert next(iter(about)) == "kind"
    assert {"sensor", "severity", "label_entropy", "top_label"} < set(about)


def test_clean_and_tiny_clients_have_the_plain_images(population: KindsPopulation) -> None:
    images = load_digits()[0]
    for kind in ("clean", "tiny", "two-classes", "swapped-codes", "noisy-labels"):
        name = of_kind(population, kind)[0]
        about = population.about(name)
        assert (about["sensor"], about["severity"]) == ("none", 0.0)
        for part, rows in population.indices(name).items():
            x = getattr(population.open(name), part).x
            torch.testing.assert_close(x * digits.SD + digits.MEAN, images[rows])


@pytest.mark.parametrize("kind", ["clean", "tiny", "sensor", "two-classes"])
def test_labels_are_true_where_the_kind_does_not_change_them(
    population: KindsPopulation, kind: str
) -> None:
    for name in of_kind(population, kind):
        for part, labels in true_labels(population, name).items():
            assert torch.equal(getattr(population.open(name), part).y, labels)


def test_sensors_change_the_images_and_two_are_hidden(population: KindsPopulation) -> None:
    images = load_digits()[0]
    found = {
        pool: {population.about(n)["sensor"] for n in of_kind(population, "sensor", pool)}
        for pool in ("seen", "unseen")
    }
    assert found["seen"] == set(SEEN_SENSORS) - {"none"}
    assert found["unseen"] == found["seen"] | set(HIDDEN_SENSORS)
    for name in of_kind(population, "sensor"):
        assert 0.5 <= float(population.about(name)["severity"]) <= 1
        x = population.open(name).train.x * digits.SD + digits.MEAN
        assert float((x - images[population.indices(name)["train"]]).abs().mean()) > 0.02


def test_two_classes_are_all_that_such_a_client_has(population: KindsPopulation) -> None:
    pairs = set()
    for name in of_kind(population, "two-classes"):
        data = population.open(name)
        own = torch.cat([data.train.y, data.validation.y, data.test.y]).unique()
        assert len(own) == 2
        pairs.add(tuple(own.tolist()))
    assert len(pairs) > 10


def test_swapped_codes_are_the_clients_truth_in_every_part(population: KindsPopulation) -> None:
    exchanges = set()
    for name in of_kind(population, "swapped-codes"):
        codes: dict[int, int] = {}
        for part, labels in true_labels(population, name).items():
            own = getattr(population.open(name), part).y
            for true, code in zip(labels.tolist(), own.tolist(), strict=True):
                assert codes.setdefault(true, code) == code
        changed = {true: code for true, code in codes.items() if true != code}
        assert 4 <= len(changed) <= 6  # of 6, some may lack an image
        assert all(codes.get(code, true) == true for true, code in changed.items())
        exchanges.add(tuple(sorted(changed.items())))
    assert len(exchanges) > 15


def test_noise_is_in_the_labels_that_are_learned_from_alone(population: KindsPopulation) -> None:
    for name in of_kind(population, "noisy-labels"):
        data, labels = population.open(name), true_labels(population, name)
        assert data.validation is not None
        wrong = sum(
            int((getattr(data, part).y != labels[part]).sum()) for part in ("train", "validation")
        )
        assert wrong == round(0.4 * (data.train.num + data.validation.num))
        assert torch.equal(data.test.y, labels["test"])


def test_no_image_crosses_parts_and_the_clean_ones_are_nobodys(
    population: KindsPopulation,
) -> None:
    used: dict[str, set[int]] = {part: set() for part in PARTS}
    for name in population.names:
        for part, rows in population.indices(name).items():
            used[part] |= set(rows.tolist())
    images = load_digits()[0].flatten(1)
    clean = population.pretraining().open("clean").train
    assert len(clean.y) == pytest.approx(400, abs=5)  # rounded class by class
    assert torch.bincount(clean.y).min() > 30
    pixels = (clean.x * digits.SD + digits.MEAN).flatten(1)
    used["clean"] = set(torch.cdist(pixels, images).argmin(1).tolist())
    assert len(used["clean"]) == len(clean.y)
    for i, part in enumerate(used):
        for other in list(used)[:i]:
            assert used[part]
            assert not used[part] & used[other]


@pytest.mark.slow
def test_a_seed_fixes_everything_and_the_order_of_opening_nothing() -> None:
    first, second, other = SOURCE.open(0), SOURCE.open(0), SOURCE.open(1)
    for name in reversed(second.names):
        second.open(name)
    for name in first.names:
        a, b = first.open(name), second.open(name)
        assert torch.equal(a.train.x, b.train.x)
        assert torch.equal(a.train.y, b.train.y)
        assert first.about(name) == second.about(name)
    assert [first.about(n)["kind"] for n in first.seen] != [
        other.about(n)["kind"] for n in other.seen
    ]


def test_fewer_kinds() -> None:
    source = dataclasses.replace(SOURCE, kinds=("tiny", "clean"), seen=5, unseen=0)
    kinds = [source.open(0).about(name)["kind"] for name in source.open(0).names]
    assert sorted(kinds) == ["clean"] * 2 + ["tiny"] * 3


def test_fashion_has_test_images_of_its_test_part(tmp_path: Path) -> None:
    data_archives.write_folder(tmp_path, data_archives.fashion_files(train=600, test=200))
    source = Kinds(root=tmp_path, seen=6, unseen=6, sizes=(12,), test=30, clean=300)
    population = source.open(0)
    assert (population.classes, population.shape) == (10, (1, 28, 28))
    assert len(population.pretraining().open("clean").train.y) == 300
    pixels = torch.from_numpy(fashion.load(tmp_path).x)[:, 0, 0, :3].long()
    for name in population.names:
        indices = population.indices(name)
        assert indices["test"].min() >= 600
        assert max(indices["train"].max(), indices["validation"].max()) < 600
        if population.about(name)["kind"] == "clean":
            x = population.open(name).test.x[:, 0, 0, :3]
            x = ((x * fashion.NORMALISE.sd[0] + fashion.NORMALISE.mean[0]) * 255).round().long()
            assert torch.equal(x, pixels[indices["test"]])


def test_one_round(population: KindsPopulation) -> None:
    one_round(population, clients=12)
    one_round(population.pretraining())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"dataset": "mnist"}, "dataset must be fashion or digits, got 'mnist'"),
        ({"seen": 0}, "seen must be"),
        ({"unseen": -1}, "unseen must be"),
        ({"test": 0}, "test must be"),
        ({"clean": 0}, "clean must be"),
        ({"kinds": ()}, "kinds must be different names"),
        ({"kinds": ("tiny", "tiny")}, "kinds must be different names"),
        ({"kinds": ("blurred",)}, "there is no kind 'blurred'; there are clean, sensor"),
        ({"sizes": ()}, "sizes and tiny must all be at least 2"),
        ({"sizes": (6, 1)}, "sizes and tiny must all be at least 2"),
        ({"tiny": 1}, "sizes and tiny must all be at least 2"),
        ({"severity": (0.6, 0.5)}, "severity must be"),
        ({"swapped": 3}, "swapped must be an even number"),
        ({"swapped": 0}, "swapped must be an even number"),
        ({"wrong": 1.0}, "wrong must be"),
        ({"swapped": 12}, "swapped is 12, but there are only 10 classes"),
        ({"clean": 1790}, "clean is 1790, but there are only 1797 images"),
    ],
)
def test_a_setting_out_of_range_is_named(changed: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(SOURCE, **changed).open(0)


def test_an_unknown_client_is_a_key_error(population: KindsPopulation) -> None:
    for question in (population.open, population.about, population.indices):
        with pytest.raises(KeyError, match="seen-000 to unseen-89"):
            question("seen-999")
