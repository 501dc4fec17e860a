from __future__ import annotations

import collections
import math

import pytest
import torch

from fedl2p.data.digits import HIDDEN_SENSORS, MEAN, SD, SEEN_SENSORS, Digits, load_digits
from fedl2p.data.pools.client_indices import PARTS
from fedl2p.data.pools.sensors import SENSORS, apply_sensor, rotations, warp

pytest.importorskip("sklearn")

SOURCE = Digits()


def sensors(source: Digits, seed: int = 0) -> dict[str, list[str]]:
    population = source.open(seed)
    return {
        pool: [str(population.about(name)["sensor"]) for name in getattr(population, pool)]
        for pool in ("seen", "unseen")
    }


def test_names_are_in_order_and_the_pools_apart() -> None:
    population = SOURCE.open(0)
    assert population.seen == tuple(f"seen-{i:02d}" for i in range(40))
    assert population.unseen == tuple(f"unseen-{i:02d}" for i in range(20))
    assert population.names == population.seen + population.unseen
    assert (population.classes, population.shape) == (10, (1, 8, 8))
    assert Digits(seen=101).open(0).seen[7] == "seen-007"


def test_a_client_has_parts_of_the_wanted_sizes_and_types() -> None:
    population = SOURCE.open(0)
    for name in ("seen-00", "unseen-19"):
        data = population.open(name)
        for part, count in zip(PARTS, (96, 64, 128), strict=True):
            examples = getattr(data, part)
            assert examples.x.shape == (count, 1, 8, 8)
            assert examples.x.dtype == torch.float32
            assert examples.y.shape == (count,)
            assert examples.y.dtype == torch.int64
            assert bool(torch.isfinite(examples.x).all())
            low, high = (0 - MEAN) / SD, (1 - MEAN) / SD
            assert low - 1e-5 <= float(examples.x.min()) < float(examples.x.max()) <= high + 1e-5


@pytest.mark.parametrize("alpha", [0.01, 1.0])
def test_no_image_crosses_parts(alpha: float) -> None:
    population = Digits(alpha=alpha).open(3)
    used: dict[str, set[int]] = {part: set() for part in PARTS}
    for name in population.names:
        for part, positions in population.indices(name).items():
            used[part] |= set(positions.tolist())
    for part, other in (PARTS[:2], PARTS[1:], PARTS[::2]):
        assert used[part]
        assert not used[part] & used[other]


def test_what_a_client_holds_is_what_its_indices_say() -> None:
    images, labels = load_digits()
    population = Digits(rotation=0, shift=0, feature_shift=False).open(1)
    for name in ("seen-05", "unseen-01"):
        data = population.open(name)
        for part, positions in population.indices(name).items():
            examples = getattr(data, part)
            torch.testing.assert_close(examples.x * SD + MEAN, images[positions])
            assert torch.equal(examples.y, labels[positions])


def test_the_parts_with_jitter_and_sensor_come_from_the_same_indices() -> None:
    plain = Digits(rotation=0, shift=0, feature_shift=False).open(1)
    shown = SOURCE.open(1)
    for name in plain.names[::7]:
        for part in PARTS:
            assert torch.equal(plain.indices(name)[part], shown.indices(name)[part])
            assert torch.equal(getattr(plain.open(name), part).y, getattr(shown.open(name), part).y)


def test_the_normalisation_is_that_of_the_images() -> None:
    images, labels = load_digits()
    assert images.shape == (1797, 1, 8, 8)
    assert torch.bincount(labels).min() > 150
    assert float(images.mean()) == pytest.approx(MEAN, abs=1e-4)
    assert float(images.std()) == pytest.approx(SD, abs=1e-3)


def test_the_images_are_those_that_scikit_learn_loads() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    bunch = datasets.load_digits()
    images, labels = load_digits()
    assert torch.equal(images[:, 0], torch.tensor(bunch.images, dtype=torch.float32) / 16)
    assert torch.equal(labels, torch.tensor(bunch.target))
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert images.is_contiguous()


