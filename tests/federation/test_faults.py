"""Whatever one client does, the others' round goes on without it, and it is named with its reason.

Every fault goes through the real ``federate``: those of the client's own code through a method that
misbehaves, those of the wire through a grid that spoils, delays or loses replies.
"""

from __future__ import annotations

import csv
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedl2p import methods, models
from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.core.settings import InnerLoop
from fedl2p.data.pools.in_memory import InMemory
from fedl2p.federation.clients.in_process import InProcess, in_process
from fedl2p.federation.clients.node import ClientNode
from fedl2p.federation.flower import records as wire
from fedl2p.federation.flower.clients import OnFlower
from fedl2p.federation.listeners import CsvListener, FailuresListener
from fedl2p.federation.messages import WEIGHT, Clients, FederationError, one_line
from fedl2p.federation.personalizing import personalize_all
from fedl2p.federation.round_records import Federated
from fedl2p.federation.rounds import federate
from fedl2p.federation.server.aggregation import ServerOptimizer
from fedl2p.federation.server.answer_checks import objection, overweight
from fedl2p.federation.settings import Robust, Rounds, Strategy
from fedl2p.method import Update
from fedl2p.methods.base.settings import LocalTraining, Settings
from support.federation_toys import Line, Toward, model, same
from support.flower_grid import NodeGrid, is_query

POPULATION = Line(seen=5)
BAD = "c2"
GOOD = ("c0", "c1", "c3", "c4")
NODE = ClientNode(build=model, population=POPULATION, methods={})
Spoil = Callable[[Message], Message | None]


SILENT = "no answer in time|left out for some rounds: it was silent before"


class FaultyGrid(NodeGrid):
    """Hands the reply of one client to ``spoil`` before the server sees it."""

    def __init__(self, node: ClientNode, spoil: Spoil) -> None:
        super().__init__(node)
        self.spoil = spoil

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        asked = list(messages)
        replies: list[Message | None] = list(super().send_and_receive(asked))
        for place, message in enumerate(asked):
            if not is_query(message) and message.metadata.dst_node_id == self.id_of(BAD):
                replies[place] = self.spoil(replies[place])  # type: ignore[arg-type]
        return [reply for reply in replies if reply is not None]


def content(reply: Message) -> RecordDict:
    """A copy of the reply's content."""
    arrays = dict(reply.content.array_records.get(wire.ARRAYS, ArrayRecord()))
    numbers = dict(reply.content.metric_records[wire.METRICS])
    return RecordDict({wire.ARRAYS: ArrayRecord(arrays), wire.METRICS: MetricRecord(numbers)})


def spoiled(change: Callable[[RecordDict], object]) -> Spoil:
    def spoil(reply: Message) -> Message:
        new = content(reply)
        change(new)
        return _with_content(reply, new)

    return spoil


def _with_content(reply: Message, new: RecordDict) -> Message:
    reply.content = new
    return reply


def tensor(name: str, value: Any) -> Spoil:
    def change(new: RecordDict) -> None:
        new.array_records[wire.ARRAYS][name] = Array(np.asarray(value))

    return spoiled(change)


def metric(name: str, value: Any) -> Spoil:
    def change(new: RecordDict) -> None:
        new.metric_records[wire.METRICS][name] = value

    return spoiled(change)


def remove(record: str, name: str) -> Spoil:
    return spoiled(lambda new: new[record].pop(name, None))


def garbage(data: bytes, **others: Any) -> Spoil:
    def change(new: RecordDict) -> None:
        fields = {
            "dtype": "float64",
            "shape": (2,),
            "stype": "numpy.ndarray",
            "data": data,
            **others,
        }
        new.array_records[wire.ARRAYS]["point"] = Array(**fields)

    return spoiled(change)


def lost(_: Message) -> None:
    return None


def error(reply: Message) -> Message:
    return Message(
        Error(8, "killed\x1b[31m\nby the system " + "x" * 10_000), reply_to=reply_source(reply)
    )


