"""Registered clients cost nothing until they are asked, and a round holds few replies in memory."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedl2p.core.clientdata import ClientData
from fedl2p.data.pools.names import Chained, LazyNames, Numbered
from fedl2p.data.population import Population
from fedl2p.federation.clients import spool
from fedl2p.federation.clients.in_process import InProcessGrid
from fedl2p.federation.clients.node import Handler, kept
from fedl2p.federation.flower import records as wire
from fedl2p.federation.flower.client_directory import Nodes, in_process
from fedl2p.federation.personalizing import personalize_all
from fedl2p.federation.privacy.settings import Privacy
from fedl2p.federation.rounds import federate
from fedl2p.federation.sampling import draw_cohort
from fedl2p.federation.server.aggregation import Aggregator
from fedl2p.federation.settings import Rounds
from fedl2p.method import Client, State, Update
from support.federation_toys import Line, Toward, model, same

MANY = 1_000_000

BOUNDS = st.none() | st.integers(-12, 12)
SLICES = st.builds(slice, BOUNDS, BOUNDS, st.none() | st.sampled_from([-3, -2, -1, 1, 2, 3]))


@st.composite
def lazy_names(draw: st.DrawFn) -> LazyNames:
    names: LazyNames = Numbered(draw(st.sampled_from(["c", "", "9"])), draw(st.integers(0, 9)))
    if draw(st.booleans()):
        others = Numbered("other-", draw(st.integers(0, 4)))
        names = Chained(names, tuple(others) if draw(st.booleans()) else others)
    for cut in draw(st.lists(SLICES, max_size=2)):
        names = names[cut]
    return names


@settings(deadline=None)
@given(names=lazy_names(), cut=SLICES)
def test_lazy_names_are_those_of_a_tuple(names: LazyNames, cut: slice) -> None:
    held = tuple(names[i] for i in range(len(names)))
    assert tuple(names) == held
    assert tuple(reversed(names)) == held[::-1]
    assert tuple(names[cut]) == held[cut]
    assert len(names[cut]) == len(held[cut])
    assert names == held
    assert held == names
    assert hash(names) == hash(held)
    assert (names == (*held, "more")) is False
    for i, name in enumerate(held):
        assert name in names
        assert (names.index(name), names.count(name)) == (i, 1)
        assert names[i - len(held)] == held[i - len(held)]
    for name in ("", "c", "c00", "c01", "c-1", "c99", "c²", "c" + "1" * 5000, "other-x", None, 3):
        assert (name in names) == (name in held), name
    with pytest.raises(ValueError, match="'nobody' is none of these"):
        names.index("nobody")
    for place in (len(held), -len(held) - 1):
        with pytest.raises(IndexError, match="there is no name"):
            names[place]


def test_index_looks_between_bounds_as_a_tuple_does() -> None:
    names = Numbered("c", 10)
    for start, stop in ((0, None), (5, None), (-3, None), (0, 5), (6, 3), (0, -5), (5, 6)):
        bounds = (start,) if stop is None else (start, stop)
        try:
            wanted = tuple(names).index("c5", *bounds)
        except ValueError:
            with pytest.raises(ValueError):
                names.index("c5", start, stop)
        else:
            assert names.index("c5", start, stop) == wanted


def test_a_negative_number_of_names_is_refused() -> None:
    with pytest.raises(ValueError, match="count is -1"):
        Numbered("c", -1)


class Crowd(Line):
    """The line's clients without a list of them; says who was opened."""

    def __init__(self, seen: int, unseen: int = 0) -> None:
        names = Numbered("c", seen + unseen)
        self.seen, self.unseen = names[:seen], names[seen:]
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
    assert isinstance(crowd.names, LazyNames)
    assert len(crowd.names) == 2 * MANY
    assert crowd.names[-1] == f"c{2 * MANY - 1}"
    assert crowd.names.index(crowd.unseen[7]) == MANY + 7
    crowd.unseen = ("late",)
    assert crowd.names.index("late") == MANY
    assert Crowd(3).names == ("c0", "c1", "c2")
    crowd.seen, crowd.unseen = (), Numbered("u", 2)
    assert crowd.names == ("u0", "u1")


