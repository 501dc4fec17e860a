"""Machines of their own, without a network: what run and node configurations say, what nodes write.

The ClientApp answers every message with a fresh process's memory, as under a SuperNode.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.common.config import flatten_dict
from flwr.serverapp import Grid
from safetensors.torch import load_file, save_file

from fedl2p import app, models, recipes
from fedl2p.data.digits import Digits
from fedl2p.data.remote import Remote
from fedl2p.deploy import run_config as runconfig
from fedl2p.deploy.node import Node
from fedl2p.federation.clients.received_models import ReceivedModels
from fedl2p.federation.flower.clients import OnFlower
from fedl2p.runs.validation import to_plain
from fedl2p.study.new_client import personalize_new_client
from support import flower_grid  # noqa: F401

pytest.importorskip("sklearn")

EXAMPLE = Path(__file__).parents[2] / "examples" / "federation" / "app" / "pyproject.toml"
APP_CONFIG: dict[str, Any] = flatten_dict(
    tomllib.loads(EXAMPLE.read_text())["tool"]["flwr"]["app"]["config"]
)
STUDY = APP_CONFIG | {
    "data.shape": "1,8,8",
    "data.classes": 10,
    "pretrain.rounds": 1,
    "learn.rounds": 1,
    "settings.finetune.epochs": 1,
    "settings.finetune.early-stopping": False,  # after one round it may keep the start
    "min-clients": 2,
    "wait": 0,
}


# --- run configurations -----------------------------------------------------------------------


def test_every_key_of_the_examples_app_is_a_key_and_leaves_the_recipe_as_it_is() -> None:
    asked = runconfig.read(APP_CONFIG)
    assert asked.study == recipes.get("federation")
    assert (asked.task, asked.out, asked.clients) == ("study", None, ())
    known = {key for key, _ in runconfig.fields_of(asked.study)}
    own = {"recipe", "fields", *(f.name.replace("_", "-") for f in dataclasses.fields(asked))}
    assert set(APP_CONFIG) <= known | own
    assert own - {"study"} <= set(APP_CONFIG)


def test_keys_of_a_study_are_unique() -> None:
    for name in recipes.names():
        keys = [key for key, _ in runconfig.fields_of(recipes.get(name))]
        assert len(keys) == len(set(keys))
        assert not {"task", "out", "run", "clients", "wait", "timeout", "recipe"} & set(keys)


def test_keys_become_typed_fields() -> None:
    given = {
        "data.shape": "3, 32,32",
        "data.classes": 4,
        "methods": "fedavg,fedl2p",
        "learn.server-rate": 1,
        "settings.meta.nets.hidden": 7,
        "settings.alone-rate": "none",
        "pretrained": "/srv/global.safetensors",
        "clients": "b, a",
        "timeout": 90,
    }
    asked = runconfig.read({"recipe": "federation", **given})
    study = asked.study
    assert study.data == Remote(shape=(3, 32, 32), classes=4)
    assert study.methods == ("fedavg", "fedl2p")
    assert type(study.learn.server_rate) is float
    assert study.settings.meta.nets.hidden == 7
    assert study.settings.alone_rate is None
    assert study.pretrained == Path("/srv/global.safetensors")
    assert (asked.clients, asked.timeout) == (("b", "a"), 90.0)
    folder = runconfig.read({"recipe": "npz", "data.path": "my/clients"}).study.data
    assert folder == dataclasses.replace(recipes.get("npz").data, path=Path("my/clients"))  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"learn.round": 3}, "unknown key 'learn.round' .* perhaps you meant learn.rounds"),
        ({"learn_rounds": 3}, "unknown key 'learn_rounds'"),
        ({"learn.rounds": "three"}, "learn.rounds is 'three', but must be a valid integer"),
        ({"learn.rounds": 2.5}, "learn.rounds is 2.5, but must be a valid integer"),
        ({"learn.rounds": -1}, "rounds is -1"),
        ({"learn.strategy": "fedsgd"}, "learn.strategy is 'fedsgd', but must be 'fedavg', "),
        ({"data.shape": "1,x"}, r"data.shape\[1\] is 'x', but must be a valid integer"),
        ({"data.shape": "1,0"}, "each of its sizes must be 1 or more"),
        ({"data.clients": "a"}, "unknown key 'data.clients'"),
        ({"engine": "ray"}, "unknown key 'engine'"),
        ({"methods": "fedl3p"}, "there is no method 'fedl3p'"),
        ({"resume": "yes"}, "resume is 'yes', but must be a valid boolean"),
        ({"task": "learn"}, "task is 'learn', but must be 'study' or 'personalize'"),
        ({"task": "personalize"}, "run names the finished study"),
        ({"run": "/srv/run"}, "run names the finished study"),
        ({"min-clients": 0}, "min-clients is 0"),
        ({"wait": -1}, "wait is -1"),
        ({"timeout": float("inf")}, "timeout is inf"),
        ({"recipe": "federations"}, "unknown recipe 'federations'"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        runconfig.read(APP_CONFIG | given)
    assert "\n" not in str(caught.value)


# --- node configurations ----------------------------------------------------------------------


def test_a_node_says_which_client_it_is_and_where_its_data_lie(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "one.npz").touch()
    out = str(tmp_path / "out")
    assert Node.of({"partition-id": 0}) is None
    assert Node.of({"data": str(folder), "out": out}) == Node(
        client="one", data=folder / "one.npz", out=Path(out)
    )
    named = Node.of({"data": str(folder / "one.npz"), "client": "me", "out": out, "device": "cpu"})
    assert named == Node(client="me", data=folder / "one.npz", out=Path(out), device="cpu")
    (folder / "two.npz").touch()
    assert Node.of({"data": str(folder), "client": "two", "out": out}) == Node(
        client="two", data=folder / "two.npz", out=Path(out)
    )
    for config, problem in (
        ({"data": str(folder)}, "no folder to write into"),
        ({"data": str(folder), "out": out}, "holds 2 .npz files"),
        ({"data": str(tmp_path / "none"), "out": out}, "neither an .npz file nor a folder"),
    ):
        with pytest.raises(ValueError, match=problem):
            Node.of(config)


def test_a_node_builds_a_model_from_elsewhere_only_if_it_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = ModuleType("theirs")
    theirs.net = models.small_conv  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "theirs", theirs)
    study = runconfig.read(STUDY | {"model": "theirs:net"}).study
    home = {"data": str(tmp_path / "a.npz"), "out": str(tmp_path)}
    for named in ({}, {"model": "others:net"}):
        node = Node.of(home | named)
        assert node is not None
        with pytest.raises(ValueError, match=r"model 'theirs:net', code outside this package"):
            node.client_node(study)
    agreed = Node.of(home | {"model": "theirs:net"})
    assert agreed is not None
    assert agreed.client_node(study).model is not None


# --- nodes that answer, each with a memory that lasts for one message ---------------------------


class Machines(Grid):
    """SuperNodes whose processes end after every answer; only contexts and files last."""

    def __init__(self, homes: dict[str, dict[str, str]], run_config: dict[str, Any]) -> None:
        self.run_config = run_config
        self.replies: list[Message] = []
        self.contexts = {
            node: Context(
                run_id=7,
                node_id=node,
                node_config=dict(home),
                state=RecordDict(),
                run_config=run_config,
            )
            for node, home in enumerate(homes.values(), start=100)
        }

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        return [self._answer(m, self.contexts[m.metadata.dst_node_id]) for m in messages]

    def _answer(self, message: Message, context: Context) -> Message:
        app._resident.cache_clear()
        context.run_config = self.run_config
        self.replies.append(app.client(message, context))
        return self.replies[-1]

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        asked = list(messages)
        for i, message in enumerate(asked):
            message.metadata.__dict__["_message_id"] = f"id-{i}"
        self.arrived = list(self.send_and_receive(asked))
        return [message.metadata.message_id for message in asked]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.arrived


def write_client(
    path: Path, index: int, *, parts: tuple[str, ...] = ("train", "validation", "test")
) -> None:
    population = Digits(seen=4, train=24, validation=12, test=16).open(0)
    data = population.open(population.names[index])
    arrays = {}
    for part in parts:
        examples = getattr(data, part)
        arrays |= {f"x_{part}": examples.x.numpy(), f"y_{part}": examples.y.numpy()}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)  # type: ignore[arg-type]


def home_of(folder: Path, name: str) -> dict[str, str]:
    return {
        "client": name,
        "data": str(folder / name / "data.npz"),
        "out": str(folder / name / "out"),
    }


def serve(machines: Machines, run_config: dict[str, Any]) -> None:
    context = Context(
        run_id=7, node_id=0, node_config={}, state=RecordDict(), run_config=run_config
    )
    machines.run_config = run_config
    app.server(machines, context)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of nodes a and b; b has no validation and no test part."""
    folder = tmp_path_factory.mktemp("machines")
    write_client(folder / "a" / "data.npz", 0)
    write_client(folder / "b" / "data.npz", 1, parts=("train",))
    machines = Machines({n: home_of(folder, n) for n in "ab"}, {})
    serve(machines, STUDY | {"out": str(folder / "run-{run-id}")})
    assert not any(reply.has_error() for reply in machines.replies)
    return folder