def reply_source(reply: Message) -> Message:
    """A message whose reply comes from where ``reply`` came from."""
    asked = Message(RecordDict(), reply.metadata.src_node_id, wire.MESSAGE_TYPES["train"])
    asked.metadata.__dict__["_group_id"] = reply.metadata.group_id
    return asked


WIRE_FAULTS: dict[str, tuple[Spoil, str]] = {
    "no answer": (lost, SILENT),
    "NaN": (tensor("point", [np.nan, 0.0]), "tensor 'point' holds NaN or infinity"),
    "infinity": (tensor("point", [np.inf, 0.0]), "tensor 'point' holds NaN or infinity"),
    "vast": (tensor("point", [1e300, 0.0]), r"tensor 'point' holds 1e\+300, wanted at most 1e\+18"),
    "other name": (tensor("pint", [0.0, 0.0]), r"tensor 'pint' was not asked for \(1 in all\)"),
    "missing": (remove(wire.ARRAYS, "count"), "tensor 'count' is missing"),
    "no tensors": (
        spoiled(lambda new: new.array_records[wire.ARRAYS].clear()),
        r"tensor 'count' is missing \(4 in all\)",
    ),
    "shape": (tensor("point", [0.0, 0.0, 0.0]), r"has shape \(3,\), wanted \(2,\)"),
    "broadcast": (tensor("point", 0.0), r"has shape \(\), wanted \(2,\)"),
    "dtype": (tensor("point", np.zeros(2, np.float32)), "is torch.float32, wanted torch.float64"),
    "text": (
        tensor("point", np.array(["a", "b"])),
        "tensor 'point' is torch.<U1, wanted",
    ),
    "torn": (garbage(b"\x93NUMPY\x01\x00"), "tensor 'point' cannot be decoded"),
    "pickle": (garbage(b"\x80\x04K\x01."), "tensor 'point' cannot be decoded"),
    "stype": (garbage(b"", stype="torch.save"), "tensor 'point' is encoded as 'torch.save'"),
    "zero": (metric(WEIGHT, 0.0), "its weight is 0.0, wanted a positive number"),
    "negative": (metric(WEIGHT, -7), r"its weight is -7.0, wanted a positive number"),
    "NaN weight": (metric(WEIGHT, float("nan")), "its weight is nan"),
    "infinite weight": (metric(WEIGHT, float("inf")), "its weight is inf"),
    "vast weight": (metric(WEIGHT, 1e300), r"its weight is 1e\+300"),
    "huge weight": (metric(WEIGHT, 1e6), r"its weight is 1e\+06, over 1000 times .* of 4"),
    "weights": (metric(WEIGHT, [1.0, 2.0]), "its answer cannot be read"),
    "no weight": (remove(wire.METRICS, WEIGHT), "it has no 'num-examples'"),
    "no metrics": (spoiled(lambda new: new.pop(wire.METRICS)), "no MetricRecord 'metrics'"),
    "no arrays": (spoiled(lambda new: new.pop(wire.ARRAYS)), "no ArrayRecord 'arrays'"),
    "wrong record": (
        spoiled(lambda new: new.update({wire.ARRAYS: ConfigRecord({"a": 1})})),
        "no ArrayRecord 'arrays'",
    ),
    "loss": (metric("loss", float("nan")), "its loss is nan"),
    "vast loss": (metric("loss", 1e308), r"its loss is 1e\+308"),
    "accuracy": (metric("accuracy", 7.0), "its accuracy is 7.0"),
    "error": (error, r"killed \[31m by the system x+\.\.\."),
}

CODE_FAULTS = {
    "raise": "ArithmeticError: it exploded",
    "failure": "the inner loop diverged",
    "nan": "tensor 'point' holds NaN or infinity",
    "infinity": "tensor 'scale' holds NaN or infinity",
    "missing": "tensor 'count' is missing",
    "extra": "tensor 'more' was not asked for",
    "shape": r"tensor 'point' has shape \(1,\)",
    "dtype": "tensor 'point' is torch.float32",
    "weight": "its weight is 0.0",
    "negative": "its weight is -3.0",
    "loss": "its loss is nan",
}