def go(method: Toward, population: Population, nodes: Nodes | None, **rounds: Any) -> Any:
    wanted = Rounds(**{"rounds": 3, **rounds})
    return federate(method, model(1), population, rounds=wanted, seed=0, stage="learn", nodes=nodes)


def timeless(records: Sequence[Any]) -> list[Any]:
    return [dataclasses.replace(record, seconds=0.0) for record in records]


def test_of_a_million_registered_clients_only_those_drawn_are_touched() -> None:
    crowd, method = Crowd(MANY, MANY), Toward(noise=0.5, use_kept=True)
    nodes = in_process(model(), crowd, {method.name: method})
    done = go(method, crowd, nodes, clients_per_round=20)
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
    assert nodes.kept(method.name).keys() == trained
    contexts = nodes.grid.contexts  # type: ignore[attr-defined]
    # Those that only judged the last state have kept nothing, and have no context any more.
    assert {crowd.names[node - 1] for node in contexts.made} == trained
    assert len(nodes._have) == len(drawn), "the model went to these"
    some = [crowd.seen[123_456], crowd.unseen[-1]]
    outcomes = personalize_all(method, model(1), done.state, crowd, seed=0, names=some, nodes=nodes)
    assert [(o.client, o.failure) for o in outcomes] == [(name, None) for name in some]
    with pytest.raises(ValueError, match=f"no node is client 'c{2 * MANY}' .* {2 * MANY} nodes"):
        personalize_all(
            method, model(1), done.state, crowd, seed=0, names=[f"c{2 * MANY}"], nodes=nodes
        )


def test_lazy_names_give_the_bits_of_a_tuple() -> None:
    method = Toward(noise=0.5, use_kept=True)
    lazy, held = Crowd(40, 5), Crowd(40, 5)
    held.seen, held.unseen = tuple(held.seen), tuple(held.unseen)
    ends = []
    for population in (lazy, held):
        nodes = in_process(model(), population, {method.name: method}, cohort=3)
        done = go(method, population, nodes, clients_per_round=7)
        outcomes = personalize_all(method, model(1), done.state, population, seed=0, nodes=nodes)
        ends.append((done, outcomes, nodes.kept(method.name)))
    (a, b), (c, d), (e, f) = zip(*ends, strict=True)
    assert same(a.state, b.state)
    assert timeless(a.records) == timeless(b.records)
    assert c == d
    assert list(e) == list(f)
    assert all(same(e[name], f[name]) for name in e)


class _Stop:
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
            nodes=in_process(model(), crowd, {method.name: method}),
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
    names = Numbered("c", MANY)
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
    names = names[:150_000]
    half = draw_cohort(names, size=70_000, seed=0, round=1)
    assert len(set(half)) == 70_000
    assert len(set(draw_cohort(names, size=149_999, seed=0, round=1))) == 149_999
    assert len(draw_cohort(names, size=0, seed=0, round=1)) == 150_000