def test_a_study_of_machines_gives_a_run_folder_and_a_model_on_each(federation: Path) -> None:
    run = federation / "run-7"
    assert json.loads((run / "results.json").read_text())["engine"] == "flower"
    assert json.loads((run / "config.json").read_text())["data"]["clients"] == ["a", "b"]
    assert (run / "report.html").is_file()
    for name in "ab":
        out = federation / name / "out"
        own = load_file(out / "fedl2p" / "model.safetensors")
        everywhere = load_file(run / "global.safetensors")
        assert own.keys() == everywhere.keys()
        assert any(not torch.equal(own[k], everywhere[k]) for k in own)
        assert (out / "fedl2p" / "hyperparams.json").is_file()
        # Each model came once, though no process remembers: the pre-trained one.
        assert len(list((out / "models").iterdir())) == 1
    assert (federation / "a" / "out" / "fedl2p" / "outcome.json").is_file()
    # Who has no test examples is personalized all the same, and scored nowhere.
    assert not (federation / "b" / "out" / "fedl2p" / "outcome.json").exists()
    lines = (run / "rounds.csv").read_text().splitlines()
    sent = [int(line.split(",")[6]) for line in lines if line.startswith("learn")]
    assert sent[0] - sent[1] > 2 * 14_000 * 4  # the global model, to both, in the first round only


