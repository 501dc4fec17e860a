"""What the rounds cost: epsilon at a delta, by Google's Renyi accountant (dp-accounting).

Mironov, "Renyi Differential Privacy", CSF 2017, arXiv 1702.07476; with sampling: Mironov, Talwar,
Zhang, 2019, arXiv 1908.10530.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from fedl2p.federation.privacy.settings import Privacy
from fedl2p.runs.privacy_spent import MethodSpent, PrivacySpent, StageSpent


@dataclass(frozen=True, kw_only=True)
class Releases:
    """Some noised results of the same kind.

    Parameters
    ----------
    noise
        Noise multiplier.
    cohort, population
        Clients expected in a round, each drawn independently, of so many.
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


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of rounds that is over.

    Parameters
    ----------
    name
        As in its records.
    privacy
        Its settings.
    cohort, population
        Clients expected in a round, of so many.
    count
        Noised results: rounds, or under local privacy the updates of the client asked most.
    travels
        Whether any tensor came back from clients.
    """

    name: str
    privacy: Privacy
    cohort: int
    population: int
    count: int
    travels: bool

    @property
    def releases(self) -> Releases:
        """What the stage has released."""
        return Releases(
            noise=self.privacy.noise,
            cohort=self.cohort,
            population=self.population,
            count=self.count,
            sampled=self.privacy.central,
        )


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
    if len({(release.population, release.sampled) for release in releases}) > 1:
        raise ValueError("releases of different populations or kinds have no common epsilon")
    check_installed()
    from dp_accounting import dp_event, privacy_accountant, rdp

    relation = privacy_accountant.NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = rdp.RdpAccountant(neighboring_relation=relation)
    with _quiet():
        for release in releases:
            event = dp_event.GaussianDpEvent(release.noise)
            if release.sampled:
                share = release.cohort / release.population
                event = dp_event.PoissonSampledDpEvent(share, event)
            accountant.compose(event, release.count)
        return float(accountant.get_epsilon(delta))


def most_asked(cohorts: Sequence[Sequence[str]]) -> int:
    """Return how often the client that was asked most was asked."""
    return max(Counter(name for cohort in cohorts for name in cohort).values(), default=0)


def spent(
    methods: Sequence[tuple[str, Sequence[Stage]]], *, given: bool, simulated: bool
) -> PrivacySpent:
    """Return what every stage and every method has spent; nothing if no stage had privacy.

    Parameters
    ----------
    methods
        Per method, all stages that what it ends with comes from.
    given
        Whether the global model was given: what it has spent is then not known.
    simulated
        Whether all clients were on this machine.
    """
    travelled = (stage for _, stages in methods for stage in stages if stage.travels)
    private = [stage for stage in dict.fromkeys(travelled) if stage.privacy.on]
    if not private:
        return PrivacySpent()
    delta = max(stage.privacy.delta for stage in private)
    return PrivacySpent(
        tuple(_of_stage(stage, simulated) for stage in private),
        tuple(_of_method(name, own, given=given, delta=delta) for name, own in methods),
    )


def _of_stage(stage: Stage, simulated: bool) -> StageSpent:
    privacy = stage.privacy
    return StageSpent(
        stage=stage.name,
        mechanism=privacy.mechanism,
        randomness="seed" if privacy.seeded(simulated=simulated) else "system",
        noise=privacy.noise,
        clip=privacy.clip,
        cohort=stage.cohort,
        population=stage.population,
        releases=stage.count,
        epsilon=epsilon([stage.releases], delta=privacy.delta),
        delta=privacy.delta,
    )


def _of_method(name: str, stages: Sequence[Stage], *, given: bool, delta: float) -> MethodSpent:
    own = [stage for stage in stages if stage.travels]
    why = [f"{stage.name} has no privacy" for stage in own if not stage.privacy.on]
    if len({stage.privacy.central for stage in own if stage.privacy.on}) > 1:
        why.append("central and local privacy have no common epsilon")
    total = math.inf if why else epsilon([stage.releases for stage in own], delta=delta)
    notes = ["the given model is not counted"] if given and not why else []
    return MethodSpent(method=name, epsilon=total, delta=delta, open=(*why, *notes))


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
