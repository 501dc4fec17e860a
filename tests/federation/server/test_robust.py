"""Robust rules and norm clipping: what they bear, what they need, and what they refuse."""

from __future__ import annotations

import functools
import sys
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from fedl2p.federation.messages import Answer, FederationError, FrozenModel, Question
from fedl2p.federation.round_records import RoundRecord
from fedl2p.federation.rounds import federate
from fedl2p.federation.server.tally import Tally
from fedl2p.federation.settings import Robust, Rounds
from fedl2p.federation.updates import clip, difference, norm
from fedl2p.method import State, Update
from support.combining import combine as combined
from support.federation_toys import Line, Toward, model, same

STATE = {
    "w": torch.tensor([1.0, -2.0, 0.5]),
    "scalar": torch.tensor(0.25),
    "batches": torch.tensor(10),
    "brain": torch.tensor([1.0], dtype=torch.bfloat16),
}
RULES = [rule for rule in get_args(Robust) if rule != "none"]


def reply(client: str, shift: float, weight: float = 1.0, **more: Tensor) -> Update:
    shared = {k: v + int(shift) if k == "batches" else v + shift for k, v in STATE.items()}
    return Update(client, {**shared, **more}, weight=weight)


def combine(replies: list[Update], state: State = STATE, **settings: object) -> State:
    made = combined(state, replies, Rounds(**settings))  # type: ignore[arg-type]
    assert made is not None
    return made


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("outlier", [1e6, -1e6, 1e17])
def test_every_rule_bears_one_hostile_answer(rule: str, outlier: float) -> None:
    honest = [reply(f"c{i}", 0.1 * i) for i in range(6)]
    hostile = reply("x", 0.0, 900.0, w=torch.full((3,), outlier))
    state = combine([*honest, hostile], robust=rule)
    assert ((state["w"] - STATE["w"]).abs() < 1).all()
    assert {k: (v.dtype, v.shape) for k, v in state.items()} == {
        k: (v.dtype, v.shape) for k, v in STATE.items()
    }
    poisoned = combine([*honest, hostile])
    assert (poisoned["w"].abs() > 1e4).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_no_rule_looks_at_weights_or_at_the_order(rule: str, strategy: str) -> None:
    g = torch.Generator().manual_seed(1)
    shared = [torch.randn(3, generator=g) for _ in range(9)]
    light = [reply(f"c{i}", 0.0, 1.0, w=w) for i, w in enumerate(shared)]
    heavy = [reply(f"c{i}", 0.0, 10.0**i, w=w) for i, w in enumerate(shared)]
    settings = {"robust": rule, "strategy": strategy}
    assert same(combine(light, **settings), combine(heavy[::-1], **settings))


def test_the_median_ignores_one_outlier_exactly() -> None:
    """Wherever one of five answers is, the median stays between the others' middle values."""
    shifts = [-0.2, -0.1, 0.1, 0.2]
    for outlier in (1e12, 3.0, 0.0, -1e12):
        replies = [reply(f"c{i}", s) for i, s in enumerate([*shifts, outlier])]
        got = combine(replies, robust="fedmedian")["w"] - STATE["w"]
        expected = float(np.median([*shifts, outlier]))
        torch.testing.assert_close(got, torch.full((3,), expected))


def test_the_trimmed_mean_is_the_mean_of_the_middle() -> None:
    replies = [reply(f"c{i}", s) for i, s in enumerate([-9.0, 0.1, 0.2, 0.6, 1e9])]
    got = combine(replies, robust="fedtrimmedavg", trim=0.2)["w"] - STATE["w"]
    torch.testing.assert_close(got, torch.full((3,), 0.3))


def test_krum_takes_an_honest_answer_as_it_is() -> None:
    """Blanchard et al.: of n >= 2 f + 3 answers it takes one; f close together do not win."""
    g = torch.Generator().manual_seed(0)
    honest = [
        reply(f"c{i}", 0.0, w=STATE["w"] + 1 + 0.1 * torch.randn(3, generator=g)) for i in range(5)
    ]
    hostile = [reply(f"x{i}", 0.0, w=torch.full((3,), -7.0)) for i in range(2)]
    got = combine([*hostile, *honest], robust="krum", hostile=2)
    assert any(torch.equal(got["w"], r.shared["w"]) for r in honest)