def test_the_wait_for_clients_is_in_the_log_of_the_run(federation: Path) -> None:
    said = (federation / "run-7" / "log.txt").read_text()
    assert "waiting for 2 clients" in said
    assert "2 nodes are online, 2 clients are wanted" in said
    assert said.index("clients: a, b") < said.index("2 of 2 clients personalized")


def test_what_a_killed_process_has_left_is_removed(federation: Path, tmp_path: Path) -> None:
    write_client(tmp_path / "a" / "data.npz", 0)
    left = tmp_path / "a" / "out" / ".received.12345.tmp"
    left.mkdir(parents=True)
    (left / "global.safetensors").write_bytes(b"half")
    machines = Machines({"a": home_of(tmp_path, "a")}, {})
    serve(machines, STUDY | {"min-clients": 1, "pretrain.rounds": 0})
    assert not list((tmp_path / "a" / "out").glob(".received*"))
    assert (tmp_path / "a" / "out" / "received" / "global.safetensors").is_file()


def test_a_shape_that_the_server_claims_is_compared_before_a_model_is_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_client(tmp_path / "a" / "data.npz", 0)

    def made(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was made")

    monkeypatch.setattr("fedl2p.models.build", made)
    machines = Machines({"a": home_of(tmp_path, "a")}, {})
    with pytest.raises(ValueError, match="0 of 1 clients answered"):
        serve(machines, STUDY | {"min-clients": 1, "data.shape": "1,60000,60000"})
    assert "client 'a' has examples of shape (1, 8, 8), the study of (1, 60000, 60000)" in (
        caplog.text
    )


def test_what_a_node_has_received_is_a_run_folder_for_personalize(
    federation: Path, tmp_path: Path
) -> None:
    data = federation / "a" / "data.npz"
    results = [
        personalize_new_client(run, data, tmp_path / str(i))
        for i, run in enumerate((federation / "run-7", federation / "a" / "out" / "received"))
    ]
    states = [result.personalized.model.state_dict() for result in results]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_a_latecomer_personalizes_itself_with_all_its_data(
    federation: Path, tmp_path: Path
) -> None:
    write_client(tmp_path / "c" / "data.npz", 2, parts=("train", "test"))
    homes = {n: home_of(federation, n) for n in "ab"} | {"c": home_of(tmp_path, "c")}
    again = {"task": "personalize", "run": str(federation / "run-7"), "min-clients": 1}
    machines = Machines(homes, {})
    serve(machines, STUDY | again | {"out": str(tmp_path / "late")})
    lines = (tmp_path / "late" / "clients.csv").read_text().splitlines()
    assert [line.split(",")[:5] for line in lines[1:]] == [["fedl2p", "c", "unseen", "24", "16"]]
    received = load_file(tmp_path / "c" / "out" / "received" / "metanets.safetensors")
    learned = load_file(federation / "run-7" / "metanets.safetensors")
    assert all(torch.equal(received[k], learned[k]) for k in learned)
    with pytest.raises(ValueError, match=r"already holds results\.json"):
        serve(machines, STUDY | again | {"out": str(tmp_path / "late")})


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"settings.finetune.epochs": 2}, "differ .*settings.finetune.epochs is 1 and 2"),
        ({"data.classes": 11}, "differ .*data.classes is 10 and 11"),
        ({"recipe": "digits", "data.shape": "", "data.classes": ""}, "brings clients of its own"),
        ({"run": "/nowhere"}, "is missing"),
        ({}, "0 of 1 clients answered within 0 s; 2 nodes are online"),
        ({"clients": "a,z"}, "1 of 2 clients answered within 0 s; z did not"),
    ],
)
def test_a_latecomers_run_that_cannot_be_is_refused(
    federation: Path, given: dict[str, Any], problem: str
) -> None:
    again = {"task": "personalize", "run": str(federation / "run-7"), "min-clients": 1}
    machines = Machines({n: home_of(federation, n) for n in "ab"}, {})
    with pytest.raises(ValueError, match=problem):
        serve(machines, STUDY | again | given)


