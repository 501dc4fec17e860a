"""Malformed messages, to the server and to a node: each ends in a named failure of its sender."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedl2p.federation.clients.node import ClientNode
from fedl2p.federation.flower import records as wire
from fedl2p.federation.flower.client_app import answer
from fedl2p.federation.flower.clients import OnFlower
from fedl2p.federation.messages import WEIGHT
from fedl2p.federation.personalizing import personalize_all
from fedl2p.federation.rounds import federate
from fedl2p.federation.settings import Rounds
from support.federation_toys import Line, Toward, model, same
from support.flower_grid import NodeGrid, is_query
from support.fuzzing import ends_well, fuzz, mutated

pytestmark = pytest.mark.slow

POPULATION = Line(seen=3)
METHOD = Toward(rate=0.5)
BAD_NODE = 10  # that of c1

SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.sampled_from([0, -1, 10**30, 1e308, float("nan"), float("inf")]),
)
TEXTS = st.text(max_size=20) | st.sampled_from(
    ["", "\0", "\x1b[2J\n", "c0", "x" * 10_000, "\ud800"]
)
LISTS = st.lists(st.integers(0, 9), max_size=3) | st.lists(st.floats(), max_size=3)
METRICS = st.dictionaries(
    st.sampled_from([WEIGHT, "loss", "accuracy", "num_train", "num_test", "seconds", "x"]),
    SCALARS | LISTS,
    max_size=7,
)
CONFIGS = st.dictionaries(
    st.sampled_from(["method", "stage", "round", "model", "seed", "client", "models", "failure"]),
    st.one_of(SCALARS, TEXTS, LISTS, st.booleans(), st.binary(max_size=9), st.lists(TEXTS)),
    max_size=7,
)
SOUND = dict(wire.encode_state(METHOD.start(model())))


@st.composite
def odd_arrays(draw: st.DrawFn) -> Array:
    """An array of which bytes, shape, dtype or format are something else."""
    base = draw(st.sampled_from(list(SOUND.values())))
    return Array(
        dtype=draw(
            st.sampled_from([base.dtype, "float32", "int64", "bfloat16", "object", "<U1", ""])
        ),
        shape=draw(st.sampled_from([base.shape, (), (2,), (10**9,), (-1,), (0,)])),
        stype=draw(st.sampled_from(["numpy.ndarray"] * 4 + ["torch.save", ""])),
        data=draw(st.just(base.data) | mutated(base.data, head=80) | st.binary(max_size=90)),
    )


@st.composite
def array_records(draw: st.DrawFn) -> ArrayRecord:
    record = ArrayRecord()
    for name, array in SOUND.items():
        choice = draw(st.integers(0, 7))
        if choice == 0:
            continue
        record[name] = draw(odd_arrays()) if choice <= 3 else array
    if draw(st.integers(0, 5)) == 0:
        record[draw(TEXTS)] = draw(odd_arrays())
    return record


def records(draw: st.DrawFn, kind: str) -> Any:
    if kind == "arrays":
        return draw(array_records())
    return MetricRecord(draw(METRICS)) if kind == "metrics" else ConfigRecord(draw(CONFIGS))


@st.composite
def changes(draw: st.DrawFn) -> Callable[[RecordDict], RecordDict]:
    """What is done to a sound content: records of any kind under any key, or none."""
    new = {}
    for key in draw(
        st.sets(st.sampled_from([wire.ARRAYS, wire.METRICS, wire.CONFIG, wire.MODEL, "x"]))
    ):
        kinds = ["arrays", "metrics", "config", "none"]
        try:
            kind = draw(st.sampled_from([key if key in kinds else "arrays"] * 3 + kinds))
            new[key] = None if kind == "none" else records(draw, kind)
        except (TypeError, ValueError):  # Flower itself refuses to build it
            continue

    def change(content: RecordDict) -> RecordDict:
        made = RecordDict(dict(content))
        for key, record in new.items():
            made.pop(key, None)
            if record is not None:
                made[key] = record
        return made

    return change


class ChangingGrid(NodeGrid):
    """Changes what one client answers, or what it is asked."""

    change: Callable[[RecordDict], RecordDict]
    asked = False
    queries = False

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        questions = list(messages)
        if is_query(questions[0]) != self.queries:
            return super().send_and_receive(questions)
        # by node, not by place: whoever has not understood is asked again by itself
        if self.asked:
            for place, question in enumerate(questions):
                if question.metadata.dst_node_id == BAD_NODE:
                    questions[place] = copy.copy(question)
                    questions[place].content = self.change(question.content)
            return super().send_and_receive(questions)
        replies = super().send_and_receive(questions)
        for reply in replies:
            if reply.metadata.src_node_id == BAD_NODE and reply.has_content():
                reply.content = self.change(reply.content)
        return replies


def grid_of(change: Callable[[RecordDict], RecordDict], **flags: bool) -> ChangingGrid:
    node = ClientNode(build=model, population=POPULATION, methods={METHOD.name: METHOD})
    grid = ChangingGrid(node)
    grid.change = change
    for name, value in flags.items():
        setattr(grid, name, value)
    return grid


def clients(change: Callable[[RecordDict], RecordDict], **flags: bool) -> OnFlower:
    return OnFlower(grid_of(change, **flags), timeout=0.05)  # type: ignore[arg-type]


def run(where: OnFlower) -> Any:
    return federate(
        *(METHOD, model(), POPULATION),
        rounds=Rounds(rounds=1, keep="last"),
        seed=0,
        stage="learn",
        clients=where,
    )


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logger = logging.getLogger("fedl2p")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


class _Without(Line):
    def __init__(self) -> None:
        super().__init__(seen=3)
        self.seen = ("c0", "c2")


ALONE = federate(
    *(METHOD, model(), _Without()),
    rounds=Rounds(rounds=1, keep="last"),
    seed=0,
    stage="learn",
)


@pytest.mark.slow
@fuzz(250)
@given(change=changes())
def test_replies_in_rounds(change: Callable[[RecordDict], RecordDict]) -> None:
    with ends_well("replies in rounds"):
        done = run(clients(change))
        assert all(t.isfinite().all() for t in done.state.values())
        assert done.records[0].failures in (0, 1)
        assert list(done.records[0].reasons) in ([], ["c1"])
        for reason in done.records[0].reasons.values():
            assert reason.isprintable()
            assert 0 < len(reason) <= 300
        if done.records[0].failures:
            assert same(done.state, ALONE.state)


@pytest.mark.slow
@fuzz(150)
@given(change=changes())
def test_replies_of_personalization(change: Callable[[RecordDict], RecordDict]) -> None:
    with ends_well("replies of personalization"):
        outcomes = personalize_all(
            *(METHOD, model(), METHOD.start(model()), POPULATION), seed=0, clients=clients(change)
        )
        assert [o.client for o in outcomes] == ["c0", "c1", "c2"]
        assert [o.failure for o in (outcomes[0], outcomes[2])] == [None, None]
        from fedl2p.runs.results import Row

        for outcome in outcomes:
            Row.of("toward", "seen", outcome)  # what the report is made of


@fuzz(150)
@given(change=changes())
def test_introductions(change: Callable[[RecordDict], RecordDict]) -> None:
    with ends_well("introductions"):
        names = clients(change, queries=True).directory.refresh()
        assert {"c0", "c2"} <= set(names)


@pytest.mark.slow
@fuzz(250)
@given(change=changes())
def test_questions_to_a_node(change: Callable[[RecordDict], RecordDict]) -> None:
    """A node answers a server that sends nonsense, and goes on serving."""
    grid = grid_of(change, asked=True)
    where = OnFlower(grid, timeout=0.05)  # type: ignore[arg-type]
    with ends_well("questions"):
        done = run(where)
        assert list(done.records[0].reasons) in ([], ["c1"])
    grid.asked = False
    grid.change = lambda content: content
    assert run(where).records[0].failures == 0


@pytest.mark.parametrize("kind", ["train.other", "evaluate.default", "train"])
def test_a_node_refuses_what_nobody_asks(kind: str) -> None:
    grid = grid_of(lambda content: content)
    reply = answer(grid.node, Message(RecordDict(), 1, kind), grid.contexts[BAD_NODE])
    assert reply.has_error()
    assert "the message cannot be read" in reply.error.reason
