from __future__ import annotations

import math

import pytest
import torch

from fedl2p.data.pools.partition import (
    class_counts,
    class_distribution,
    deal,
    draw,
    label_entropy,
    stratified_split,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distributions(clients: int, classes: int, alpha: float) -> torch.Tensor:
    g = rng(1)
    return torch.stack(
        [class_distribution(classes, alpha=alpha, generator=g) for _ in range(clients)]
    )


@pytest.mark.parametrize("alpha", [1e-300, 1e-6, 0.01, 0.5, 1.0, 1000.0, math.inf])
def test_a_distribution_is_one_at_every_alpha(alpha: float) -> None:
    p = class_distribution(10, alpha=alpha, generator=rng())
    assert p.dtype == torch.float64
    assert bool((p >= 0).all())
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.0, 20.0])
def test_shares_have_the_moments_of_a_dirichlet(alpha: float) -> None:
    classes, clients = 5, 6000
    p = distributions(clients, classes, alpha)
    mean = 1 / classes
    variance = mean * (1 - mean) / (classes * alpha + 1)
    assert p.mean(0).numpy() == pytest.approx(mean, abs=5 * math.sqrt(variance / clients))
    assert p.var(0).numpy() == pytest.approx(variance, rel=0.15)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan])
def test_an_impossible_alpha_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must be above 0"):
        class_distribution(3, alpha=alpha, generator=rng())


def test_counts_follow_the_distribution_while_the_pool_allows() -> None:
    p = torch.tensor([0.5, 0.3, 0.2, 0.0])
    counts = class_counts(p, 10_000, torch.full((4,), 10_000), generator=rng())
    assert (counts / 10_000).numpy() == pytest.approx(p.numpy(), abs=0.02)
    assert counts[3] == 0


def test_a_used_up_class_is_dropped_and_the_rest_renormalised() -> None:
    available = torch.tensor([10, 5000, 5000])
    counts = class_counts(torch.tensor([0.9, 0.075, 0.025]), 4010, available, generator=rng())
    assert counts[0] == 10
    assert counts[1] / 4000 == pytest.approx(0.75, abs=0.03)
    assert available.tolist() == [10, 5000, 5000]


def test_classes_of_probability_zero_serve_when_nothing_else_is_left() -> None:
    available = torch.tensor([2, 3, 3])
    counts = class_counts(torch.tensor([1.0, 0.0, 0.0]), 8, available, generator=rng())
    assert counts.tolist() == [2, 3, 3]


@pytest.mark.parametrize("alpha", [1e-300, 0.01, 1.0])
@pytest.mark.parametrize("pool", [1, 2, 7])
@pytest.mark.parametrize("count", [0, 1, 6, 7, 50])
def test_draw_never_starves_from_a_tiny_pool(alpha: float, pool: int, count: int) -> None:
    labels = torch.arange(pool) % 3
    p = class_distribution(10, alpha=alpha, generator=rng(3))
    picked = draw(labels, p, count, generator=rng(4))
    assert len(picked) == count
    times = torch.bincount(picked, minlength=pool)
    # Without replacement as long as the pool lasts, then evenly again.
    assert int(times.max() - times.min()) <= 1


def test_draw_is_deterministic_and_hangs_on_the_generator() -> None:
    labels = torch.arange(1000) % 10
    p = class_distribution(10, alpha=1.0, generator=rng())
    first = draw(labels, p, 50, generator=rng(1))
    assert torch.equal(first, draw(labels, p, 50, generator=rng(1)))
    assert not torch.equal(first, draw(labels, p, 50, generator=rng(2)))


def test_draw_refuses_an_empty_pool_and_foreign_labels() -> None:
    p = torch.ones(3) / 3
    with pytest.raises(ValueError, match="pool is empty"):
        draw(torch.empty(0, dtype=torch.int64), p, 1, generator=rng())
    with pytest.raises(ValueError, match="labels run from 0 to 3 but there are 3 classes"):
        draw(torch.tensor([0, 3]), p, 1, generator=rng())


@pytest.mark.parametrize("alpha", [0.01, 0.5, 1000.0])
def test_dealing_gives_everything_out_once(alpha: float) -> None:
    labels = torch.arange(1000) % 10
    parts = deal(labels, distributions(20, 10, alpha), 50, generator=rng())
    assert [len(part) for part in parts] == [50] * 20
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1000))


def test_dealing_is_skewed_for_a_small_alpha() -> None:
    labels = torch.arange(20_000) % 10
    entropy = {}
    for alpha in (0.1, 1.0, 1000.0):
        parts = deal(labels, distributions(50, 10, alpha), 50, generator=rng())
        entropy[alpha] = sum(label_entropy(labels[part]) for part in parts) / 50
    assert entropy[0.1] < 1.0 < entropy[1.0] < 1.95 < entropy[1000.0]


def test_dealing_says_what_the_pool_can_give() -> None:
    with pytest.raises(ValueError, match=r"3 clients x 4 examples .* between 1 and 3"):
        deal(torch.arange(10), torch.ones(3, 10), 4, generator=rng())


def test_a_split_is_disjoint_complete_and_stratified() -> None:
    labels = torch.cat([torch.zeros(60), torch.ones(30), torch.full((12,), 2)]).long()
    pools = stratified_split(labels, (3, 2, 1), generator=rng())
    assert torch.equal(torch.cat(pools).sort().values, torch.arange(102))
    counts = [torch.bincount(labels[pool], minlength=3).tolist() for pool in pools]
    assert counts == [[30, 15, 6], [20, 10, 4], [10, 5, 2]]


@pytest.mark.parametrize("shares", [(4000, 1, 1), (1, 4000, 1), (1, 1, 4000), (1, 1e-9, 1e-9)])
def test_no_pool_lacks_a_class_that_has_enough(shares: tuple[float, ...]) -> None:
    labels = torch.cat([torch.zeros(3), torch.ones(50), torch.full((2,), 2)]).long()
    pools = stratified_split(labels, shares, generator=rng())
    assert torch.equal(torch.cat(pools).sort().values, torch.arange(55))
    assert all({0, 1} <= set(labels[pool].tolist()) for pool in pools)


def test_a_split_refuses_an_empty_share() -> None:
    with pytest.raises(ValueError, match="above 0"):
        stratified_split(torch.arange(4), (1, 0), generator=rng())


def test_label_entropy_in_closed_form() -> None:
    assert label_entropy(torch.tensor([4, 4, 4])) == 0
    assert label_entropy(torch.arange(10)) == pytest.approx(math.log(10))
    assert label_entropy(torch.tensor([0, 0, 0, 2])) == pytest.approx(
        0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    )