def test_too_few_clients_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    write_client(tmp_path / "a" / "data.npz", 0)
    machines = Machines({"a": home_of(tmp_path, "a")}, {})
    with pytest.raises(ValueError, match="1 nodes are online: start the others"):
        serve(machines, STUDY | {"out": str(tmp_path / "run")})
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["log.txt"]


def test_a_node_with_an_unusable_file_is_left_out_and_its_content_stays_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_client(tmp_path / "a" / "data.npz", 0)
    (tmp_path / "b").mkdir()
    x, y = np.zeros((4, 1, 8, 8), np.float32), np.array([0, 1, 2, 99])
    np.savez(tmp_path / "b" / "data.npz", x_train=x, y_train=y)
    machines = Machines({n: home_of(tmp_path, n) for n in "ab"}, {})
    few = STUDY | {"out": str(tmp_path / "run"), "pretrain.rounds": 0, "min-clients": 1}
    serve(machines, few)
    why = "node 101 (b) is left out: ValueError: the node's data file cannot be used"
    assert why in caplog.text
    sent = [str(r.content) if r.has_content() else r.error.reason for r in machines.replies]
    assert not any(("99" in text and "label" in text) or str(tmp_path) in text for text in sent)
    assert "label 99" in (tmp_path / "b" / "out" / "log.txt").read_text()
    assert (tmp_path / "a" / "out" / "fedl2p" / "model.safetensors").is_file()
    assert not (tmp_path / "b" / "out" / "fedl2p").exists()
    # A node says what it does, and what it writes is its owner's alone.
    log = (tmp_path / "a" / "out" / "log.txt").read_text()
    assert "train.fedl2p for a" in log
    assert "evaluate.fedl2p_personalize: answered" in log
    written = [f for f in (tmp_path / "a" / "out").rglob("*") if f.is_file()]
    assert written
    assert all(f.stat().st_mode & 0o077 == 0 for f in written)


