"""What differential privacy the stages of a study give, one by one and together per method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedl2p.federation.privacy import accounting
from fedl2p.federation.round_records import RoundRecord
from fedl2p.federation.rounds import draw_cohort
from fedl2p.federation.settings import Rounds
from fedl2p.runs.privacy_spent import MethodSpent, PrivacySpent, StageSpent


@dataclass(frozen=True)
class Stage:
    """One stage of rounds that is over.

    Parameters
    ----------
    name
        As in its records.
    rounds
        Its settings.
    done
        Rounds of training that it has done.
    travels
        Whether any tensor came back from clients.
    """

    name: str
    rounds: Rounds
    done: int
    travels: bool

    @classmethod
    def of(
        cls, name: str, rounds: Rounds, records: Sequence[RoundRecord], *, travels: bool
    ) -> Stage:
        """Count the rounds of training; a last one more only judges."""
        done = sum(r.stage == name and r.round <= rounds.rounds for r in records)
        return cls(name, rounds, done, travels)


def spent(
    methods: Sequence[tuple[str, Sequence[Stage]]],
    *,
    given: bool,
    names: Sequence[str],
    seed: int,
    simulated: bool,
) -> PrivacySpent:
    """Return what every stage and every method has spent; nothing if no stage had privacy.

    Parameters
    ----------
    methods
        Per method, all stages that what it ends with comes from.
    given
        Whether the global model was given: what it has spent is then not known.
    names
        The seen clients.
    seed
        The study's.
    simulated
        Whether all clients were in one process.
    """
    stages = list(dict.fromkeys(stage for _, own in methods for stage in own if stage.travels))
    if not any(stage.rounds.privacy.on for stage in stages):
        return PrivacySpent()
    releases = {s: _releases(s, names, seed) for s in stages if s.rounds.privacy.on}
    lines = [_line(stage, release, simulated) for stage, release in releases.items()]
    delta = max(stage.rounds.privacy.delta for stage in releases)
    totals = [_total(name, own, releases, given=given, delta=delta) for name, own in methods]
    return PrivacySpent(tuple(lines), tuple(totals))


def _releases(stage: Stage, names: Sequence[str], seed: int) -> accounting.Releases:
    privacy, population = stage.rounds.privacy, len(names)
    count = stage.done
    if not privacy.central:
        size = stage.rounds.clients_per_round
        count = accounting.most_asked(
            [draw_cohort(names, size=size, seed=seed, round=r + 1) for r in range(stage.done)]
        )
    return accounting.Releases(
        noise=privacy.noise,
        cohort=stage.rounds.cohort(population),
        population=population,
        count=count,
        sampled=privacy.central,
    )


def _line(stage: Stage, releases: accounting.Releases, simulated: bool) -> StageSpent:
    privacy = stage.rounds.privacy
    return StageSpent(
        stage=stage.name,
        mechanism=privacy.mechanism,
        randomness="seed" if privacy.seeded(simulated=simulated) else "system",
        noise=privacy.noise,
        clip=privacy.clip,
        cohort=releases.cohort,
        population=releases.population,
        releases=releases.count,
        epsilon=accounting.epsilon([releases], delta=privacy.delta),
        delta=privacy.delta,
    )


def _total(
    name: str,
    stages: Sequence[Stage],
    releases: dict[Stage, accounting.Releases],
    *,
    given: bool,
    delta: float,
) -> MethodSpent:
    own = [stage for stage in stages if stage.travels]
    why = [f"{stage.name} has no privacy" for stage in own if not stage.rounds.privacy.on]
    kinds = {stage.rounds.privacy.central for stage in own if stage.rounds.privacy.on}
    if len(kinds) > 1:
        why.append("central and local privacy have no common epsilon")
    epsilon = math.inf if why else accounting.epsilon([releases[s] for s in own], delta=delta)
    notes = ["the given model is not counted"] if given and not why else []
    return MethodSpent(method=name, epsilon=epsilon, delta=delta, open=(*why, *notes))