def test_every_image_moves_on_its_own() -> None:
    still = Digits(rotation=0, shift=0, feature_shift=False).open(0).open("seen-00").train
    moved = Digits(feature_shift=False).open(0).open("seen-00").train
    distance = (still.x - moved.x).flatten(1).norm(dim=1)
    assert float(distance.min()) > 0
    assert len(set(distance.tolist())) == len(distance)
    # It remains the same digit: its nearest still image has the same label.
    nearest = torch.cdist(moved.x.flatten(1), still.x.flatten(1)).argmin(1)
    assert float((still.y[nearest] == moved.y).float().mean()) > 0.95


def test_a_seed_fixes_everything_and_the_order_of_opening_nothing() -> None:
    first, second, other = SOURCE.open(0), SOURCE.open(0), SOURCE.open(1)
    forward = [first.open(name).train for name in first.names]
    backward = [second.open(name).train for name in reversed(second.names)][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.y, b.y)
    assert all(first.about(name) == second.about(name) for name in first.names)
    assert not torch.equal(forward[0].x, other.open("seen-00").train.x)


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = SOURCE.open(0).open("seen-03").train.x
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(a, SOURCE.open(0).open("seen-03").train.x)


def test_a_small_alpha_makes_skewed_clients() -> None:
    entropy = {}
    for alpha in (0.1, 1.0, 1000.0):
        population = Digits(alpha=alpha).open(0)
        rows = [float(population.about(name)["label_entropy"]) for name in population.names]
        entropy[alpha] = sum(rows) / len(rows)
    assert entropy[0.1] < 1.2 < entropy[1.0] < 2.1 < entropy[1000.0] <= math.log(10)


def test_the_parts_of_a_client_share_its_label_distribution() -> None:
    population = Digits(alpha=0.3).open(0)
    within, between = [], []
    previous = None
    for name in population.seen:
        data = population.open(name)
        assert data.test is not None
        train, test = (
            torch.bincount(part.y, minlength=10) / len(part.y) for part in (data.train, data.test)
        )
        within.append(float((train - test).abs().sum()))
        if previous is not None:
            between.append(float((previous - test).abs().sum()))
        previous = train
    assert sum(within) / len(within) < 0.4 * sum(between) / len(between)


def test_the_kinds_of_sensors_are_many_and_two_are_hidden() -> None:
    assert len(SEEN_SENSORS) >= 9
    assert len(HIDDEN_SENSORS) == 2
    for seed in range(5):
        by_pool = sensors(SOURCE, seed)
        assert set(by_pool["seen"]) == set(SEEN_SENSORS)
        assert set(by_pool["unseen"]) == set(SENSORS)


def test_the_kinds_go_round_evenly_and_are_shuffled() -> None:
    for names in sensors(SOURCE).values():
        counts = collections.Counter(names)
        assert max(counts.values()) - min(counts.values()) <= 1
    assert sensors(SOURCE, 0)["seen"] != sensors(SOURCE, 1)["seen"]


def test_even_two_unseen_clients_have_the_hidden_kinds() -> None:
    assert set(sensors(Digits(seen=3, unseen=2))["unseen"]) == set(HIDDEN_SENSORS)


def test_without_feature_shift_every_sensor_is_plain() -> None:
    population = Digits(feature_shift=False).open(0)
    for name in population.names:
        about = population.about(name)
        assert (about["sensor"], about["severity"]) == ("none", 0.0)


def test_severities_stay_in_their_range() -> None:
    population = Digits(severity=(0.4, 0.5)).open(0)
    severities = {
        float(population.about(name)["severity"])
        for name in population.names
        if population.about(name)["sensor"] != "none"
    }
    assert len(severities) > 20
    assert all(0.4 <= severity <= 0.5 for severity in severities)


def test_a_population_without_unseen_clients() -> None:
    population = Digits(seen=1, unseen=0).open(0)
    assert population.names == ("seen-00",)


