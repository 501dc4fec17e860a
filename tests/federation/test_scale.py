"""Registered clients cost nothing until they are asked, and a round holds few replies in memory."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedl2p.core.clientdata import ClientData
from fedl2p.core.functional.precision import with_compute
from fedl2p.core.settings import Compute
from fedl2p.data.population import NumberedNames, Population
from fedl2p.federation.clients.in_process import InProcess, in_process
from fedl2p.federation.clients.node import ClientNode
from fedl2p.federation.listeners import Listener
from fedl2p.federation.messages import Clients, content_hash
from fedl2p.federation.personalizing import personalize_all
from fedl2p.federation.rounds import federate
from fedl2p.federation.sampling import draw_cohort
from fedl2p.federation.server.aggregation import WeightedMean
from fedl2p.federation.settings import Rounds
from fedl2p.method import Client, State, Update
from support.federation_toys import Line, Toward, model, same

MANY = 1_000_000

PREFIXES = st.sampled_from(["c", "", "9", "a.c"])
RANGES = st.builds(range, st.integers(0, 12), st.integers(0, 12), st.integers(1, 3))
BOUNDS = st.none() | st.integers(-12, 12)


@settings(deadline=None)
@given(
    prefix=PREFIXES, first=RANGES, second=st.none() | RANGES, cut=st.builds(slice, BOUNDS, BOUNDS)
)
def test_numbered_names_are_those_of_a_tuple(
    prefix: str, first: range, second: range | None, cut: slice
) -> None:
    names: Sequence[str] = NumberedNames(prefix, first)
    held = tuple(f"{prefix}{number}" for number in first)
    if second is not None:
        names += NumberedNames("other-", second)
        held += tuple(f"other-{number}" for number in second)
    assert isinstance(names, NumberedNames)
    assert tuple(names) == held
    assert len(names) == len(held)
    assert names[cut] == held[cut]
    for i, name in enumerate(held):
        assert names[i - len(held)] == name
    for name in ("", "c", "c00", "c01", "c-1", "c99", "c²", "c" + "1" * 5000, "other-x", "abc1", 3):
        assert (name in names) == (name in held), name
    for place in (len(held), -len(held) - 1):
        with pytest.raises(IndexError):
            names[place]


class Crowd(Line):
    """The line's clients without a list of them; says who was opened."""

    def __init__(self, seen: int, unseen: int = 0) -> None:
        self.seen = NumberedNames("c", range(seen))
        self.unseen = NumberedNames("c", range(seen, seen + unseen))
        self.broken = ()
        self.opened: set[str] = set()

    def open(self, name: str) -> ClientData:
        self.opened.add(name)
        data = super().open(f"c{int(name[1:]) % 50}")
        assert name in self.seen or name in self.unseen
        return data


def test_names_of_a_population_are_a_tuple_only_if_its_parts_are() -> None:
    assert isinstance(Line(seen=2, unseen=1).names, tuple)
    crowd = Crowd(MANY, MANY)
    names = crowd.names
    assert isinstance(names, NumberedNames)
    assert len(names) == 2 * MANY
    assert names[-1] == f"c{2 * MANY - 1}"
    assert names[MANY + 7] == crowd.unseen[7]
    assert tuple(Crowd(3).names) == ("c0", "c1", "c2")
    crowd.seen, crowd.unseen = NumberedNames("u", range(2)), ("late",)
    assert crowd.names == ("u0", "u1", "late")
    crowd.seen, crowd.unseen = (), crowd.seen
    assert crowd.names == ("u0", "u1")


def go(method: Toward, population: Population, clients: Clients | None, **rounds: Any) -> Any:
    settings = Rounds(**{"rounds": 3, **rounds})
    return federate(
        method, model(1), population, rounds=settings, seed=0, stage="learn", clients=clients
    )


def timeless(records: Sequence[Any]) -> list[Any]:
    return [dataclasses.replace(record, seconds=0.0) for record in records]


def test_of_a_million_registered_clients_only_those_drawn_are_touched() -> None:
    crowd, method = Crowd(MANY, MANY), Toward(noise=0.5, use_kept=True)
    clients = in_process(model(), crowd, {method.name: method})
    done = go(method, crowd, clients, clients_per_round=20)
    drawn: set[str] = set()
    for record in done.records:
        cohort = draw_cohort(crowd.seen, size=20, seed=0, round=record.round)
        assert (record.clients, record.failures) == (20, 0)
        drawn.update(cohort)
    assert crowd.opened == drawn
    trained = {
        name
        for round in (1, 2, 3)
        for name in draw_cohort(crowd.seen, size=20, seed=0, round=round)
    }
    assert clients.kept(method.name).keys() == trained
    key = content_hash(dict(model(1).state_dict()))
    assert clients.has_model(key) == sorted(drawn), "the model went to these"
    assert clients.has_model(clients.node.initial) is None, "all, without a list of them"
    some = [crowd.seen[123_456], crowd.unseen[-1]]
    outcomes = personalize_all(
        method, model(1), done.state, crowd, seed=0, names=some, clients=clients
    )
    assert [(o.client, o.failure) for o in outcomes] == [(name, None) for name in some]
    with pytest.raises(ValueError, match=f"no client 'c{2 * MANY}' .* {2 * MANY} clients"):
        personalize_all(
            method, model(1), done.state, crowd, seed=0, names=[f"c{2 * MANY}"], clients=clients
        )


