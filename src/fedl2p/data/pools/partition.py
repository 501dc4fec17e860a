"""Label skew: partition of a pool of labelled examples among clients by Dirichlet distributions.

The rule ("LDA", Hsu et al. 2019, https://arxiv.org/abs/1909.06335): every client gets the same
number of examples; its class distribution is one draw from a symmetric Dirichlet(alpha), used for
each of its parts; examples are taken without replacement, and a class that is used up is dropped
while the others are renormalised. There is no rejection sampling: every loop below ends after at
most as many turns as there are classes (or copies of the pool).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor


def class_distribution(classes: int, *, alpha: float, generator: torch.Generator) -> Tensor:
    """Draw one client's class distribution from a symmetric Dirichlet.

    Parameters
    ----------
    classes
        Number of classes, at least 1.
    alpha
        Concentration, > 0: towards 0 a client has one class, at 1 every mixture is as likely as
        any other, at 1000 all clients are alike. ``inf`` gives the uniform distribution.
    generator
        Source of the draw.

    Returns
    -------
    Tensor
        Shape (classes,), float64, sums to 1; finite for every alpha > 0.

    Raises
    ------
    ValueError
        If ``classes`` or ``alpha`` is out of range.
    """
    if classes < 1:
        raise ValueError(f"classes must be at least 1, got {classes}")
    if not alpha > 0:
        raise ValueError(f"alpha must be above 0, got {alpha}; inf gives equal shares")
    if alpha == float("inf"):
        return torch.full((classes,), 1 / classes, dtype=torch.float64)
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    # In logarithms, Gamma(a) = Gamma(a + 1) * U^(1/a): for a small alpha all plain Gamma draws
    # round to zero, and their shares to 0 / 0.
    log_gamma = np.log(rng.standard_gamma(alpha + 1, classes))
    log_gamma += np.log1p(-rng.random(classes)) / alpha
    return torch.softmax(torch.from_numpy(log_gamma), dim=0)


def class_counts(
    distribution: Tensor, count: int, available: Tensor, *, generator: torch.Generator
) -> Tensor:
    """Draw how many examples of each class a client gets.

    The same distribution as drawing one example after the other: a draw of a used-up class is
    repeated among the classes that are left. If those all have probability zero, they are equally
    likely.

    Parameters
    ----------
    distribution
        Shape (classes,), >= 0, need not sum to 1.
    count
        Number of examples, at most ``available.sum()``.
    available
        Shape (classes,), number of examples left of each class.
    generator
        Source of the draws.

    Returns
    -------
    Tensor
        Shape (classes,), int64, sums to ``count``, nowhere above ``available``.

    Raises
    ------
    ValueError
        If the pool holds fewer than ``count`` examples.
    """
    left = available.clone()
    if count > int(left.sum()):
        raise ValueError(f"{count} examples wanted but only {int(left.sum())} are left in the pool")
    counts = torch.zeros_like(left)
    while (missing := count - int(counts.sum())) > 0:
        weights = distribution.to(torch.float64) * (left > 0)
        if float(weights.sum()) == 0.0:
            weights = (left > 0).to(torch.float64)
        drawn = torch.multinomial(weights, missing, replacement=True, generator=generator)
        taken = torch.minimum(torch.bincount(drawn, minlength=len(left)), left)
        counts += taken
        left -= taken
    return counts


def draw(labels: Tensor, distribution: Tensor, count: int, *, generator: torch.Generator) -> Tensor:
    """Draw one client's examples from a pool that all clients draw from.

    Examples are drawn without replacement within the client. A client with more examples than the
    pool gets every example once and draws the rest from the full pool again.

    Parameters
    ----------
    labels
        Shape (n,), integer labels of the pool, n >= 1.
    distribution
        Shape (classes,), the client's class distribution.
    count
        Number of examples, >= 0.
    generator
        Source of the draws.

    Returns
    -------
    Tensor
        Shape (count,), int64 positions in the pool, in random order.

    Raises
    ------
    ValueError
        If the pool is empty or holds a label outside the distribution.
    """
    if len(labels) == 0:
        raise ValueError("the pool is empty; give it at least one example")
    members = _members(labels, len(distribution))
    available = torch.tensor([len(m) for m in members])
    chosen = []
    while count > 0:
        turn = min(count, len(labels))
        counts = class_counts(distribution, turn, available, generator=generator)
        chosen += [_some(m, int(c), generator) for m, c in zip(members, counts, strict=True)]
        count -= turn
    if not chosen:
        return torch.empty(0, dtype=torch.int64)
    return _shuffled(torch.cat(chosen), generator)


def deal(
    labels: Tensor, distributions: Tensor, count: int, *, generator: torch.Generator
) -> list[Tensor]:
    """Partition a pool among clients: no two of them share an example.

    Clients draw one after the other, ``count`` examples each; the last ones get what is left.

    Parameters
    ----------
    labels
        Shape (n,), integer labels of the pool.
    distributions
        Shape (clients, classes), one class distribution per client.
    count
        Number of examples per client, >= 1.
    generator
        Source of the draws.

    Returns
    -------
    list of Tensor
        One int64 tensor of shape (count,) per client: positions in the pool, in random order.

    Raises
    ------
    ValueError
        If the pool holds fewer than clients x count examples.
    """
    clients, classes = distributions.shape
    if count < 1 or clients * count > len(labels):
        raise ValueError(
            f"{clients} clients x {count} examples cannot be dealt from a pool of {len(labels)}; "
            f"give each client between 1 and {len(labels) // max(clients, 1)}"
        )
    # Each class is shuffled once; clients take its examples in this order.
    piles = [_some(m, len(m), generator) for m in _members(labels, classes)]
    dealt = torch.zeros(classes, dtype=torch.int64)
    sizes = torch.tensor([len(p) for p in piles])
    parts = []
    for distribution in distributions:
        counts = class_counts(distribution, count, sizes - dealt, generator=generator)
        ends = dealt + counts
        taken = [p[a:b] for p, a, b in zip(piles, dealt.tolist(), ends.tolist(), strict=True)]
        parts.append(_shuffled(torch.cat(taken), generator))
        dealt = ends
    return parts


def stratified_split(
    labels: Tensor, shares: Sequence[float], *, generator: torch.Generator
) -> list[Tensor]:
    """Split examples into disjoint pools that all have the same class distribution.

    Parameters
    ----------
    labels
        Shape (n,), integer labels.
    shares
        Relative sizes of the pools, each > 0. Every class follows them to within one example,
        and every pool has at least one example of every class that has enough for that.
    generator
        Source of the draws.

    Returns
    -------
    list of Tensor
        Sorted int64 positions, one tensor per share; together every position exactly once.

    Raises
    ------
    ValueError
        If a share is not above 0.
    """
    if not shares or min(shares) <= 0:
        raise ValueError(f"every share of a split must be above 0, got {tuple(shares)}")
    total = sum(shares)
    bounds = [sum(shares[:i]) / total for i in range(len(shares) + 1)]
    pools: list[list[Tensor]] = [[] for _ in shares]
    for members in _members(labels, int(labels.max()) + 1):
        mixed = _some(members, len(members), generator)
        cuts = [round(b * len(mixed)) for b in bounds]
        if len(mixed) >= len(pools):
            for i in range(1, len(pools)):
                cuts[i] = min(max(cuts[i], cuts[i - 1] + 1), len(mixed) - (len(pools) - i))
        for i, pool in enumerate(pools):
            pool.append(mixed[cuts[i] : cuts[i + 1]])
    return [torch.cat(pool).sort().values for pool in pools]


def label_entropy(labels: Tensor) -> float:
    """Return the entropy of integer labels, in nats: 0 for one class, log(classes) at most."""
    shares = torch.bincount(labels).to(torch.float64) / len(labels)
    return float(torch.special.entr(shares).sum())


def _members(labels: Tensor, classes: int) -> list[Tensor]:
    """Return the positions of each class."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())} but there are "
            f"{classes} classes, 0 to {classes - 1}"
        )
    return [(labels == c).nonzero().flatten() for c in range(classes)]


def _some(positions: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return ``count`` of the positions, without replacement, in random order."""
    return positions[torch.randperm(len(positions), generator=generator)[:count]]


def _shuffled(positions: Tensor, generator: torch.Generator) -> Tensor:
    return _some(positions, len(positions), generator)