def test_krum_sees_updates_much_smaller_than_the_weights() -> None:
    """In float32, squared distances of the weights themselves are all rounding here."""
    state = {"w": torch.full((1000,), 100.0)}
    replies = [Update(f"c{i}", {"w": state["w"] + 1e-3}, weight=1.0) for i in range(6)]
    replies.append(Update("a", {"w": state["w"] - 2e-3}, weight=1.0))
    for rule in ("krum", "multikrum"):
        got = combine(replies, state=state, robust=rule, hostile=1)
        assert torch.equal(got["w"], replies[0].shared["w"]), rule


def test_clipping_holds_its_bound_exactly_over_all_tensors() -> None:
    g = torch.Generator().manual_seed(3)
    for scale in (1e-6, 0.3, 1.0, 50.0, 1e15):
        shared = {
            "w": torch.randn(3, generator=g) * scale,
            "scalar": torch.tensor(scale),
            "batches": torch.tensor(int(scale) % 2**40),
            "brain": torch.tensor([scale], dtype=torch.bfloat16),
        }
        change = difference(STATE, shared)
        before, direction = norm(change), {k: v.clone() for k, v in change.items()}
        assert clip(change, 0.5) == (before > 0.5)
        assert norm(change) == pytest.approx(min(before, 0.5), rel=1e-12)
        for name, array in change.items():
            torch.testing.assert_close(
                array * before, direction[name] * norm(change), rtol=1e-9, atol=0.0
            )


def test_an_update_of_nothing_is_not_divided_by() -> None:
    change = difference(STATE, STATE)
    assert clip(change, 1.0) is False
    assert norm(change) == 0
    assert same(combine([reply("a", 0.0)], clip_norm=1.0), STATE)


def test_norm_clipping_bounds_what_one_client_does() -> None:
    state = {"w": torch.zeros(4)}
    honest = [Update(f"c{i}", {"w": torch.full((4,), 0.1)}, weight=1.0) for i in range(4)]
    hostile = Update("x", {"w": torch.full((4,), -1e9)}, weight=1.0)
    alone = combine(honest, state=state)["w"]
    for bound, longest in ((0.05, 0.05), (0.0, 0.2)):  # 0: the median norm, that of the honest
        got = combine([*honest, hostile], state=state, robust="normclipping", clip_norm=bound)["w"]
        expected = (4 * min(0.2, longest) - longest) / 5 / 2
        torch.testing.assert_close(got, torch.full((4,), expected))
        assert float((got - alone).norm()) <= 2 * longest / 5 + float(alone.norm()) + 1e-9


def test_clip_norm_goes_with_every_rule_and_keeps_weights_without_one() -> None:
    state = {"w": torch.zeros(1)}
    replies = [
        Update("a", {"w": torch.tensor([9.0])}, weight=3.0),
        Update("b", {"w": torch.tensor([-0.5])}, weight=1.0),
    ]
    got = combine(replies, state=state, clip_norm=1.0)["w"]
    torch.testing.assert_close(got, torch.tensor([(3 * 1.0 - 0.5) / 4]))
    many = [Update(f"c{i}", {"w": torch.tensor([9.0])}, weight=1.0) for i in range(7)]
    for rule in RULES:
        got = combine(many, state=state, robust=rule, clip_norm=0.25)["w"]
        torch.testing.assert_close(got, torch.tensor([0.25]))


def test_a_server_optimizer_steps_on_what_the_rule_made() -> None:
    honest = [reply(f"c{i}", 0.1) for i in range(6)]
    hostile = reply("x", -1e6)
    settings = {"strategy": "fedadam", "server_rate": 0.01, "server_tau": 1e-8}
    robust = combine([*honest, hostile], robust="fedmedian", **settings)
    assert same(robust, combine(honest, robust="fedmedian", **settings))
    torch.testing.assert_close(robust["w"], STATE["w"] + 0.01, rtol=0, atol=1e-4)