def run(
    method: Toward | None = None,
    grid: Callable[[ClientNode], NodeGrid] | None = None,
    *,
    population: Line = POPULATION,
    folder: Path | None = None,
    timeout: float | None = 0.05,
    resume: bool = False,
    **rounds: Any,
) -> Federated:
    method = method or Toward(rate=0.5)
    node = ClientNode(build=model, population=population, methods={method.name: method})
    clients: Clients = InProcess(node)
    if grid is not None:
        clients = OnFlower(grid(node), timeout=timeout)  # type: ignore[arg-type]
    tables = (
        [CsvListener(folder / "rounds.csv"), FailuresListener(folder / "failures.csv")]
        if folder
        else []
    )
    return federate(
        method,
        model(),
        population,
        rounds=Rounds(**{"rounds": 2, "keep": "last", **rounds}),
        seed=0,
        stage="learn",
        clients=clients,
        listeners=tables,
        checkpoint=folder / "checkpoint" if folder else None,
        resume=resume,
    )


class Without(Line):
    """The same clients, but for the bad one."""

    def __init__(self) -> None:
        super().__init__(seen=5)
        self.seen = GOOD


def csv_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def check(done: Federated, reason: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The state is the others' alone; the culprit is in the record, the log and both tables."""
    assert same(done.state, run(population=Without()).state)
    for record in done.records[:2]:
        assert record.failures == 1
        assert list(record.reasons) == [BAD]
        assert re.search(reason, record.reasons[BAD]), record.reasons[BAD]
    said = [r.getMessage() for r in caplog.records if f"client {BAD} failed: " in r.getMessage()]
    assert len(said) >= 2
    assert all("\n" not in line and "\x1b" not in line and len(line) < 400 for line in said)
    lines = csv_of(folder / "failures.csv")
    expected = [
        ("learn", str(r.round), c, why) for r in done.records for c, why in r.reasons.items()
    ]
    assert [tuple(line.values()) for line in lines] == expected
    assert [line["failures"] for line in csv_of(folder / "rounds.csv")][:2] == ["1", "1"]


@pytest.mark.parametrize("fault", WIRE_FAULTS)
def test_a_faulty_reply_is_rejected_by_name_and_the_round_goes_on(
    fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, reason = WIRE_FAULTS[fault]
    done = run(grid=lambda node: FaultyGrid(node, spoil), folder=tmp_path)
    check(done, reason, tmp_path, caplog)


@pytest.mark.parametrize("how", CODE_FAULTS)
def test_a_faulty_client_is_rejected_by_name_and_the_round_goes_on(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = run(Toward(rate=0.5, bad=(BAD,), how=how), folder=tmp_path)
    check(done, CODE_FAULTS[how], tmp_path, caplog)


class ThreadedGrid(NodeGrid):
    """Every client answers in a thread of its own; who is late for one question is late for good.

    As on a real engine the call returns at the deadline with what has come, and what comes after it
    is delivered with the replies to the next question.
    """

    def __init__(self, node: ClientNode, release: threading.Event) -> None:
        super().__init__(node)
        self.release = release
        self.late: list[Message] = []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        asked = list(messages)
        if is_query(asked[0]):
            return super().send_and_receive(asked)
        arrived, self.late = self.late, []
        bad = [m for m in asked if m.metadata.dst_node_id == self.id_of(BAD)]
        arrived += super().send_and_receive([m for m in asked if m not in bad])

        def hang() -> None:
            self.release.wait(30)
            self.late.extend(NodeGrid.send_and_receive(self, bad))

        thread = threading.Thread(target=hang)
        thread.start()
        thread.join(0.05)
        self.release.set()  # the deadline is over: now it answers, too late
        thread.join()
        self.release.clear()
        return arrived


def test_a_client_that_hangs_is_left_behind_and_its_late_answer_enters_no_later_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()
    done = run(grid=lambda node: ThreadedGrid(node, release), folder=tmp_path, timeout=0.05)
    check(done, SILENT, tmp_path, caplog)


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf")])
def test_a_deadline_must_be_positive(timeout: float) -> None:
    with pytest.raises(ValueError, match=r"timeout is .*, but must be above 0 seconds, or None"):
        OnFlower(NodeGrid(NODE), timeout=timeout)  # type: ignore[arg-type]


def test_too_few_good_answers_keep_the_state_and_giving_up_is_resumable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"rounds": 6, "min_clients": 5, "give_up": 2}
    faulty: Callable[[ClientNode], NodeGrid] = lambda n: FaultyGrid(n, lost)  # noqa: E731
    with pytest.raises(
        FederationError, match=r"2 rounds in a row .* round 2 \(client c2: left out for some"
    ):
        run(grid=faulty, folder=tmp_path, **settings)
    assert "learn, round 1: 4 good answers are too few, the state stays as it was" in caplog.text
    # The round in which it gave up is in both tables too.
    assert [line["round"] for line in csv_of(tmp_path / "rounds.csv")] == ["1", "2"]
    assert [line["client"] for line in csv_of(tmp_path / "failures.csv")] == [BAD, BAD]
    # Nobody's answer entered: the state is still the start's, and the run goes on from there.
    done = run(folder=tmp_path, resume=True, **settings)
    assert [r.failures for r in done.records] == [1, 1, 0, 0, 0, 0, 0]
    assert same(done.state, run(rounds=4).state)
    assert [line["round"] for line in csv_of(tmp_path / "failures.csv")] == ["1", "2"]


@pytest.mark.parametrize("strategy", get_args(Strategy))
@pytest.mark.parametrize("robust", get_args(Robust))
@pytest.mark.parametrize("left", [0, 1, 2, 4])
def test_no_strategy_raises_when_few_answers_are_left(
    strategy: str, robust: str, left: int
) -> None:
    method = Toward(bad=POPULATION.names[left:], how="nan", rate=0.5)
    options: dict[str, Any] = {"strategy": strategy, "robust": robust, "give_up": 9}
    options["hostile"] = int("krum" in robust)
    fewest = {"none": 1, "krum": 5, "multikrum": 5, "fedtrimmedavg": 5}.get(robust, 3)
    if left < fewest:
        with pytest.raises(FederationError, match="no round brought a new state"):
            run(method, **options)
        return
    done = run(method, **options)
    assert all(t.isfinite().all() for t in done.state.values())
    assert [r.failures for r in done.records] == [5 - left, 5 - left, 0]


def test_answers_that_overflow_together_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FederationError, match="no round brought a new state"):
        run(strategy="fedadam", server_rate=1e300)
    said = "the combined answers overflow in tensor 'half', the state stays as it was"
    assert f"learn, round 1: {said}" in caplog.text
    # What the server optimizer remembers is as before too.
    rounds = Rounds(strategy="fedadam", server_rate=1e30)
    optimizer, state = ServerOptimizer(rounds), {"w": torch.zeros(2)}
    optimizer.step(state, {"w": torch.ones(2)})
    memory = dict(optimizer.memory)
    with pytest.raises(ArithmeticError, match="overflow in tensor 'w'"):
        optimizer.step(state, {"w": torch.full((2,), 1e30)})
    assert same(optimizer.memory, memory)


def test_a_client_whose_data_make_training_diverge_is_named_and_not_averaged() -> None:
    g = torch.Generator().manual_seed(0)

    def client(scale: float) -> ClientData:
        x = torch.randn(24, 1, 8, 8, generator=g)
        y = torch.randint(0, 3, (24,), generator=g)
        x[:4] *= scale
        return ClientData(Examples(x[:16], y[:16]), Examples(x[16:], y[16:]))

    good = {f"good{i}": client(1.0) for i in range(3)}
    everybody = InMemory({**good, "wild": client(1e30)})
    net = models.build("fedl2p.models:small_conv", shape=(1, 8, 8), classes=3, seed=0)
    settings = Settings(finetune=InnerLoop(epochs=1), local=LocalTraining(epochs=1))
    for name in ("fedavg", "fedl2p"):
        method = methods.build(name, settings)
        done, alone = (
            federate(
                method,
                net,
                population,
                rounds=Rounds(rounds=2, keep="last"),
                seed=0,
                stage="learn",
                clients=in_process(net, population, {method.name: method}),
            )
            for population in (everybody, InMemory(good))
        )
        assert [r.failures for r in done.records[:2]] == [1, 1], name
        assert all(list(r.reasons) == ["wild"] for r in done.records[:2])
        reason = done.records[0].reasons["wild"]
        assert "not finite" in reason or "diverge" in reason or "NaN" in reason, reason
        for key, value in alone.state.items():
            torch.testing.assert_close(done.state[key], value, rtol=1e-4, atol=1e-5)


def test_a_node_that_does_not_say_who_it_is_takes_no_part(caplog: pytest.LogCaptureFixture) -> None:
    class Silent(NodeGrid):
        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> list[Message]:
            replies = super().send_and_receive(messages, timeout=timeout)
            if replies[0].has_content() and wire.CONFIG in replies[0].content:
                replies[-1].content = RecordDict({wire.CONFIG: ConfigRecord({"who": "me"})})
            return replies

    clients = OnFlower(Silent(NODE))  # type: ignore[arg-type]
    assert clients.directory.refresh() == ("c0", "c1", "c2", "c3")
    assert "node 31 does not say who it is" in caplog.text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"accuracy": 7.0}, "its accuracy is 7.0"),
        ({"accuracy": float("nan"), "num_test": 3}, "its accuracy is nan"),
        ({"num_test": -1}, "its num_test is -1"),
        ({"num_train": 2**60}, "its num_train is"),
        ({"num_test": float("inf")}, "its answer cannot be read"),
        ({"loss": [1.0]}, "its answer cannot be read"),
    ],
)
def test_an_outcome_that_cannot_be_is_a_failure_of_that_client(
    change: dict[str, Any], reason: str
) -> None:
    def spoil(reply: Message) -> Message:
        numbers = dict(reply.content.metric_records[wire.METRICS])
        return _with_content(reply, RecordDict({wire.METRICS: MetricRecord({**numbers, **change})}))

    method = Toward()
    node = ClientNode(build=model, population=POPULATION, methods={method.name: method})
    outcomes = personalize_all(
        *(method, model(), method.start(model()), POPULATION),
        seed=0,
        clients=OnFlower(FaultyGrid(node, spoil)),  # type: ignore[arg-type]
    )
    assert [o.client for o in outcomes if o.failure is not None] == [BAD]
    assert reason in (outcomes[2].failure or "")