def test_lazy_names_give_the_bits_of_a_tuple() -> None:
    method = Toward(noise=0.5, use_kept=True)
    lazy, held = Crowd(40, 5), Crowd(40, 5)
    held.seen, held.unseen = tuple(held.seen), tuple(held.unseen)
    ends = []
    for population in (lazy, held):
        clients = in_process(model(), population, {method.name: method})
        done = go(method, population, clients, clients_per_round=7)
        outcomes = personalize_all(
            method, model(1), done.state, population, seed=0, clients=clients
        )
        ends.append((done, outcomes, clients.kept(method.name)))
    (a, b), (c, d), (e, f) = zip(*ends, strict=True)
    assert same(a.state, b.state)
    assert timeless(a.records) == timeless(b.records)
    assert c == d
    assert list(e) == list(f)
    assert all(same(e[name], f[name]) for name in e)


class _Stop(Listener):
    """Ends the process, as it were, after round 2."""

    def on_start(self, stage: str, rounds: int, done: Any) -> None: ...

    def on_round(self, record: Any) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    def on_end(self, stage: str) -> None: ...


def test_a_checkpoint_of_lazy_names_can_be_resumed(tmp_path: Path) -> None:
    method = Toward(noise=0.5, use_kept=True)

    def run(folder: str, *listeners: _Stop) -> Any:
        crowd = Crowd(30)
        return federate(
            *(method, model(1), crowd),
            rounds=Rounds(rounds=4, clients_per_round=5, keep="last"),
            seed=0,
            stage="learn",
            clients=in_process(model(), crowd, {method.name: method}),
            checkpoint=tmp_path / folder,
            resume=True,
            listeners=listeners,
        )

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", _Stop())
    resumed = run("parts")
    assert same(whole.state, resumed.state)
    assert timeless(whole.records) == timeless(resumed.records), "bytes of the model included"


def test_two_clients_of_one_name_are_refused() -> None:
    population = Line(seen=3)
    population.seen = ("c0", "c1", "c1")
    with pytest.raises(ValueError, match="two clients are called 'c1'"):
        in_process(model(), population, {})


def test_cohorts_of_many_clients_are_distinct_and_sorted_and_depend_on_seed_and_round() -> None:
    names = NumberedNames("c", range(MANY))
    held = tuple(names)
    draws = {
        (seed, round): draw_cohort(names, size=100, seed=seed, round=round)
        for seed in range(2)
        for round in range(1, 4)
    }
    for (seed, round), cohort in draws.items():
        assert len(set(cohort)) == 100
        assert cohort == sorted(cohort)
        assert cohort == draw_cohort(held, size=100, seed=seed, round=round)
    assert len({tuple(cohort) for cohort in draws.values()}) == 6
    names = NumberedNames("c", range(150_000))
    half = draw_cohort(names, size=70_000, seed=0, round=1)
    assert len(set(half)) == 70_000
    assert len(set(draw_cohort(names, size=149_999, seed=0, round=1))) == 149_999
    assert len(draw_cohort(names, size=0, seed=0, round=1)) == 150_000


def test_cohorts_of_many_clients_are_uniform() -> None:
    names = NumberedNames("c", range(200_000))
    counts = torch.zeros(20)
    for round in range(100):
        for name in draw_cohort(names, size=200, seed=0, round=round):
            counts[int(name[1:]) // 10_000] += 1
    # 20,000 draws into 20 bins: chi-squared with 19 degrees of freedom, 43.8 at 0.001.
    chi = float((counts - 1000).square().sum() / 1000)
    assert chi < 43.8


def test_up_to_a_hundred_thousand_clients_the_draw_is_a_shuffle_as_ever() -> None:
    from fedl2p.seeds import generator

    names = NumberedNames("c", range(100_000))
    order = torch.randperm(100_000, generator=generator(3, "cohort", 2))[:5]
    wanted = sorted(f"c{i}" for i in order.tolist())
    assert draw_cohort(names, size=5, seed=3, round=2) == wanted


class Counting(Toward):
    """Remembers, weakly, the tensors that its clients sent."""

    def train(self, model: Any, state: State, clients: Sequence[Client]) -> list[Update]:
        CALLS.append(len(clients))
        updates = super().train(model, state, clients)
        for update in updates:
            # A tensor's memory outlives the tensor; an array's owner can be watched.
            owner = update.shared["point"].numpy().copy()
            update.shared["point"] = torch.from_numpy(owner)
            SENT.append(weakref.ref(owner))
        return updates


SENT: list[weakref.ref[Any]] = []
CALLS: list[int] = []


def test_memory_holds_the_updates_of_one_call_however_many_clients_are_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive = []
    add = WeightedMean.add

    def counting(self: WeightedMean, update: Update) -> None:
        alive.append(sum(ref() is not None for ref in SENT))
        add(self, update)

    monkeypatch.setattr(WeightedMean, "add", counting)
    population, method = Line(seen=20), Counting()
    for keep_bytes, calls in ((1 << 20, [20]), (0, [4] * 5)):
        SENT.clear()
        CALLS.clear()
        alive.clear()
        node = ClientNode(
            build=lambda: with_compute(model(), Compute(stack_size=4)),
            population=population,
            methods={method.name: method},
            keep_bytes=keep_bytes,
        )
        done = go(method, population, InProcess(node), rounds=1, keep="last")
        assert CALLS[: len(calls)] == calls, "whole stacks"
        assert max(alive) <= calls[0] + 1
        torch.testing.assert_close(done.state["point"], population.weighted_mean(population.seen))


def test_what_is_kept_is_forgotten_at_a_new_start() -> None:
    population, method = Line(seen=3), Toward()
    clients = in_process(model(), population, {method.name: method})
    go(method, population, clients, clients_per_round=2, rounds=1)
    assert len(clients.kept(method.name)) == 2
    clients.restore(method.name, {"c2": {"visits": torch.tensor(4)}, "c1": {}})
    assert list(clients.kept(method.name)) == ["c2"]
    assert clients.kept(method.name)["c2"]["visits"] == 4