def test_a_client_that_wants_more_than_the_pools_hold() -> None:
    data = Digits(seen=1, unseen=0, alpha=0.01, train=4000, validation=1, test=1).open(0)
    assert len(data.open("seen-00").train.y) == 4000


def test_an_unknown_client_is_a_key_error() -> None:
    population = SOURCE.open(0)
    for question in (population.open, population.about, population.indices):
        with pytest.raises(KeyError, match="seen-00 to unseen-19"):
            question("seen-40")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seen", 0),
        ("unseen", -1),
        ("alpha", 0.0),
        ("alpha", math.nan),
        ("train", 0),
        ("validation", 0),
        ("test", -3),
        ("rotation", -1.0),
        ("rotation", math.nan),
        ("shift", 5.0),
        ("severity", (0.6, 0.5)),
        ("severity", (0.5, 1.5)),
    ],
)
def test_a_setting_out_of_range_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be"):
        Digits(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", list(SENSORS))
@pytest.mark.parametrize("severity", [0.0, 0.5, 1.0])
def test_a_sensor_changes_images_one_by_one(kind: str, severity: float) -> None:
    images = load_digits()[0][:40]
    seen = apply_sensor(kind, images, severity=severity, generator=torch.Generator().manual_seed(0))
    assert seen.shape == images.shape
    assert 0 <= float(seen.min()) <= float(seen.max()) <= 1
    changed = float((seen - images).abs().mean())
    assert changed == 0 if kind == "none" else changed > 0.02
    if kind != "noise":  # each image has noise of its own
        again = torch.Generator().manual_seed(0)
        alone = apply_sensor(kind, images[7:9], severity=severity, generator=again)
        torch.testing.assert_close(alone, seen[7:9], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in SENSORS if kind != "none"])
def test_a_severer_sensor_is_further_from_the_image(kind: str) -> None:
    images = load_digits()[0][:200]
    far = []
    for severity in (0.0, 1.0):
        rng = torch.Generator().manual_seed(0)
        seen = apply_sensor(kind, images, severity=severity, generator=rng)
        far.append(float((seen - images).abs().mean()))
    assert far[0] < far[1]


def test_an_unknown_sensor_or_severity_is_refused() -> None:
    images = load_digits()[0][:2]
    rng = torch.Generator()
    with pytest.raises(ValueError, match=r"no sensor 'fog'; the kinds are none, inversion"):
        apply_sensor("fog", images, severity=0.5, generator=rng)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.1"):
        apply_sensor("blur", images, severity=1.1, generator=rng)


def test_a_warp_by_nothing_and_by_a_quarter_turn() -> None:
    images = load_digits()[0][:5]
    torch.testing.assert_close(warp(images, torch.eye(2)), images, rtol=0, atol=1e-5)
    turned = warp(images, rotations(torch.tensor(90.0)))
    torch.testing.assert_close(turned, images.rot90(1, (2, 3)), rtol=0, atol=1e-5)
    moved = warp(images, torch.eye(2), torch.tensor([[1.0, 0.0]]).repeat(5, 1))
    torch.testing.assert_close(moved[..., :-1], images[..., 1:], rtol=0, atol=1e-5)


def test_clients_of_different_sizes() -> None:
    source = Digits(sizes=(5, 20, 200), seen=9, unseen=6)
    population = source.open(1)
    for pool, each in ((population.seen, 3), (population.unseen, 2)):
        counts = collections.Counter(len(population.open(n).train.x) for n in pool)
        assert counts == {5: each, 20: each, 200: each}
    for name in population.names:
        data = population.open(name)
        train, validation, test = (len(getattr(data, part).x) for part in PARTS)
        assert validation == {5: 3, 20: 13, 200: 133}[train]
        assert test == source.test
    with pytest.raises(ValueError, match="sizes must all be at least 1"):
        Digits(sizes=(0, 5))
