"""What every method promises, tried on every file of the folder."""

from __future__ import annotations

import copy
import dataclasses
import math
from functools import lru_cache

import pytest
import torch
from torch import nn

from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.core.settings import InnerLoop
from fedl2p.method import Client, Method, Outcome, State
from fedl2p.methods import build, names
from fedl2p.methods.base.settings import Grid, LocalTraining, Settings
from support.nets import nested_net

SETTINGS = Settings(
    finetune=InnerLoop(epochs=2, batch_size=8),
    finetune_rate=0.01,
    local=LocalTraining(batch_size=8, rate=0.05),
    local_epochs=2,
    grid=Grid(mixes=(0.0, 1.0), rates=(0.01, 0.05)),
    alone_steps=2,
)


def part(generator: torch.Generator, count: int, offset: float) -> Examples:
    x = torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64) + offset
    return Examples(x, torch.randint(0, 10, (count,), generator=generator))


def make_client(i: int, *, train: int = 20, validation: int = 9) -> Client:
    generator = torch.Generator().manual_seed(i)
    offset = 0.3 * i
    data = ClientData(
        part(generator, train, offset),
        part(generator, validation, offset),
        part(generator, 7 + i, offset),
    )
    return Client(f"client-{i}", data, seed=100 + i, round=1)


CLIENTS = [make_client(0), make_client(1), make_client(2, train=13), make_client(3, validation=5)]
STRANGER = make_client(7)


def model_for(method: Method) -> nn.Module:
    return nested_net(seed=3)


def learned(method: Method, model: nn.Module) -> State:
    """Return the state after one round of averaging, as a server would make it."""
    updates = method.train(model, method.start(model, seed=5), CLIENTS)
    total = sum(u.weight for u in updates)
    shared = [u for u in updates if u.shared]
    if not shared:
        return method.start(model, seed=5)
    return {k: sum(u.weight / total * u.shared[k] for u in shared) for k in shared[0].shared}


@lru_cache
def learned_state(name: str) -> State:
    """The same for tests that only need some state, made once per method and only read."""
    method = build(name, SETTINGS)
    return learned(method, model_for(method))


def numbers(outcomes: list[Outcome]) -> torch.Tensor:
    rows = [(o.accuracy_before, o.accuracy, o.loss_before, o.loss) for o in outcomes]
    return torch.tensor(rows, dtype=torch.float64)


REPRESENTATIVE = ("fedl2p", "fedavg", "ditto", "finetuning-client")
"""Of each kind one, for make test: learned, averaged, with state of its own, without rounds."""


@pytest.fixture(
    params=[
        pytest.param(name, marks=() if name in REPRESENTATIVE else pytest.mark.slow)
        for name in names()
    ]
)
def method(request: pytest.FixtureRequest) -> Method:
    built = build(request.param, SETTINGS)
    assert built.name == request.param
    return built


def test_leaves_the_callers_model_untouched(method: Method) -> None:
    model = model_for(method)
    model.train()
    before = copy.deepcopy(model.state_dict())
    flags = {n: m.training for n, m in model.named_modules()}
    state = learned(method, model)
    method.personalize(model, state, CLIENTS)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert flags == {n: m.training for n, m in model.named_modules()}
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_leaves_state_and_data_untouched(method: Method) -> None:
    model = model_for(method)
    state = method.start(model, seed=5)
    before = {k: v.clone() for k, v in state.items()}
    data = [c.data.train.x.clone() for c in CLIENTS]
    method.train(model, state, CLIENTS)
    assert all(torch.equal(before[k], v) for k, v in state.items())
    assert all(torch.equal(a, c.data.train.x) for a, c in zip(data, CLIENTS, strict=True))


def test_same_seed_same_bits(method: Method) -> None:
    model = model_for(method)
    states = [learned(method, model), learned(method, copy.deepcopy(model))]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    outcomes = [method.personalize(m, states[0], CLIENTS) for m in (model, copy.deepcopy(model))]
    assert torch.equal(numbers(outcomes[0]), numbers(outcomes[1]))


def test_does_not_read_the_global_generator(method: Method) -> None:
    model = model_for(method)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        state = learned(method, model)
        results.append(numbers(method.personalize(model, state, CLIENTS)))
        assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(results[0], results[1])