def test_cohorts_of_many_clients_are_uniform() -> None:
    names = Numbered("c", 200_000)
    counts = torch.zeros(20)
    for round in range(100):
        for name in draw_cohort(names, size=200, seed=0, round=round):
            counts[int(name[1:]) // 10_000] += 1
    # 20,000 draws into 20 bins: chi-squared with 19 degrees of freedom, 43.8 at 0.001.
    chi = float((counts - 1000).square().sum() / 1000)
    assert chi < 43.8


def test_up_to_a_hundred_thousand_clients_the_draw_is_a_shuffle_as_ever() -> None:
    from fedl2p.seeds import generator

    names = Numbered("c", 100_000)
    order = torch.randperm(100_000, generator=generator(3, "cohort", 2))[:5]
    wanted = sorted(f"c{i}" for i in order.tolist())
    assert draw_cohort(names, size=5, seed=3, round=2) == wanted


SETTINGS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedadam": {"strategy": "fedadam"},
    "fedyogi": {"strategy": "fedyogi"},
    "weights": {"weight_limit": 2.0},
    "clipped": {"clip_norm": 0.5},
    "median": {"robust": "fedmedian"},
    "private": {"privacy": Privacy(mechanism="central", noise=0.1), "keep": "last"},
}


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_replies_that_wait_in_a_file_give_the_same_bits(
    name: str, live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    population, method = Line(seen=9), Toward(noise=0.5, use_kept=True, bad=("c3",), how="nan")
    ends = []
    for keep_bytes in (1 << 30, 700, 0):
        monkeypatch.setattr(spool, "KEEP_BYTES", keep_bytes)
        handler = Handler(
            build=model,
            population=population,
            methods={method.name: method},
            live=live,
            simulated=True,
        )
        nodes = Nodes(InProcessGrid(handler, cohort=2))
        ends.append(go(method, population, nodes, clients_per_round=7, **SETTINGS[name]))
    for end in ends[1:]:
        assert same(end.state, ends[0].state)
        assert timeless(end.records) == timeless(ends[0].records), "bytes included"


class Counting(Toward):
    """Remembers, weakly, the tensors that its clients sent."""

    def train(self, model: Any, state: State, clients: Sequence[Client]) -> list[Update]:
        updates = super().train(model, state, clients)
        for update in updates:
            # A tensor's memory outlives the tensor; an array's owner can be watched.
            owner = update.shared["point"].numpy().copy()
            update.shared["point"] = torch.from_numpy(owner)
            SENT.append(weakref.ref(owner))
        return updates


SENT: list[weakref.ref[Any]] = []


def test_when_the_mean_is_made_memory_holds_no_more_replies_than_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive = []
    combine = Aggregator.combine

    def counting(self: Aggregator, state: State, replies: Any) -> State | None:
        gc.collect()
        alive.append(sum(ref() is not None for ref in SENT))
        SENT.clear()
        return combine(self, state, replies)

    monkeypatch.setattr(Aggregator, "combine", counting)
    population, method = Line(seen=20), Counting()
    one = wire.count_bytes(
        wire.RecordDict({wire.ARRAYS: wire.to_record(method.start(model()), live=True)})
    )
    for keep, wanted in ((1 << 30, 20), (3 * one, 3), (0, 0)):
        monkeypatch.setattr(spool, "KEEP_BYTES", keep)
        nodes = in_process(model(), population, {method.name: method}, cohort=1)
        done = go(method, population, nodes, rounds=2)
        assert alive == [wanted, wanted]
        alive.clear()
        torch.testing.assert_close(done.state["point"], population.weighted_mean(population.seen))


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool, "KEEP_BYTES", 0)
    monkeypatch.setattr(spool.tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match=r"No space left on device\); set TMPDIR"):
        go(Toward(), Line(seen=2), None)


def test_what_is_kept_is_found_again_and_forgotten_at_a_new_start() -> None:
    population, method = Line(seen=3), Toward()
    nodes = in_process(model(), population, {method.name: method})
    go(method, population, nodes, clients_per_round=2, rounds=1)
    contexts = nodes.grid.contexts  # type: ignore[attr-defined]
    assert len(contexts.made) == 2
    nodes.grid.restore(method.name, {"c2": {"visits": torch.tensor(4)}, "gone": {}})  # type: ignore[attr-defined]
    assert list(nodes.kept(method.name)) == ["c2"]
    assert kept(contexts[3], method.name)["visits"] == 4
    assert len(contexts) == 3
    assert 4 not in contexts
    with pytest.raises(KeyError):
        contexts[4]
