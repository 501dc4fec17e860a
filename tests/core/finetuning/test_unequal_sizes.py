"""Stacks of clients that hold unequally many examples: each gets what it gets alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.core.finetuning.batches import Align, EpochBatches, StackBatch
from fedl2p.core.finetuning.evaluation import evaluate
from fedl2p.core.finetuning.in_place_sgd import InPlaceSGD
from fedl2p.core.finetuning.inner_loop import inner_batches, run_inner_loop
from fedl2p.core.finetuning.stacking import cut_into_stacks, map_stacks
from fedl2p.core.functional.model import FunctionalModel, ModelState
from fedl2p.core.functional.precision import with_compute
from fedl2p.core.hypergradients.estimators import UNEQUAL_SIZES
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.settings import Compute, HypergradientConfig, InnerLoop, Mode, Statistics
from fedl2p.core.working_copies import working_copies
from fedl2p.method import Client
from fedl2p.methods import build
from fedl2p.methods.base.personalizing import finetune_stack
from fedl2p.methods.base.settings import Grid, MetaLearning, Settings
from support.core_nets import ConvNet, examples, hypergradient_of, settled

SIZES = (19, 4, 9, 8, 13, 3)
"""In batches of 4: whole ones, short ones, clients with less than a batch, five counts of steps."""

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def data(n: int, seed: int) -> ClientData:
    train, validation, test = (
        Examples(*examples(count, 2, 5, 5, seed=3 * seed + i, classes=3))
        for i, count in enumerate((n, 3 + n % 3, 4))
    )
    return ClientData(train, validation, test)


PEOPLE = [data(n, i) for i, n in enumerate(SIZES)]
INNER = InnerLoop(epochs=3, batch_size=4)


def uneven(net: FunctionalModel, clients: int) -> Hyperparams:
    rng = torch.Generator().manual_seed(7)
    norms, params = len(net.sites.norms), len(net.sites.params)
    mix = 0.2 + 0.6 * torch.rand(clients, norms, generator=rng, dtype=torch.float64)
    rate = 0.02 + 0.06 * torch.rand(clients, params, generator=rng, dtype=torch.float64)
    return Hyperparams(mix, rate, net.sites)


def only(hyper: Hyperparams, i: int) -> Hyperparams:
    return Hyperparams(hyper.mix[i : i + 1], hyper.rate[i : i + 1], hyper.sites)


def assert_close(stacked: ModelState, alone: Sequence[ModelState]) -> None:
    for i, one in enumerate(alone):
        for name, value in {**one.params, **one.stats}.items():
            ours = {**stacked.params, **stacked.stats}[name][i]
            torch.testing.assert_close(ours, value[0], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def tuned_alone(
    net: FunctionalModel, hyper: Hyperparams, people: Sequence[ClientData], statistics: Statistics
) -> list[ModelState]:
    return [
        run_inner_loop(
            net, only(hyper, i), inner_batches(net, [d], [i], INNER), statistics=statistics
        )
        for i, d in enumerate(people)
    ]


@pytest.fixture(scope="module")
def net() -> FunctionalModel:
    return FunctionalModel(settled(ConvNet(2)))


# Batches


def numbered(n: int, client: int) -> Examples:
    return Examples(
        1000.0 * client + torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n) % 3
    )


def rows_of(batches: EpochBatches, client: int) -> list[list[float]]:
    """What a client gets, step by step."""
    taken = []
    for step in range(len(batches)):
        for part in batches.step_batches(step):
            members = range(len(batches.seeds)) if part.members is None else part.members
            assert part.x.shape[:2] == part.y.shape == (len(members), part.x.shape[1])
            if client in members:
                taken.append(part.x[list(members).index(client), :, 0].tolist())
    return taken


@pytest.mark.parametrize("align", ["epochs", "end"])
@pytest.mark.parametrize("balanced", [False, True])
def test_every_client_gets_the_batches_that_it_gets_alone(align: Align, balanced: bool) -> None:
    parts = [numbered(n, i) for i, n in enumerate(SIZES)]

    def noisy(x: Tensor, rng: torch.Generator) -> Tensor:
        return x + torch.rand(x.shape, generator=rng, dtype=x.dtype)

    def made(own: Sequence[int]) -> EpochBatches:
        return EpochBatches(
            [parts[i] for i in own],
            list(own),
            epochs=3,
            batch_size=4,
            augment=[noisy if i % 2 else None for i in own],
            balanced=[balanced] * len(own),
            align=align,
        )

    together = made(range(len(SIZES)))
    assert len(together) == 3 * 5  # 19 in batches of 4
    for i, n in enumerate(SIZES):
        alone = [x[0, :, 0].tolist() for x, _ in made([i])]
        assert rows_of(together, i) == alone
        assert [len(b) for b in alone] == 3 * ([4] * (n // 4) + [n % 4] * (n % 4 > 0))


def test_clients_share_the_ends_of_epochs_or_the_last_step() -> None:
    parts = [numbered(n, i) for i, n in enumerate((12, 4))]

    def members(align: Align) -> list[tuple[int, ...] | None]:
        batches = EpochBatches(parts, [0, 1], epochs=2, batch_size=4, align=align)
        return [part.members for step in range(6) for part in batches.step_batches(step)]

    assert members("epochs") == [None, (0,), (0,), None, (0,), (0,)]
    assert members("end") == [(0,), (0,), (0,), (0,), None, None]


def test_one_batch_of_all_is_refused_where_lengths_differ() -> None:
    batches = EpochBatches([numbered(5, 0), numbered(7, 1)], [0, 1], epochs=1, batch_size=4)
    assert batches[0][0].shape == (2, 4, 1)
    with pytest.raises(ValueError, match="unequally many"):
        batches[1]


def test_a_client_that_is_there_twice_is_held_once() -> None:
    part = numbered(50, 0)
    batches = EpochBatches([part, numbered(50, 1), part], [0, 1, 2], epochs=1, batch_size=50)
    x, _ = batches[0]
    assert x[0].sort(0).values.equal(part.x)
    assert x[2].sort(0).values.equal(part.x)
    assert not x[2].equal(x[0])
    assert len(batches._x) == 100


# Fine-tuning


@pytest.mark.parametrize("align", ["epochs", "end"])
def test_fine_tuning_in_a_stack_of_unequal_sizes(net: FunctionalModel, align: Align) -> None:
    hyper, seeds = uneven(net, len(SIZES)), list(range(len(SIZES)))
    batches = inner_batches(net, PEOPLE, seeds, INNER, align=align)
    together = run_inner_loop(net, hyper, batches, statistics="corrected")
    assert_close(together, tuned_alone(net, hyper, PEOPLE, "corrected"))


def test_members_that_do_not_lie_side_by_side(net: FunctionalModel) -> None:
    people = [PEOPLE[i] for i in (1, 0, 3, 5, 2)]  # 4, 19, 8, 3, 9
    hyper = uneven(net, len(people))
    batches = inner_batches(net, people, list(range(5)), INNER)
    assert any(
        part.members is not None and any(b - a > 1 for a, b in pairwise(part.members))
        for step in range(len(batches))
        for part in batches.step_batches(step)
    )
    together = run_inner_loop(net, hyper, batches, statistics="published")
    assert_close(together, tuned_alone(net, hyper, people, "published"))


def test_early_stopping_in_a_stack_of_unequal_sizes(net: FunctionalModel) -> None:
    stopped = replace(INNER, early_stopping=True)
    clients = [Client(f"c{i}", d, seed=i) for i, d in enumerate(PEOPLE)]
    hyper = uneven(net, len(clients))
    hyper = Hyperparams(hyper.mix, hyper.rate * 2, hyper.sites)  # some get worse
    together = finetune_stack(net, clients, hyper, stopped)
    alone = [finetune_stack(net, [c], only(hyper, i), stopped) for i, c in enumerate(clients)]
    assert_close(together, alone)
    last = finetune_stack(net, clients, hyper, INNER)
    name = net.sites.params[0]
    kept = [torch.equal(together.params[name][i], last.params[name][i]) for i in range(6)]
    assert len(set(kept)) == 2  # the last epoch is some clients' best, not everybody's


def test_a_copy_of_the_state_stays_as_it_was(net: FunctionalModel) -> None:
    hyper = uneven(net, len(SIZES))
    batches = inner_batches(net, PEOPLE, list(range(len(SIZES))), INNER)
    with InPlaceSGD(net, net.start(len(SIZES)), hyper.mix, hyper.rate) as sgd:
        copied: list[ModelState] = []
        before: list[dict[str, Tensor]] = []
        for step in range(len(batches)):
            copied.append(sgd.copy())
            before.append({k: v.clone() for k, v in vars_of(copied[-1]).items()})
            for part in batches.step_batches(step):
                sgd.step(part)
    for state, values in zip(copied, before, strict=True):
        for name, value in values.items():
            assert torch.equal(vars_of(state)[name], value), name


def vars_of(state: ModelState) -> dict[str, Tensor]:
    return {**state.params, **state.stats}


# Hypergradients


def validation(people: Sequence[ClientData]) -> list[StackBatch]:
    lengths: dict[int, list[int]] = {}
    for i, d in enumerate(people):
        assert d.validation is not None
        lengths.setdefault(len(d.validation.x), []).append(i)
    parts = []
    for members in lengths.values():
        own = [people[i].validation for i in members]
        x = torch.stack([e.x for e in own if e is not None])
        y = torch.stack([e.y for e in own if e is not None])
        parts.append(StackBatch(x, y, tuple(members) if len(lengths) > 1 else None))
    return parts


@pytest.mark.parametrize("mode", UNEQUAL_SIZES)
@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize("segment", [None, 2])
def test_hypergradients_of_a_stack_of_unequal_sizes(
    net: FunctionalModel, mode: Mode, steps: int, segment: int | None
) -> None:
    config = HypergradientConfig(mode=mode, steps=steps, segment=segment)
    hyper, seeds = uneven(net, len(SIZES)), list(range(len(SIZES)))

    def of(people: Sequence[ClientData], own: Sequence[int], h: Hyperparams) -> list[Tensor]:
        batches = inner_batches(net, people, own, INNER, align="end")
        made = hypergradient_of(net, h, batches, validation(people), config=config)
        return [made.mix, made.rate, made.loss, made.accuracy]

    together = of(PEOPLE, seeds, hyper)
    for i, d in enumerate(PEOPLE):
        for ours, alone in zip(together, of([d], [i], only(hyper, i)), strict=True):
            torch.testing.assert_close(ours[i], alone[0], rtol=1e-8, atol=1e-10)


# Methods


def clients(count: int) -> list[Client]:
    made = []
    for i in range(count):
        d = data(5 + 7 * i % 23, i)
        parts = [
            Examples(e.x.float(), e.y) for e in (d.train, d.validation, d.test) if e is not None
        ]
        made.append(Client(f"c{i:02d}", ClientData(*parts), seed=i))
    return made


@pytest.mark.parametrize(
    "name",
    [
        "fedl2p",
        "fedavg",
        "fedrep",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("l2p", "fedbn", "fedprox", "apfl", "gridsearch", "local")
        ),
    ],
)
def test_methods_give_clients_of_all_sizes_what_they_get_alone(name: str) -> None:
    model: nn.Module = settled(ConvNet(2), dtype=torch.float32)
    grid = Grid(mixes=(0.0, 1.0), rates=(0.01, 0.1))
    settings = Settings(finetune=INNER, grid=grid, local_epochs=2, alone_steps=2)
    method = build(name, settings)
    people = clients(13)
    state = method.start(model, seed=0)
    together = method.train(model, state, people)
    tuned = method.personalize(model, state, people)
    for i, client in enumerate(people):
        alone = method.train(model, state, [client])[0]
        assert together[i].client == alone.client == client.name
        for key, tensor in alone.shared.items():
            torch.testing.assert_close(together[i].shared[key], tensor, rtol=1e-3, atol=1e-5)
        outcome = method.personalize(model, state, [client])[0]
        assert tuned[i].loss == pytest.approx(outcome.loss, rel=1e-3)


@pytest.mark.parametrize("mode", ["trajectory", "truncated"])
@pytest.mark.parametrize("validation_batch", [0, 2])
def test_learning_in_batches_of_validation_keeps_to_equal_sizes(
    mode: Mode, validation_batch: int
) -> None:
    model = settled(ConvNet(2), dtype=torch.float32)
    meta = MetaLearning(
        hypergradient=HypergradientConfig(mode=mode), validation_batch=validation_batch
    )
    method = build("fedl2p", Settings(finetune=INNER, meta=meta))
    people = clients(6)
    state = method.start(model, seed=0)
    together = method.train(model, state, people)
    for ours, client in zip(together, people, strict=True):
        alone = method.train(model, state, [client])[0]
        for key, tensor in alone.shared.items():
            torch.testing.assert_close(ours.shared[key], tensor, rtol=1e-3, atol=1e-5)


# Cutting


def test_a_stack_of_unequal_sizes_is_sorted_within_its_chunk_of_clients() -> None:
    net = FunctionalModel(settled(ConvNet(2)))
    people = [data(n, i) for i, n in enumerate((5, 90, 7, 88, 6, 91, 4, 89))]
    cut = list(cut_into_stacks(net, people, size=4, unequal_sizes=True))
    sizes = [[len(people[i].train.x) for i in s] for s in cut]
    assert sorted(sizes) == [[90, 88, 7, 5], [91, 89, 6, 4]]
    assert all(len(s) == 1 for s in cut_into_stacks(net, people, size=4))


@pytest.mark.parametrize("unequal_sizes", [False, True])
def test_the_cut_does_not_depend_on_how_many_clients_are_in_a_call(unequal_sizes: bool) -> None:
    net = FunctionalModel(with_compute(settled(ConvNet(2)), Compute(stack_size=4)))
    sizes = torch.randint(6, 9, (18,), generator=torch.Generator().manual_seed(0)).tolist()
    people = [data(n, i) for i, n in enumerate(sizes)]
    whole = list(cut_into_stacks(net, people, unequal_sizes=unequal_sizes))
    for clients in (4, 8, 12):  # whole chunks of clients in each call
        calls = range(0, len(people), clients)
        parts = [
            [begin + i for i in stack]
            for begin in calls
            for stack in cut_into_stacks(
                net, people[begin : begin + clients], unequal_sizes=unequal_sizes
            )
        ]
        assert sorted(parts) == sorted(whole)


def test_clients_without_a_validation_part_make_stacks_of_their_own() -> None:
    net = FunctionalModel(settled(ConvNet(2)))
    people = [PEOPLE[0], replace(PEOPLE[1], validation=None), *PEOPLE[2:5]]
    assert list(cut_into_stacks(net, people, unequal_sizes=True)) == [[0, 4, 2, 3], [1]]


def test_two_clients_go_one_by_one() -> None:
    net = FunctionalModel(settled(ConvNet(2)))
    assert list(cut_into_stacks(net, [PEOPLE[0]] * 5, size=3)) == [[0, 1, 2], [3], [4]]
    pairs = EpochBatches(
        [numbered(n, i) for i, n in enumerate((4, 4, 4, 3, 3))],
        list(range(5)),
        epochs=1,
        batch_size=4,
        fewest=3,
    )
    assert [part.members for part in pairs.step_batches(0)] == [(0, 1, 2), (3,), (4,)]


def test_large_inputs_and_models_are_not_stacked() -> None:
    small, deep = (
        FunctionalModel(settled(ConvNet(2))),
        FunctionalModel(nn.Sequential(nn.Flatten(), nn.Linear(50, 25_000))),
    )
    wide = [ClientData(Examples(torch.zeros(4, 2, 32, 32), torch.arange(4) % 3))] * 3
    assert [len(s) for s in cut_into_stacks(small, [PEOPLE[0]] * 12)] == [10, 1, 1]
    assert [len(s) for s in cut_into_stacks(small, wide)] == [1, 1, 1]
    assert [len(s) for s in cut_into_stacks(deep, [PEOPLE[0]] * 3)] == [1, 1, 1]


def test_results_come_in_the_order_of_the_clients() -> None:
    net = FunctionalModel(with_compute(settled(ConvNet(2)), Compute(stack_size=3)))
    results = map_stacks(lambda own: own, net, PEOPLE, range(len(PEOPLE)), unequal_sizes=True)
    assert results == list(range(len(PEOPLE)))


def test_scores_of_parts_of_all_sizes(net: FunctionalModel) -> None:
    state = working_copies(net.plain).net.start(len(PEOPLE), "global")
    mix = torch.zeros(len(PEOPLE), len(net.sites.norms), dtype=torch.float64)
    scores = evaluate(net, state, mix, [d.train for d in PEOPLE])
    one = net.start(1, "global")
    for d, score in zip(PEOPLE, scores, strict=True):
        assert evaluate(net, one, mix[:1], [d.train])[0] == pytest.approx(score)
