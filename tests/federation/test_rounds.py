"""The rounds: closed-form averages, seeded draws, the best round, early stopping, failures."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import pytest
import torch

from fedl2p.core.functional.precision import with_compute
from fedl2p.core.settings import Compute
from fedl2p.federation.clients.in_process import InProcess, in_process
from fedl2p.federation.clients.node import ClientNode
from fedl2p.federation.flower.encoded import Encoded
from fedl2p.federation.messages import Clients, FederationError
from fedl2p.federation.personalizing import personalize_all
from fedl2p.federation.round_records import Federated
from fedl2p.federation.rounds import federate
from fedl2p.federation.sampling import draw_cohort
from fedl2p.federation.settings import Rounds
from fedl2p.method import Method
from fedl2p.seeds import derive_seed
from support.federation_toys import Line, Toward, model, same


def run(
    method: Method | None = None,
    population: Line | None = None,
    *,
    seed: int = 0,
    stack_size: int = 10,
    encoded: bool = False,
    **rounds: Any,
) -> Federated:
    method, population = method or Toward(), population or Line()
    node = ClientNode(
        build=lambda: with_compute(model(), Compute(stack_size=stack_size)),
        population=population,
        methods={method.name: method},
    )
    clients: Clients = Encoded(InProcess(node)) if encoded else InProcess(node)
    return federate(
        method,
        model(),
        population,
        rounds=Rounds(**{"rounds": 1, **rounds}),
        seed=seed,
        stage="learn",
        clients=clients,
    )


def plain(done: Federated) -> list[dict[str, Any]]:
    return [{**dataclasses.asdict(r), "seconds": 0} for r in done.records]


def test_one_round_of_fedavg_is_the_weighted_mean() -> None:
    population = Line(seen=4)
    done = run(population=population, keep="last")
    torch.testing.assert_close(done.state["point"], population.weighted_mean(population.seen))
    assert done.state["count"] == 2
    assert done.state["count"].dtype == torch.int64
    assert done.state["scale"].shape == ()
    assert done.state["half"].dtype == torch.bfloat16
    assert done.state["half"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("encoded", [False, True])
def test_clients_may_weigh_the_same_whatever_they_hold(encoded: bool) -> None:
    population = Line(seen=4)
    sizes = {population.open(name).train.num for name in population.seen}
    assert len(sizes) > 1
    done = run(population=population, keep="last", weighting="clients", encoded=encoded)
    points = torch.stack([population.open(name).train.x.mean(0) for name in population.seen])
    torch.testing.assert_close(done.state["point"], points.mean(0))
    away = points.square().sum(1)  # of the state received, the origin
    assert done.records[0].loss == pytest.approx(float(away.mean()))
    weighted = run(population=population, keep="last")
    assert not torch.allclose(weighted.state["point"], points.mean(0))
    assert weighted.records[0].loss != pytest.approx(float(away.mean()))


def test_a_record_judges_the_state_received_and_a_last_pass_judges_the_last_state() -> None:
    population = Line(seen=3)
    done = run(population=population, rounds=2)
    mean = population.weighted_mean(population.seen)

    def loss(point: torch.Tensor) -> float:
        weights = [1.0, 2.0, 3.0]
        losses = [float((population.point(n) - point).square().sum()) for n in population.seen]
        return sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)

    assert [r.round for r in done.records] == [1, 2, 3]
    assert [r.loss for r in done.records] == pytest.approx(
        [loss(torch.zeros(2)), loss(mean), loss(mean)]
    )
    assert done.best_round == 1  # the first of two equal ones
    assert done.records[2].bytes_up < done.records[1].bytes_up
    assert [r.clients for r in done.records] == [3, 3, 3]


@pytest.mark.parametrize("stack_size", [1, 3])
@pytest.mark.parametrize("encoded", [True, False])
def test_calls_and_encoding_change_no_bit(stack_size: int, encoded: bool) -> None:
    method = Toward(noise=0.3, rate=0.5, use_kept=True)
    settings: dict[str, Any] = {"rounds": 3, "clients_per_round": 4, "strategy": "fedadam"}
    one = run(method, Line(7), **settings)
    other = run(method, Line(7), stack_size=stack_size, encoded=encoded, **settings)
    assert same(one.state, other.state)
    assert plain(one) == plain(other)


def test_seeds_matter_and_repeat() -> None:
    method = Toward(noise=0.3)
    settings: dict[str, Any] = {"rounds": 2, "clients_per_round": 3}
    assert same(run(method, **settings).state, run(method, **settings).state)
    assert not same(run(method, **settings).state, run(method, seed=1, **settings).state)


def test_the_draw_depends_on_seed_and_round_only() -> None:
    asked: dict[str, list[tuple[int, str]]] = {}

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Noting(Toward):
        def train(self, model: Any, state: Any, clients: Any) -> Any:
            asked.setdefault(self.name, []).extend((c.round, c.name) for c in clients)
            return super().train(model, state, clients)

    population = Line(seen=9)
    for name, strategy in (("a", "fedavg"), ("b", "fedadam")):
        federate(
            Noting(name=name),
            model(),
            population,
            rounds=Rounds(rounds=3, clients_per_round=4, strategy=strategy),  # type: ignore[arg-type]
            seed=5,
            stage=name,
        )
    assert asked["a"] == asked["b"]
    rounds = [[n for r, n in asked["a"] if r == number] for number in (1, 2, 3)]
    assert rounds == [draw_cohort(population.seen, size=4, seed=5, round=r) for r in (1, 2, 3)]
    assert all(len(set(names)) == 4 for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    draws = {tuple(draw_cohort(population.seen, size=4, seed=s, round=1)) for s in range(20)}
    assert len(draws) > 5


def test_clients_get_the_seed_of_their_stage_round_and_name() -> None:
    seeds: dict[tuple[int, str], int] = {}

    class Noting(Toward):
        def train(self, model: Any, state: Any, clients: Any) -> Any:
            seeds.update({(c.round, c.name): c.seed for c in clients})
            return super().train(model, state, clients)

    run(Noting(), rounds=2)
    assert seeds[2, "c3"] == derive_seed(0, "learn", 2, "c3")
    assert len(set(seeds.values())) == 10


def test_only_seen_clients_train() -> None:
    population = Line(seen=2, unseen=3)
    done = run(population=population, keep="last")
    torch.testing.assert_close(done.state["point"], population.weighted_mean(["c0", "c1"]))


def test_the_best_round_is_kept_and_patience_stops() -> None:
    # A step of 3 overshoots and diverges: the start is the best state there will be.
    settings: dict[str, Any] = {"rounds": 20, "patience": 2}
    done = run(Toward(rate=3.0), **settings)
    assert done.stopped_early
    assert done.best_round == 0
    assert same(done.state, Toward().start(model()))
    # The first is the lowest, two are not lower.
    assert len(done.records) == 3
    losses = [r.loss for r in done.records]
    assert losses == sorted(losses)
    last = run(Toward(rate=3.0), keep="last", **settings)
    assert last.best_round == 2
    assert not same(last.state, done.state)
    endless = run(Toward(rate=3.0), rounds=4)
    assert not endless.stopped_early
    assert len(endless.records) == 5
    better = run(Toward(rate=0.5), rounds=4, patience=2)
    assert (better.best_round, better.stopped_early) == (4, False)


def test_the_average_of_the_states_is_kept_and_judged() -> None:
    # From 0, a step of 1/2 toward the weighted mean m makes the states m (1 - 2^-r).
    population = Line(seen=4)
    settings: dict[str, Any] = {"population": population, "keep": "average"}
    mean = population.weighted_mean(population.seen)
    short = run(Toward(rate=0.5), rounds=3, average_decay=0.9, **settings)
    torch.testing.assert_close(short.state["point"], mean * (1 / 2 + 3 / 4 + 7 / 8) / 3)
    # With decay 1/2 the plain mean of the first two, then halves: ((1/2 + 3/4) / 2 + 7/8) / 2.
    halved = run(Toward(rate=0.5), rounds=3, average_decay=0.5, **settings)
    torch.testing.assert_close(halved.state["point"], mean * (5 / 8 + 7 / 8) / 2)
    assert halved.state["count"].dtype == torch.int64
    assert halved.state["half"].dtype == torch.bfloat16
    judged = run(Toward(rate=0.5), rounds=3, keep="last", population=population)
    assert plain(short)[:3] == plain(judged)[:3]
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    points = torch.stack([population.point(name) for name in population.seen])
    losses = (points - short.state["point"]).square().sum(1)
    assert short.records[-1].loss == pytest.approx(float((weights * losses).sum() / 10))


def test_no_rounds_send_no_message() -> None:
    done = run(rounds=0)
    assert done.records == ()
    assert same(done.state, Toward().start(model()))


def test_a_method_without_travelling_state_is_not_trained_twice() -> None:
    calls = []

    class Alone(Toward):
        def start(self, model: Any, **_: Any) -> Any:
            return {}

        def train(self, model: Any, state: Any, clients: Any) -> Any:
            calls.append(len(clients))
            updates = super().train(model, Toward().start(model), clients)
            return [dataclasses.replace(u, shared={}) for u in updates]

        def validate(self, model: Any, state: Any, clients: Any) -> Any:
            raise AssertionError("nothing to judge")

    done = run(Alone())
    assert calls == [5]
    assert done.state == {}
    assert len(done.records) == 1


REASONS = {
    "raise": "ArithmeticError: it exploded",
    "failure": "the inner loop diverged",
    "nan": "tensor 'point' holds NaN or infinity",
    "infinity": "tensor 'scale' holds NaN or infinity",
    "missing": "tensor 'count' is missing",
    "extra": "tensor 'more' was not asked for",
    "shape": r"tensor 'point' has shape \(1,\), wanted \(2,\)",
    "dtype": "tensor 'point' is torch.float32, wanted torch.float64",
    "weight": "its weight is 0.0",
    "negative": "its weight is -3.0",
    "loss": "its loss is nan",
}


@pytest.mark.parametrize("how", REASONS)
@pytest.mark.parametrize("stack_size", [10, 1])
def test_a_bad_client_is_named_counted_and_never_averaged(
    how: str, stack_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    population = Line(seen=4)
    with caplog.at_level(logging.WARNING, logger="fedl2p"):
        done = run(Toward(bad=("c2",), how=how), population, stack_size=stack_size, keep="last")
    good = population.weighted_mean(["c0", "c1", "c3"])
    torch.testing.assert_close(done.state["point"], good)
    assert done.records[0].failures == 1
    said = [r.getMessage() for r in caplog.records if "round 1:" in r.getMessage()]
    assert len(said) == 1
    with pytest.raises(AssertionError, match=f"learn, round 1: client c2 failed: {REASONS[how]}"):
        raise AssertionError(said[0])
    assert "\n" not in said[0]


def test_what_a_failed_client_kept_stays_as_it_was() -> None:
    population, method = Line(seen=2), Toward(bad=("c1",), how="nan")
    clients = in_process(model(), population, {method.name: method})
    federate(
        method,
        model(),
        population,
        rounds=Rounds(rounds=3),
        seed=0,
        stage="learn",
        clients=clients,
    )
    assert {k: v["visits"].item() for k, v in clients.kept(method.name).items()} == {"c0": 3}


def test_a_client_whose_data_cannot_be_opened_is_a_failure_of_its_own() -> None:
    population = Line(seen=3, broken=("c1",))
    done = run(population=population, keep="last")
    assert done.records[0].failures == 1
    whole = Line(seen=3)
    torch.testing.assert_close(done.state["point"], whole.weighted_mean(["c0", "c2"]))


def test_a_round_without_enough_good_replies_keeps_the_state(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bad = Toward(bad=("c0", "c1", "c2"), how="nan")
    with (
        caplog.at_level(logging.WARNING, logger="fedl2p"),
        pytest.raises(FederationError, match=r"learn: no round brought a new state.*'c0'"),
    ):
        run(bad, Line(4), rounds=2, min_clients=2, keep="last")
    assert "round 2: 1 good answers are too few, the state stays as it was" in caplog.text
    nobody = Toward(bad=("c0", "c1"), how="raise")
    with pytest.raises(FederationError, match=r"no round brought a new state.*it exploded"):
        run(nobody, Line(2), rounds=2)


def test_rounds_that_lead_nowhere_end_with_an_error() -> None:
    class BadDay(Toward):
        def train(self, model: Any, state: Any, clients: Any) -> Any:
            raise OSError("a bad day")

    with pytest.raises(FederationError, match=r"learn: 3 rounds in a row .* the last one round 3"):
        run(BadDay(), Line(2), rounds=9)


def test_only_bad_rounds_in_a_row_end_a_run() -> None:
    class EveryOther(Toward):
        def train(self, model: Any, state: Any, clients: Any) -> Any:
            if clients[0].round % 2:
                raise OSError("a bad day")
            return super().train(model, state, clients)

    done = run(EveryOther(), Line(2), rounds=6, give_up=2)
    assert [r.failures for r in done.records] == [2, 0, 2, 0, 2, 0, 0]


def test_a_seed_reaches_the_start() -> None:
    given: list[int] = []

    class Noting(Toward):
        def start(self, model: Any, *, seed: int = 0) -> Any:
            given.append(seed)
            return super().start(model)

    federate(
        Noting(),
        model(),
        Line(),
        rounds=Rounds(rounds=0),
        seed=4,
        stage="learn",
    )
    assert given == [derive_seed(4, "start", "toward")]


def test_a_population_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="clients_per_round is 6, but there are only 5"):
        run(clients_per_round=6)
    with pytest.raises(ValueError, match="no seen client"):
        run(population=Line(seen=0, unseen=2))


def test_a_method_that_answers_for_others_fails_by_name(caplog: pytest.LogCaptureFixture) -> None:
    class Backwards(Toward):
        def train(self, model: Any, state: Any, clients: Any) -> Any:
            return super().train(model, state, clients)[:1]

    with caplog.at_level(logging.WARNING, logger="fedl2p"):
        done = run(Backwards(), Line(3))
    # One at a time the first answer is the right one.
    assert done.records[0].failures == 0


def test_the_callers_model_is_left_alone() -> None:
    mine = model()
    before = {k: v.clone() for k, v in mine.state_dict().items()}
    federate(Toward(), mine, Line(), rounds=Rounds(rounds=1), seed=0, stage="learn")
    assert same(before, dict(mine.state_dict()))


def test_personalize_reaches_unseen_clients_and_reads_what_clients_keep() -> None:
    population, method = Line(seen=3, unseen=2), Toward(bad=("c4",))
    clients = in_process(model(), population, {method.name: method})
    done = federate(
        method, model(), population, rounds=Rounds(rounds=2), seed=0, stage="learn", clients=clients
    )
    outcomes = personalize_all(method, model(), done.state, population, seed=0, clients=clients)
    assert [o.client for o in outcomes] == list(population.names)
    assert [o.num_train for o in outcomes] == [1, 2, 3, 4, 5]  # of a failed client too
    assert [o.num_test for o in outcomes] == [2, 2, 2, 0, 0]  # the toy tells its visits here
    assert outcomes[0].loss == float(done.state["point"][0])
    assert isinstance(outcomes[0].num_test, int)
    assert outcomes[4].failure == "no luck"
    assert math.isnan(outcomes[4].accuracy)
    some = personalize_all(
        method, model(), done.state, population, seed=0, clients=clients, names=["c3", "c0"]
    )
    assert [o.client for o in some] == ["c3", "c0"]
    with pytest.raises(ValueError, match="there is no client 'c9'"):
        personalize_all(
            method, model(), done.state, population, seed=0, clients=clients, names=["c9"]
        )