def test_running_variances_never_fall_below_zero() -> None:
    state = {"bn.running_var": torch.tensor([0.5, 0.5]), "bn.running_mean": torch.zeros(2)}
    hostile = {"bn.running_var": torch.tensor([-9.0, 0.1]), "bn.running_mean": torch.ones(2) * -2}
    made = combined(state, [Update("x", hostile, weight=1.0)], variances=["bn.running_var"])
    assert made is not None
    torch.testing.assert_close(made["bn.running_var"], torch.tensor([0.0, 0.1]))
    torch.testing.assert_close(made["bn.running_mean"], hostile["bn.running_mean"])


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({"robust": "krum", "hostile": 2}, 7),
        ({"robust": "multikrum", "hostile": 1}, 5),
        ({"robust": "bulyan", "hostile": 2}, 11),
        ({"robust": "fedmedian"}, 3),
        ({"robust": "normclipping"}, 3),
        ({"robust": "fedtrimmedavg", "trim": 0.3}, 4),
        ({"robust": "fedtrimmedavg", "trim": 0.2}, 5),
        ({"robust": "krum", "hostile": 0, "min_clients": 6}, 6),
        ({"min_clients": 2}, 2),
    ],
)
def test_too_few_answers_make_no_state_and_too_few_clients_end_in_one_line(
    settings: dict[str, object], needs: int
) -> None:
    rounds = Rounds(**settings)  # type: ignore[arg-type]
    assert rounds.fewest == needs
    if rounds.robust == "none":
        return
    replies = [reply(f"c{i}", 0.1 * i) for i in range(needs)]
    assert combined(STATE, replies, rounds) is not None
    assert combined(STATE, replies[1:], rounds) is None
    assert rounds.cohort(needs) == needs
    with pytest.raises(ValueError, match=f"needs {needs} good answers in a round") as error:
        rounds.cohort(needs - 1)
    assert "\n" not in str(error.value)


def test_a_trim_of_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="trim is 0, so that fedtrimmedavg bears nobody"):
        Rounds(robust="fedtrimmedavg", trim=0.0).cohort(10)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_goes_on_with_the_answers_that_are_good(rule: str) -> None:
    """Of 9 clients any number answers NaN: if enough are left the state moves, else it is an error.

    And the loss told by one client does not become the loss of the round.
    """
    population = Line(seen=9)
    rounds = Rounds(rounds=2, robust=rule, keep="last", give_up=9)  # type: ignore[arg-type]
    start = Toward().start(model())
    for bad in range(10):
        method = Toward(bad=population.names[:bad], how="nan", rate=0.5)
        if 9 - bad < rounds.fewest:
            with pytest.raises(FederationError, match="no round brought a new state"):
                federate(method, model(), population, rounds=rounds, seed=0, stage="learn")
            continue
        done = federate(method, model(), population, rounds=rounds, seed=0, stage="learn")
        assert [r.failures for r in done.records] == [bad, bad, 0]
        assert not same(done.state, start)


def test_one_clients_loss_does_not_choose_the_best_round() -> None:
    losses = {**{f"c{i}": float(i) for i in range(5)}, "x": 1e38}
    question = Question(
        action="validate",
        method="m",
        stage="learn",
        round=1,
        state={},
        model=FrozenModel(None, ""),
        seeds=dict.fromkeys(losses, 0),
    )

    def record(rounds: Rounds) -> RoundRecord:
        tally = Tally(question, rounds, None, trusted=False)
        for name, loss in losses.items():
            weight = 900.0 if name == "x" else 1.0
            update = Update(name, weight=weight, metrics={"loss": loss})
            tally.add(Answer(client=name, update=update))
        tally.close()
        return tally.record(seconds=0.0)

    assert record(Rounds(robust="fedmedian")).loss == 2.5
    assert record(Rounds()).loss > 1e37
    assert np.isnan(record(Rounds(robust="fedmedian")).accuracy)


def test_flower_s_rules_need_flower_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    monkeypatch.delitem(sys.modules, "fedl2p.federation.flower.robust", raising=False)
    for rule in RULES:
        rounds = Rounds(rounds=0, robust=rule)  # type: ignore[arg-type]
        run = functools.partial(
            federate, Toward(), model(), Line(seen=9), rounds=rounds, seed=0, stage="learn"
        )
        if rule == "normclipping":
            run()
        else:
            with pytest.raises(ValueError, match=r"needs flwr.*pip install 'fedl2p\[flower\]'"):
                run()