def test_nothing_of_the_data_or_the_personal_model_travels(federation: Path) -> None:
    """Every reply of a study: its tensors are the state's, its numbers the ones that are named."""
    machines = Machines({n: home_of(federation, n) for n in "ab"}, {})
    serve(machines, STUDY)
    personal = load_file(federation / "a" / "out" / "fedl2p" / "model.safetensors")
    weights = personal["conv2.weight"].numpy().tobytes()
    metrics, tensors = set(), set()
    for reply in machines.replies:
        for key, record in reply.content.items():
            if key == "metrics":
                metrics |= set(record)
            elif key == "arrays":
                names = set(record)
                tensors |= names
                assert names <= set(personal) or not names & set(personal)
                assert all(weights not in array.data for array in record.values())
            else:
                assert key == "config", key
                assert set(record) <= {"client", "models", "version"}
    assert metrics == {
        *("num-examples", "loss", "accuracy", "num_train", "num_test"),
        *("accuracy_before", "loss_before", "seconds"),
    }
    assert not any("profile" in name for name in tensors)


def test_a_study_of_machines_does_not_run_without_them() -> None:
    study = runconfig.read(STUDY).study
    with pytest.raises(ValueError, match="on remote nodes; start such a study by"):
        study.data.open(0)
    with pytest.raises(ValueError, match="shape of an example and the number of classes"):
        Remote().open(0)
    known = dataclasses.replace(study.data, clients=("a",))  # type: ignore[type-var]
    with pytest.raises(ValueError, match="on its node"):
        known.open(0).open("a")
    assert to_plain(known)["clients"] == ["a"]


# --- models on disk ---------------------------------------------------------------------------


def test_models_outlive_the_process_and_damaged_ones_are_asked_for_again(tmp_path: Path) -> None:
    weights = [{"w": torch.full((3,), float(i)), "n": torch.tensor(i)} for i in range(6)]
    keys = [ReceivedModels(tmp_path).add(w) for w in weights]
    again = ReceivedModels(tmp_path)
    assert set(again) == set(keys[-4:])  # the newest four
    loaded = again.get(keys[-1])
    assert loaded is not None
    assert all(torch.equal(loaded[k], v) for k, v in weights[-1].items())
    assert again.get(keys[0]) is None
    other = tmp_path / f"{keys[-2]}.safetensors"
    save_file(weights[0], other)
    assert again.get(keys[-2]) is None
    assert not other.exists()
    (tmp_path / f"{keys[-3]}.safetensors").write_bytes(b"torn")
    assert again.get(keys[-3]) is None
    assert list(ReceivedModels(tmp_path)) == [keys[-4], keys[-1]]


def test_a_model_cannot_be_asked_for_by_a_path(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "secret.safetensors")
    store = ReceivedModels(tmp_path / "models")
    for key in ("../secret", str(tmp_path / "secret"), "", "a" * 31):
        assert store.get(key) is None


@pytest.mark.slow
def test_nodes_are_waited_for(tmp_path: Path) -> None:
    """One question to each while nothing changes, not one a second."""
    write_client(tmp_path / "a" / "data.npz", 0)
    machines = Machines({"a": home_of(tmp_path, "a")}, STUDY)
    asked = dataclasses.replace(runconfig.read(STUDY), clients=("a", "b"), wait=2.5)
    from fedl2p.deploy.server import gather

    with pytest.raises(ValueError, match="0 of 2"):
        gather(OnFlower(machines), asked)
    assert machines.replies == []  # too few are online to ask
    one = dataclasses.replace(asked, clients=("z",))
    with pytest.raises(ValueError, match=r"0 of 1 clients answered within 2\.5 s; z did not"):
        gather(OnFlower(machines), one)
    assert len(machines.replies) == 1
