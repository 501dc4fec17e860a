"""Real federations on the loopback address: TLS, registered SuperNodes, processes that are killed.

Everything that runs here is started and stopped by its id, below a temporary folder and on free
ports, so that several of these can run side by side.
"""

from __future__ import annotations

import contextlib
import csv
import json
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedl2p import models

pytest.importorskip("flwr")
pytest.importorskip("sklearn")

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "federation"
SHAPE, CLASSES = (1, 8, 8), 10


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A global model that somebody has trained elsewhere."""
    path = tmp_path_factory.mktemp("given") / "global.safetensors"
    model = models.build("fedl2p.models:small_conv", shape=SHAPE, classes=CLASSES, seed=17)
    save_file(model.state_dict(), path)
    return path


def processes_of(folder: Path) -> list[str]:
    """Command lines of living processes that have something to do with a folder."""
    listed = subprocess.run(
        ["ps", "-A", "-ww", "-o", "stat=,args="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [line for line in listed if str(folder) in line and not line.startswith("Z")]


def rounds_in(folder: Path) -> list[dict[str, str]]:
    with (folder / "rounds.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def rows_in(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "clients.csv").open(newline="") as file:
        return {row["client"]: row for row in csv.DictReader(file)}


# --- the example, as its reader runs it -------------------------------------------------------


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory, given: Path) -> Path:
    """The folder that the example's script has filled."""
    folder = tmp_path_factory.mktemp("example") / "federation"
    done = subprocess.run(
        [sys.executable, EXAMPLE / "run.py", folder, "--pretrained", given, "--learn-rounds", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert processes_of(folder) == []
    return folder


def test_the_script_learns_and_every_node_has_its_own_model(example: Path, given: Path) -> None:
    study = example / "server" / "study"
    # one round, and the pass that judges its result; the model travels to each node once
    learn = rounds_in(study)
    assert [(r["stage"], r["round"], r["clients"], r["failures"]) for r in learn] == [
        ("learn", "1", "3", "0"),
        ("learn", "2", "3", "0"),
    ]
    size = given.stat().st_size
    assert int(learn[0]["bytes_down"]) - int(learn[1]["bytes_down"]) > 2.5 * size
    everywhere = load_file(given)
    assert all(
        torch.equal(v, everywhere[k]) for k, v in load_file(study / "global.safetensors").items()
    )
    own = {}
    for name in ("hospital-a", "hospital-b", "hospital-c"):
        out = example / "nodes" / name / "out" / "fedl2p"
        own[name] = load_file(out / "model.safetensors")
        model = models.load("fedl2p.models:small_conv", shape=SHAPE, classes=CLASSES)
        model.load_state_dict(own[name])  # plain names, plain layers
        assert any(not torch.equal(v, everywhere[k]) for k, v in own[name].items())
        outcome = json.loads((out / "outcome.json").read_text())
        assert float(rows_in(study)[name]["accuracy"]) == outcome["accuracy"]
        assert set(json.loads((out / "hyperparams.json").read_text())) >= {"mix", "rate"}
    assert not torch.equal(own["hospital-a"]["head.bias"], own["hospital-b"]["head.bias"])


def test_no_personal_model_or_data_is_on_the_servers_side(example: Path) -> None:
    server = example / "server"
    assert {f.name for f in server.rglob("*.safetensors")} <= {
        "global.safetensors",
        "metanets.safetensors",
        *(f"round-{i:06d}.safetensors" for i in (1, 2)),
    }
    personal = [
        load_file(f)["head.bias"].numpy().tobytes()
        for f in (example / "nodes").rglob("out/fedl2p/model.safetensors")
    ]
    assert len(personal) == 4
    # Nor in what Flower keeps: its logs and its home.
    for place in (server, example / "flower", example / "logs"):
        for file in filter(Path.is_file, place.rglob("*")):
            content = file.read_bytes()
            assert not any(weights in content for weights in personal), file


def test_a_latecomer_is_sent_the_metanets_and_personalizes_itself(example: Path) -> None:
    assert set(rows_in(example / "server" / "latecomer")) == {"hospital-d"}
    home = example / "nodes" / "hospital-d"
    assert (home / "out" / "fedl2p" / "model.safetensors").is_file()
    learned = load_file(example / "server" / "study" / "metanets.safetensors")
    received = load_file(home / "out" / "received" / "metanets.safetensors")
    assert learned.keys() == received.keys()
    assert all(torch.equal(learned[k], received[k]) for k in learned)
    # fedl2p personalize on the node, from what it has received, without anybody else
    assert json.loads((home / "again" / "outcome.json").read_text())["num_test"] == 48
    assert (home / "again" / "model.safetensors").is_file()


def test_secrets_are_their_owners_alone(example: Path) -> None:
    keys = sorted((example / "certs").glob("*.key"))
    assert len(keys) == 5  # the SuperLink and four nodes
    assert all(key.stat().st_mode & 0o077 == 0 for key in keys)


# --- an intruder, and a node that dies --------------------------------------------------------


@pytest.fixture(scope="module")
def stricken(tmp_path_factory: pytest.TempPathFactory, given: Path) -> Iterator[dict[str, Any]]:
    """A run that an unregistered SuperNode wants to join, and whose client c is killed."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        import run as script
        from machines import Machines
    finally:
        sys.path.remove(str(EXAMPLE))
    folder = tmp_path_factory.mktemp("stricken") / "federation"
    victim = script.CLIENTS[-1]
    with Machines(folder) as machines:
        script.make_data(folder, seed=3)
        machines.start_superlink()
        for name in script.CLIENTS:
            script.join(machines, name)
        home = folder / "nodes" / "hospital-d"
        unknown = {"client": "hospital-d", "data": home / "data", "out": home / "out"}
        machines.start_supernode("hospital-d", unknown)  # never registered
        run = machines.submit(
            {
                "data.shape": "1,8,8",
                "data.classes": 10,
                "min-clients": 3,
                "pretrained": str(given),
                "learn.rounds": 1,
                "timeout": 0,  # Flower itself gives the victim up, however slow the others are
                "out": str(folder / "server"),
            }
        )
        deadline = time.monotonic() + 400
        while "Receiving: train" not in machines.log(victim):
            assert time.monotonic() < deadline, machines.log("superlink")
            time.sleep(0.1)
        machines.kill(victim)
        yield {
            "folder": folder,
            "machines": machines,
            "victim": victim,
            "status": machines.follow(run, seconds=500),
        }
    assert processes_of(folder) == []


def test_a_run_survives_a_node_that_is_killed_in_a_round(stricken: dict[str, Any]) -> None:
    victim, server = stricken["victim"], stricken["folder"] / "server"
    assert stricken["status"] == "finished:completed"
    assert stricken["machines"].processes[victim].returncode == -9
    assert "Sending: train" not in stricken["machines"].log(victim)
    first = rounds_in(server)[0]
    assert (first["stage"], first["clients"]) == ("learn", "3")
    assert int(first["failures"]) >= 1
    said = f"learn, round 1: client {victim} failed: Error: Node Unavailable"
    assert said in (server / "log.txt").read_text()
    # The others ended well, with numbers and a model each.
    assert (server / "results.json").is_file()
    assert (server / "metanets.safetensors").is_file()
    assert rows_in(server).keys() == {"hospital-a", "hospital-b"}, "a failed client has no line"
    for name in ("hospital-a", "hospital-b", victim):
        model = stricken["folder"] / "nodes" / name / "out" / "fedl2p" / "model.safetensors"
        assert model.is_file() == (name != victim)


def test_an_unregistered_node_is_refused(stricken: dict[str, Any]) -> None:
    machines, folder = stricken["machines"], stricken["folder"]
    said = machines.log("hospital-d")
    assert machines.processes["hospital-d"].wait(timeout=300) != 0, said
    assert "SuperNode ID" not in said
    assert "Receiving" not in said
    # It took no part, and nothing was written for it.
    assert "hospital-d" not in rows_in(folder / "server")
    assert not (folder / "nodes" / "hospital-d" / "out").exists()
    listed = machines.flwr("supernode", "list", "here", "--format", "json")
    assert len(json.loads(listed[listed.index("{") :])["nodes"]) == 3


def test_the_superlink_speaks_to_nobody_without_encryption(stricken: dict[str, Any]) -> None:
    machines = stricken["machines"]
    where = ("127.0.0.1", machines.port)
    with socket.create_connection(where, timeout=60) as plain:
        plain.sendall(b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            answer = plain.recv(4096)
    assert not answer.startswith(b"HTTP")
    # Whoever trusts the federation's authority is served, and whoever trusts others only is not.
    for trusted in (True, False):
        context = ssl.create_default_context(cafile=machines.certs / "ca.crt" if trusted else None)
        with socket.create_connection(where, timeout=60) as raw:
            if trusted:
                with context.wrap_socket(raw, server_hostname="127.0.0.1") as secured:
                    assert secured.version() in ("TLSv1.2", "TLSv1.3")
            else:
                with pytest.raises(ssl.SSLCertVerificationError):
                    context.wrap_socket(raw, server_hostname="127.0.0.1")
