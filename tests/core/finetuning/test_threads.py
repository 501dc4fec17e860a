"""Stacks of clients side by side in threads: the same numbers, nothing left changed."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.core.finetuning.stacking import map_stacks
from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.settings import InnerLoop
from fedl2p.core.working_copies import working_copies
from fedl2p.method import Client
from fedl2p.methods import build
from fedl2p.methods.base.settings import Grid, Settings
from fedl2p.models import small_conv
from support.core_nets import mlp


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def flat_mlp() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4), mlp())


def clients(count: int) -> list[Client]:
    made = []
    for i in range(count):
        rng = torch.Generator().manual_seed(i)
        parts = [
            Examples(torch.randn(n, 1, 8, 8, generator=rng), torch.arange(n) % 4)
            for n in (12, 8, 8)
        ]
        made.append(Client(f"c{i:02d}", ClientData(*parts), seed=i))
    return made


def data(count: int) -> list[ClientData]:
    return [client.data for client in clients(count)]


@pytest.mark.parametrize(
    "method",
    [
        "fedl2p",
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in ("fedavg", "gridsearch", "perfedavg", "apfl")
        ),
    ],
)
def test_threads_change_no_bit(method: str) -> None:
    model = small_conv((1, 8, 8), 4)
    brief = InnerLoop(epochs=2, batch_size=8)
    grid = Grid(mixes=(0.0, 1.0), rates=(0.01, 0.1))
    ran = build(method, Settings(finetune=brief, grid=grid, local_epochs=2))
    people = clients(24)  # three stacks
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            state = ran.start(model, seed=0)
            updates = ran.train(model, state, people)
            outcomes = ran.personalize(model, state, people[:21])
            results.append((updates, outcomes))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for updates, outcomes in results[1:]:
        for ours, first in zip(updates, results[0][0], strict=True):
            assert ours.client == first.client
            for name, tensor in first.shared.items():
                assert torch.equal(ours.shared[name], tensor), name
        for after, first_after in zip(outcomes, results[0][1], strict=True):
            assert (after.client, after.loss) == (first_after.client, first_after.loss)


@pytest.mark.usefixtures("two_threads")
def test_stacks_run_in_several_threads_with_one_thread_each() -> None:
    net, people = FunctionalModel(flat_mlp()), data(20)
    both = threading.Barrier(2, timeout=20)

    def work(members: list[int]) -> list[tuple[int, int, bool]]:
        both.wait()  # passes only if two stacks are under way at the same time
        seen = threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()
        return [seen for _ in members]

    with torch.no_grad():
        results = map_stacks(work, net, people, range(20))
    assert len({thread for thread, _, _ in results}) == 2
    assert {(number, grad) for _, number, grad in results} == {(1, False)}
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_an_error_in_a_stack_is_raised_and_threads_are_put_back() -> None:
    def work(members: list[int]) -> list[int]:
        if 15 in members:
            raise ArithmeticError("client 15")
        return members

    with pytest.raises(ArithmeticError, match="client 15"):
        map_stacks(work, FunctionalModel(flat_mlp()), data(30), range(30))
    assert torch.get_num_threads() == 2
    sound = map_stacks(lambda own: own, FunctionalModel(flat_mlp()), data(30), range(30))
    assert sound == list(range(30))


def idents(clients: list[int]) -> list[int]:
    return [threading.get_ident() for _ in clients]


@pytest.mark.usefixtures("two_threads")
def test_a_model_with_dropout_stays_in_one_thread() -> None:
    net = FunctionalModel(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(64, 4))
    )
    threads = map_stacks(idents, net, data(4), range(4))
    assert set(threads) == {threading.get_ident()}


@pytest.mark.usefixtures("two_threads")
def test_a_large_model_stays_in_one_thread() -> None:
    net = FunctionalModel(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 20_000)))
    threads = map_stacks(idents, net, data(24), range(24))
    assert set(threads) == {threading.get_ident()}


@pytest.mark.usefixtures("two_threads")
def test_large_inputs_stay_in_one_thread() -> None:
    large = [ClientData(Examples(torch.zeros(2, 3, 120, 120), torch.arange(2))) for _ in range(3)]
    net = FunctionalModel(torch.nn.Conv2d(3, 4, 3))
    threads = map_stacks(idents, net, large, range(3))
    assert set(threads) == {threading.get_ident()}


def test_two_threads_may_call_one_net() -> None:
    model = small_conv((1, 8, 8), 4)
    net = working_copies(model).net
    x = torch.randn(1, 6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    state, mixes = net.start(1, "global"), [torch.full((1, 3), m) for m in (0.0, 1.0)]
    wanted = [net.logits(state, mix, x, training=True)[0] for mix in mixes]
    wrong: list[int] = []

    def call(i: int) -> None:
        for _ in range(200):
            if not torch.equal(net.logits(state, mixes[i], x, training=True)[0], wanted[i]):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