def test_unseen_client_works(method: Method) -> None:
    model = model_for(method)
    (outcome,) = method.personalize(model, learned_state(method.name), [STRANGER])
    assert outcome.failure is None
    assert outcome.client == STRANGER.name
    assert (outcome.num_train, outcome.num_test) == (20, 14)
    assert 0 <= outcome.accuracy <= 1
    assert outcome.loss > 0
    assert outcome.seconds > 0


def test_state_survives_the_wire(method: Method) -> None:
    wire = pytest.importorskip("fedl2p.federation.flower.records")
    state = learned_state(method.name)
    back = wire.decode_state(wire.encode_state(state))
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_shared_fits_the_state_received(method: Method) -> None:
    model = model_for(method)
    state = method.start(model, seed=5)
    for update in method.train(model, state, CLIENTS):
        assert update.weight > 0
        assert {"loss", "accuracy"} <= update.metrics.keys()
        if update.shared:
            assert {k: (v.shape, v.dtype) for k, v in update.shared.items()} == {
                k: (v.shape, v.dtype) for k, v in state.items()
            }
            assert all(v.device.type == "cpu" for v in update.shared.values())
        else:
            assert method.rounds == "none"


def test_cohort_equals_loop(method: Method) -> None:
    model = model_for(method)
    state = method.start(model, seed=5)
    together = method.train(model, state, CLIENTS)
    for client, update in zip(CLIENTS, together, strict=True):
        (alone,) = method.train(model, state, [client])
        assert alone.client == update.client == client.name
        assert alone.weight == update.weight
        assert alone.metrics == pytest.approx(update.metrics, rel=1e-6)
        for name, tensor in update.shared.items():
            torch.testing.assert_close(alone.shared[name], tensor, rtol=1e-5, atol=1e-6)
    state = learned_state(method.name)
    outcomes = method.personalize(model, state, CLIENTS)
    alone = [method.personalize(model, state, [c])[0] for c in CLIENTS]
    torch.testing.assert_close(numbers(outcomes), numbers(alone), rtol=1e-5, atol=1e-6)


def test_order_of_clients_does_not_matter(method: Method) -> None:
    model = model_for(method)
    state = learned_state(method.name)
    forward = method.personalize(model, state, CLIENTS)
    backward = method.personalize(model, state, CLIENTS[::-1])[::-1]
    assert [o.client for o in forward] == [o.client for o in backward]
    torch.testing.assert_close(numbers(forward), numbers(backward), rtol=1e-5, atol=1e-6)


def test_validate_trains_nothing(method: Method) -> None:
    model = model_for(method)
    state = method.start(model, seed=5)
    for judged, client in zip(method.validate(model, state, CLIENTS), CLIENTS, strict=True):
        assert judged.client == client.name
        assert not judged.shared
        assert judged.weight > 0
        assert judged.metrics["loss"] > 0


def test_a_client_without_test_part_is_personalized_and_scored_nowhere(method: Method) -> None:
    model, state = model_for(method), learned_state(method.name)
    tested = dataclasses.replace(CLIENTS[0], wants_model=True)
    untested = dataclasses.replace(tested, data=dataclasses.replace(tested.data, test=None))
    [with_test], [without] = (method.personalize(model, state, [c]) for c in (tested, untested))
    assert (without.num_test, without.failure) == (0, None)
    scores = (without.accuracy_before, without.accuracy, without.loss_before, without.loss)
    assert all(math.isnan(score) for score in scores)
    # Its model is the one that it would have had with a test part.
    assert with_test.model is not None
    assert without.model is not None
    expected = with_test.model.state_dict()
    for name, tensor in without.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_personalized_model_scores_what_its_outcome_says(method: Method) -> None:
    model = model_for(method)
    client = dataclasses.replace(CLIENTS[0], wants_model=True)
    [outcome] = method.personalize(model, learned_state(method.name), [client])
    assert outcome.model is not None
    assert client.data.test is not None
    with torch.no_grad():
        logits = outcome.model.eval()(client.data.test.x)
    loss = torch.nn.functional.cross_entropy(logits, client.data.test.y).item()
    assert loss == pytest.approx(outcome.loss, rel=1e-4)
