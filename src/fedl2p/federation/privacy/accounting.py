"""What the rounds cost: epsilon at a delta, by Flower's Renyi accountant (Google's dp-accounting).

Mironov, "Renyi Differential Privacy", CSF 2017, arXiv 1702.07476; with sampling: Mironov, Talwar,
Zhang, 2019, arXiv 1908.10530.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from flwr.serverapp import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyAccountant,
    PrivacyConfig,
    SamplingMethod,
)


@dataclass(frozen=True, kw_only=True)
class Releases:
    """Some noised results of the same kind.

    Parameters
    ----------
    noise
        Noise multiplier.
    cohort, population
        Clients expected in a round, drawn each for itself, of so many.
    count
        How many results.
    sampled
        Whether who took part stays secret, so that sampling protects: under central privacy it
        does; under local privacy the server knows whose update it reads.
    """

    noise: float
    cohort: int
    population: int
    count: int
    sampled: bool = True


def check_installed() -> None:
    """Refuse to promise a privacy that nobody could then compute.

    Raises
    ------
    ValueError
        If dp-accounting is not installed.
    """
    try:
        import dp_accounting.rdp  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"privacy needs {error.name}, which is not installed; run pip install 'fedl2p[privacy]'"
        ) from None


def epsilon(releases: Sequence[Releases], *, delta: float) -> float:
    """Return the epsilon of all releases together.

    Parameters
    ----------
    releases
        All on the same population, all sampled or none; they may differ in everything else.
    delta
        In (0, 1).

    Returns
    -------
    float
        0 for nothing released; infinity where the accountant finds no finite bound.

    Raises
    ------
    ValueError
        If they differ in population or ``sampled``, or dp-accounting is not installed.
    """
    releases = [release for release in releases if release.count]
    if not releases:
        return 0.0
    kinds = {(release.population, release.sampled) for release in releases}
    if len(kinds) > 1:
        raise ValueError("releases of different populations or kinds have no common epsilon")
    population, sampled = kinds.pop()
    accountant = _accountant(population, delta, sampled=sampled)
    with _quiet():
        for release in releases:
            event = GaussianPrivacyEvent(
                noise_multiplier=release.noise,
                sample_size=release.cohort,
                population_size=population,
            )
            accountant.compose(event, release.count)
        return accountant.get_epsilon(delta)


def most_asked(cohorts: Sequence[Sequence[str]]) -> int:
    """Return how often the client that was asked most was asked."""
    return max(Counter(name for cohort in cohorts for name in cohort).values(), default=0)


def _accountant(population: int, delta: float, *, sampled: bool) -> PrivacyAccountant:
    check_installed()
    from flwr.serverapp import RdpAccountant

    config = PrivacyConfig(
        target_delta=delta,
        population_size=population,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        sampling_method=SamplingMethod.POISSON if sampled else SamplingMethod.NO_AMPLIFICATION,
    )
    return RdpAccountant(config)


@contextmanager
def _quiet() -> Iterator[None]:
    # For every order that it leaves out, which makes epsilon larger at most, it writes a warning.
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