def test_the_median_weight_decides_and_two_clients_cannot_raise_it() -> None:
    assert overweight({}, limit=10) == {}
    assert overweight({"a": 1e9}, limit=10) == {}
    assert list(overweight({"a": 1.0, "b": 11.0}, limit=10)) == ["b"]
    assert overweight({"a": 1.0, "b": 10.0}, limit=10) == {}
    usual = {f"c{i}": float(10 + i) for i in range(9)}
    assert list(overweight({**usual, "x": 1e5, "y": 1e9}, limit=1000)) == ["x", "y"]


def test_objections_know_integers_and_empty_tensors() -> None:
    sent = {"n": torch.tensor(2**62), "none": torch.zeros(0)}
    assert objection(Update("a", sent, weight=1), sent=sent) is None


def test_only_a_single_number_is_too_large_not_many_together() -> None:
    sent = {"a": torch.zeros(1000)}
    many = {"a": torch.full((1000,), 9e17)}
    assert objection(Update("a", many, weight=1), sent=sent) is None
    many["a"][7] = -2e18
    assert "holds 2e+18" in (objection(Update("a", many, weight=1), sent=sent) or "")


def test_a_reason_is_one_printable_line() -> None:
    assert one_line("a\n\tb\x00\x1b[2Jc") == "a b [2Jc"
    assert len(one_line("x" * 10**6)) == 300
