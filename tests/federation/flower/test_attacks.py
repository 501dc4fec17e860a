"""Hostile nodes: many names, foreign names, vast replies, silence; what a node's replies say."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.proto.node_pb2 import NodeInfo

from fedl2p.federation.clients.node import ClientNode
from fedl2p.federation.flower import client_app
from fedl2p.federation.flower import records as wire
from fedl2p.federation.flower.client_app import answer, without_paths
from fedl2p.federation.flower.client_directory import read_keys
from fedl2p.federation.flower.clients import OnFlower
from fedl2p.federation.flower.waiting import send_and_receive
from fedl2p.federation.messages import FrozenModel, Question
from fedl2p.federation.rounds import federate
from fedl2p.federation.settings import Rounds
from support.federation_toys import Line, Toward, model
from support.flower_grid import NodeGrid, is_query

POPULATION = Line(seen=4)
METHOD = Toward(rate=0.5)
BAD = "c3"


def node(population: Line = POPULATION) -> ClientNode:
    return ClientNode(build=model, population=population, methods={METHOD.name: METHOD})


class Lying(NodeGrid):
    """Says of its last node what it is told to."""

    said: dict[str, Any]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        replies = super().send_and_receive(messages)
        for reply in replies:
            if reply.metadata.src_node_id == max(self.contexts) and wire.CONFIG in reply.content:
                reply.content[wire.CONFIG].update(self.said)
                if "clients" in self.said:
                    del reply.content[wire.CONFIG]["client"]
        return replies


def directory_after(said: dict[str, Any], **options: Any) -> tuple[str, ...]:
    grid = Lying(node())
    grid.said = said
    return OnFlower(grid, timeout=0.2, **options).directory.refresh()  # type: ignore[arg-type]


SYBILS = {"clients": [f"sybil-{i}" for i in range(20)]}


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (SYBILS, "node 24 (20 clients) is left out: it says that it is several clients"),
        ({"client": "c9\nroot"}, "is not one line of printable text"),
        ({"client": "\x1b[2J"}, "is not one line of printable text"),
        ({"client": "x" * 100_000}, "is too long for a file of it"),
        ({"client": ""}, "is not one line of printable text"),
        ({"client": '=HYPERLINK("http://x")'}, "which a spreadsheet takes for a formula"),
        ({"version": "0.0.1"}, "(c3) is left out: it runs fedl2p 0.0.1, the server "),
        ({"fault": "its data have\nshape (3,)"}, "(c3) is left out: its data have shape (3,)"),
        ({"settings": "other"}, "its settings are not those of the server"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_node_that_cannot_be_used_is_left_out_at_the_door(
    said: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert directory_after(said) == ("c0", "c1", "c2")
    assert reason in caplog.text
    assert "\x1b" not in caplog.text
    assert max(len(r.getMessage()) for r in caplog.records) < 500


def test_a_simulation_may_have_several_clients_on_a_node() -> None:
    assert len(directory_after(SYBILS, simulation=True)) == 23


class Keyed(NodeGrid):
    """A SuperLink that knows its nodes by their public keys."""

    keys: dict[int, ec.EllipticCurvePrivateKey]

    def get_nodes(self) -> list[NodeInfo]:
        form = (Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return [
            NodeInfo(node_id=i, public_key=key.public_key().public_bytes(*form))
            for i, key in self.keys.items()
        ]


def test_a_pinned_client_is_believed_on_the_node_with_its_key_only(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    grid = Keyed(node())
    grid.keys = {i: ec.generate_private_key(ec.SECP384R1()) for i in grid.contexts}
    for client in ("c0", "c1", "c2"):
        public = grid.keys[grid.id_of(client)].public_key()
        text = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        (tmp_path / f"{client}.pub").write_bytes(text + b" somebody\n")
    # c3 is in nobody's table, and the node of c2 is another one now.
    grid.keys[grid.id_of("c2")] = ec.generate_private_key(ec.SECP384R1())
    clients = OnFlower(grid, keys=read_keys(tmp_path))  # type: ignore[arg-type]
    assert clients.directory.refresh() == ("c0", "c1")
    assert "it has not the key of client 'c2'" in caplog.text
    assert "it has not the key of client 'c3'" in caplog.text


@pytest.mark.parametrize("content", [None, "ssh-rsa nonsense", "\x00"])
def test_a_table_of_keys_that_cannot_be_read_is_refused(tmp_path: Any, content: str | None) -> None:
    if content is not None:
        (tmp_path / "a.pub").write_text(content)
    with pytest.raises(ValueError, match=r"holds no CLIENT.pub file|is no public key"):
        read_keys(tmp_path)


# --- replies ------------------------------------------------------------------------------------


def question(action: Any = "train") -> Question:
    state = METHOD.start(model())
    return Question(
        action=action,
        method=METHOD.name,
        stage="learn",
        round=1,
        state=state,
        model=FrozenModel.of(model()),
        seeds={BAD: 1},
    )


def reply_of(**changes: Array | None) -> RecordDict:
    arrays = dict(wire.encode_state(question().state)) | changes
    kept = {name: array for name, array in arrays.items() if array is not None}
    numbers: Any = {"num-examples": 4.0, "loss": 1.0}
    return RecordDict({wire.ARRAYS: ArrayRecord(kept), wire.METRICS: MetricRecord(numbers)})


MANY = MetricRecord({f"m{i}": 1 for i in range(999)})
VAST = Array("float64", (1 << 20,), "numpy.ndarray", b"\0" * 100)
LONG = Array("float64", (2,), "numpy.ndarray", b"\0" * (8 << 20))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (reply_of(more=VAST), "tensor 'more' was not asked for (1 in all)"),
        (reply_of(**{f"t{i}": VAST for i in range(2000)}), "was not asked for (2000 in all)"),
        (reply_of(point=VAST), "tensor 'point' has shape (1048576,), wanted (2,)"),
        (reply_of(point=LONG), "tensor 'point' has 8388608 bytes, more than it can need"),
        (reply_of(point=None), "tensor 'point' is missing"),
        (
            RecordDict({**reply_of(), "extra": ArrayRecord({"x": VAST})}),
            "record 'extra' was not asked for",
        ),
        (
            RecordDict({**reply_of(), wire.METRICS: MANY}),
            "its metrics hold 999 values, wanted at most 64",
        ),
    ],
)
def test_a_reply_that_was_not_asked_for_is_refused_before_it_is_decoded(
    content: RecordDict, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoded(self: Array) -> np.ndarray[Any, Any]:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(Array, "numpy", decoded)
    given = wire.decode_answer(question(), BAD, content)
    assert given.failure is not None
    assert reason in given.failure
    for action in ("validate", "personalize"):
        assert "was not asked for" in str(
            wire.decode_answer(question(action), BAD, content).failure
        )


def test_what_was_asked_for_is_decoded() -> None:
    update = wire.decode_answer(question(), BAD, reply_of()).update
    assert update is not None
    assert all(torch.equal(v, update.shared[k]) for k, v in question().state.items())


# --- silence ------------------------------------------------------------------------------------


class Silent(NodeGrid):
    """One client never answers."""

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        replies = super().send_and_receive(messages)
        bad = self.id_of(BAD)
        return [r for r in replies if is_query(r) or r.metadata.src_node_id != bad]


def test_a_silent_client_costs_a_grace_time_and_is_left_out_for_some_rounds() -> None:
    grid = Silent(node())
    clients = OnFlower(grid, timeout=300, grace=0.1)  # type: ignore[arg-type]
    began = time.monotonic()
    done = federate(
        METHOD,
        model(),
        POPULATION,
        rounds=Rounds(rounds=8, keep="last"),
        seed=0,
        stage="learn",
        clients=clients,
    )
    assert time.monotonic() - began < 10
    assert all(list(r.reasons) == [BAD] for r in done.records)
    silent = [r.round for r in done.records if r.reasons[BAD] == "no answer in time"]
    assert silent == [1, 3, 6], "asked again after one round, then after two, then four"
    sent = [m.metadata.dst_node_id for m in grid.sent if not is_query(m)]
    assert sent.count(grid.id_of(BAD)) == 3
    assert sent.count(grid.id_of("c0")) == 9


def test_who_answers_again_is_one_of_all_again() -> None:
    grid = Silent(node())
    clients = OnFlower(grid, timeout=0.2)  # type: ignore[arg-type]
    federate(
        METHOD,
        model(),
        POPULATION,
        rounds=Rounds(rounds=1, keep="last"),
        seed=0,
        stage="learn",
        clients=clients,
    )
    grid.__class__ = NodeGrid
    for _ in range(3):
        answers = {a.client: a.failure for a in clients.ask(everybody())}
    assert answers == dict.fromkeys(POPULATION.names)


def everybody() -> Question:
    asked = question()
    return Question(**{**vars(asked), "seeds": dict.fromkeys(POPULATION.names, 1)})


def test_the_slow_have_as_long_again_as_half_of_the_others() -> None:
    class Slow(NodeGrid):
        """Node i answers after i tenths of a second."""

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            ids = list(super().push_messages(messages))
            self.due = [(time.monotonic() + 0.1 * i, r) for i, r in enumerate(self._arrived, 1)]
            return ids

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            now = time.monotonic()
            come = [reply for due, reply in self.due if due <= now]
            self.due = [(due, reply) for due, reply in self.due if due > now]
            return come

    grid = Slow(node())
    asked = [Message(RecordDict(), i, wire.QUERY) for i in grid.contexts]
    assert len(list(send_and_receive(grid, asked, timeout=9, grace=0.01))) == 4  # type: ignore[arg-type]


# --- what a node's replies say ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("No such file: '/srv/ward 7/a.npz'", "No such file: '<path>'"),
        ("cannot open /srv/secret/a.npz: denied", "cannot open <path>: denied"),
        (r"cannot open C:\data\a.npz", "cannot open <path>"),
        ("~/data is gone", "<path> is gone"),
        ("3/4 of 10 and x/y stay", "3/4 of 10 and x/y stay"),
    ],
)
def test_no_path_leaves_a_node(text: str, left: str) -> None:
    assert without_paths(text) == left


def test_a_full_disk_is_said_and_not_where(caplog: pytest.LogCaptureFixture) -> None:
    class Full(Line):
        def open(self, name: str) -> Any:
            raise OSError(28, "No space left on device", "/srv/secret/models/x.safetensors")

    where = node(Full(seen=4))
    config = ConfigRecord({"method": METHOD.name, "stage": "learn", "round": 1, "seed": 1})
    config["model"] = where.initial
    content = RecordDict({wire.ARRAYS: wire.encode_state(question().state), wire.CONFIG: config})
    context = Context(
        run_id=1, node_id=1, node_config={"client": "c0"}, state=RecordDict(), run_config={}
    )
    reply = answer(where, Message(content, 1, wire.MESSAGE_TYPES["train"]), context)
    assert reply.error.reason == "OSError: its disk is full; its log says more"
    assert "/srv/secret" in caplog.text, "the node's own log has it"


def test_the_node_s_own_log_keeps_the_path(caplog: pytest.LogCaptureFixture) -> None:
    left = client_app._failed("PermissionError: [Errno 13] denied: '/srv/ward 7/a.npz'")
    assert left.reason == "PermissionError: [Errno 13] denied: '<path>'"
    assert "/srv/ward 7/a.npz" in caplog.text
