"""Ray's workers give the bits of this process, keep what they made, and leave nothing behind."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedl2p import recipes
from fedl2p.core.functional.precision import with_compute
from fedl2p.core.settings import Compute, InnerLoop
from fedl2p.federation.clients.in_process import InProcess
from fedl2p.federation.clients.node import ClientNode
from fedl2p.federation.clients.ray import OnRay, pack, unpack
from fedl2p.federation.flower.encoded import Encoded
from fedl2p.federation.listeners import Listener
from fedl2p.federation.messages import DTYPES, Clients, FederationError
from fedl2p.federation.progress import load_newest
from fedl2p.federation.rounds import federate
from fedl2p.federation.settings import Ray, Rounds
from fedl2p.method import Client, State, Update
from fedl2p.runs.tensors import load_tensors
from fedl2p.study import engines
from fedl2p.study.run import run_study
from fedl2p.study.settings import Study
from support.federation_toys import Line, Toward, model, same
from support.leftovers import marked, wait_until_gone

pytest.importorskip("sklearn")

HALF = Ray(cpus_per_worker=0.5, workers=2)


# --- toys on workers --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Harming(Toward):
    """In one round, one client does harm to the worker that it is on."""

    round: int = 2
    culprit: str = "c1"

    def train(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        if any(c.name == self.culprit and c.round == self.round for c in clients):
            os._exit(3)
        return super().train(model, state, clients)


def make_node(
    population: Line, methods: Sequence[Toward], stack_size: int = 1, made: Path | None = None
) -> ClientNode:
    if made is not None:
        with made.open("a") as file:
            file.write(f"{os.getpid()}\n")
    return ClientNode(
        build=lambda: with_compute(model(), Compute(stack_size=stack_size)),
        population=population,
        methods={m.name: m for m in methods},
    )


def test_a_state_travels_with_its_dtypes_its_order_and_no_others_memory() -> None:
    stack = torch.arange(1000.0).reshape(100, 10)
    state = {
        "z": stack[3],
        "turned": stack.t(),
        "number": torch.tensor(2.5),
        "none": torch.zeros(0, 4),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        **{name: torch.tensor([[1, 0], [1, 1]]).to(dtype) for name, dtype in DTYPES.items()},
    }
    sent = pickle.dumps(pack(state), protocol=5)
    assert len(sent) < 2 * stack.nbytes
    come = unpack(pickle.loads(sent))
    assert list(come) == list(state)
    for name, tensor in state.items():
        assert come[name].dtype == tensor.dtype
        assert torch.equal(come[name], tensor)
        come[name].zero_()
    assert stack[3, 3] == 33


@pytest.fixture(scope="module")
def ray_runs() -> Iterator[None]:
    """Keep Ray running between the tests of this file: starting it takes seconds."""
    make = functools.partial(make_node, Line(), [Toward()])
    first = OnRay(make, Line().names, resources=Ray(cpus_per_worker=0.001, workers=1))
    go(Toward(), model(), Line(), first, rounds=1)
    yield
    first.close()


@pytest.fixture
def on_ray(ray_runs: None) -> Iterator[Any]:
    """Return a function that puts clients on workers; these are stopped after the test."""
    opened: list[OnRay] = []

    def make(
        population: Line, *methods: Toward, stack_size: int = 1, made: Path | None = None
    ) -> OnRay:
        factory = functools.partial(make_node, population, methods, stack_size, made)
        opened.append(OnRay(factory, population.names, stack_size=stack_size, resources=HALF))
        return opened[-1]

    yield make
    for clients in opened:
        clients.close()


@pytest.mark.slow
def test_workers_that_wait_for_others_processors_are_an_error(
    ray_runs: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker of another job holds a part of a processor, so all of them are not to be had."""
    monkeypatch.setattr("fedl2p.federation.clients.ray._SAY_AFTER", 0.5)
    monkeypatch.setattr("fedl2p.federation.clients.ray._GIVE_UP_AFTER", 1.0)
    make = functools.partial(make_node, Line(), [Toward()])
    clients = OnRay(make, Line().names)
    with pytest.raises(FederationError, match=r"workers have started.*set fewer ray\.workers"):
        go(Toward(), model(), Line(), clients, rounds=1)
    assert "free are" in caplog.text
    clients.close()


def in_this_process(population: Line, *methods: Toward) -> InProcess:
    return InProcess(make_node(population, methods))


def go(method: Toward, of: nn.Module, population: Line, clients: Clients, **rounds: Any) -> Any:
    settings = Rounds(**{"rounds": 3, **rounds})
    return federate(method, of, population, rounds=settings, seed=0, stage="learn", clients=clients)


def timeless(records: Sequence[Any]) -> list[Any]:
    return [dataclasses.replace(record, seconds=0.0) for record in records]


@pytest.mark.slow
def test_rounds_and_what_clients_keep_are_those_of_the_process(on_ray: Any, tmp_path: Path) -> None:
    population, method = Line(seen=7), Toward(noise=0.5, use_kept=True)
    made = tmp_path / "made"
    there = on_ray(population, method, stack_size=2, made=made)
    here = in_this_process(population, method)
    a, b = (go(method, model(1), population, c, clients_per_round=5) for c in (there, here))
    assert same(a.state, b.state)
    assert timeless(a.records) == timeless(b.records), "bytes of the model's one journey included"
    kept = there.kept(method.name)
    assert kept.keys() == here.kept(method.name).keys() != set()
    assert all(same(kept[name], here.kept(method.name)[name]) for name in kept)
    again = go(method, model(1), population, there)
    assert again.records[0].bytes_model < b.records[0].bytes_model, "it had gone to most of them"
    workers = made.read_text().split()
    assert len(workers) == len(set(workers)) == 2, "each worker is made once and keeps its node"
    assert str(os.getpid()) not in workers


@pytest.mark.slow
def test_a_worker_that_dies_fails_its_clients_and_is_replaced(
    on_ray: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    population, method = Line(seen=4), Harming()
    made = tmp_path / "made"
    clients = on_ray(population, method, stack_size=2, made=made)
    done = go(method, model(1), population, clients, keep="last")
    assert [r.failures for r in done.records] == [0, 2, 0, 0]
    assert "client c0 failed: its worker died" in caplog.text
    assert "client c1 failed: its worker died" in caplog.text
    assert "client c2 failed" not in caplog.text
    torch.testing.assert_close(done.state["point"], population.weighted_mean(population.seen))
    assert len(made.read_text().split()) == 4, "two, and again after each of two deaths"


@pytest.mark.slow
def test_a_worker_that_cannot_start_ends_the_run(ray_runs: None) -> None:
    factory = functools.partial(make_node, Line(), [], 1, Path("/no/such/folder/made"))
    clients = OnRay(factory, Line().names, resources=Ray(cpus_per_worker=0.5, workers=1))
    with pytest.raises(FederationError, match=r"cannot start: .*No such file or directory"):
        go(Toward(), model(), Line(), clients)
    clients.close()


# --- a study ----------------------------------------------------------------------------------


def small(**changes: Any) -> Study:
    """Every kind of method in seconds: with rounds, with something kept, with none."""
    study = recipes.get("smoke")
    return dataclasses.replace(
        study,
        methods=("finetuning-client", "bestfixed", "l2p", "fedl2p"),
        pretrain=dataclasses.replace(study.pretrain, rounds=2),
        learn=dataclasses.replace(study.learn, rounds=2),
        settings=dataclasses.replace(
            study.settings, finetune=InnerLoop(epochs=1, batch_size=16), alone_steps=1
        ),
        compute=Compute(stack_size=3),
        **changes,
    )


def assert_same_run(a: Path, b: Path) -> None:
    """Compare two run folders: everything but seconds and the engine, tensors bit for bit."""
    results = [json.loads((run / "results.json").read_text()) for run in (a, b)]
    for told in results:
        told.pop("seconds")
        told.pop("engine")
        for method in (*told["methods"], *told["kinds"]):
            method.pop("seconds_per_client")
    assert results[0] == results[1]
    for name in ("clients.csv", "rounds.csv"):
        tables = [list(csv.DictReader((run / name).open())) for run in (a, b)]
        for row in (*tables[0], *tables[1]):
            row.pop("seconds")
        assert tables[0] == tables[1], name
        assert tables[0]
    for name in ("global.safetensors", "metanets.safetensors"):
        assert same(load_tensors(a / name), load_tensors(b / name)), name
    stages = sorted(p.name for p in (a / "checkpoint").iterdir() if p.name != "outcomes")
    assert len(stages) == 3
    for stage in stages:
        one, two = (load_newest(run / "checkpoint" / stage) for run in (a, b))
        assert one is not None
        assert two is not None
        assert one.groups.keys() == two.groups.keys()
        assert all(same(one.groups[g], two.groups[g]) for g in one.groups), stage
        assert one.values["clients"] == two.values["clients"]
    files = [
        sorted(p.relative_to(run) for p in (run / "clients").rglob("*.json")) for run in (a, b)
    ]
    assert files[0] == files[1] != []
    assert all((a / f).read_bytes() == (b / f).read_bytes() for f in files[0])


@pytest.fixture(scope="module")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engines") / "in-process"
    run_study(small(), out)
    return out


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


class StopIn(Listener):
    def __init__(self, stage: str) -> None:
        self.stage = stage

    def on_start(self, stage: str, rounds: int, done: Any) -> None: ...

    def on_round(self, record: Any) -> None:
        if record.stage == self.stage:
            raise Interrupted

    def on_end(self, stage: str) -> None: ...


@pytest.mark.slow
def test_a_study_interrupted_and_resumed_under_ray_equals_one_in_process(
    ray_runs: None, in_process: Path, tmp_path: Path
) -> None:
    study = small(engine="ray", ray=HALF)
    with pytest.raises(Interrupted):
        run_study(study, tmp_path / "ray", listeners=[StopIn("learn")])
    run_study(study, tmp_path / "ray", resume=True)
    assert json.loads((tmp_path / "ray" / "results.json").read_text())["engine"] == "ray"
    assert_same_run(in_process, tmp_path / "ray")


def interruptible() -> None:
    """A shell's background job ignores Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_the_command_is_quiet_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """Once interrupted like by Ctrl-C, once to the end: one line on stderr, then none."""
    mark = f"fedl2p-{tmp_path}"
    environment = {**os.environ, "FEDL2P_TEST": mark, "TMPDIR": "/tmp"}
    command = [
        *(sys.executable, "-m", "fedl2p", "run", "smoke", "--out", str(tmp_path / "run")),
        *("--engine", "ray", "--compute.stack-size", "3", "--methods", "finetuning-client"),
        *("--pretrain.rounds", "6"),
    ]
    before = set(Path("/tmp").glob("fedl2p-ray-*"))
    run = subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,
    )
    rounds = tmp_path / "run" / "rounds.csv"
    try:
        while run.poll() is None and not (rounds.exists() and len(rounds.read_text().split()) > 2):
            time.sleep(0.02)
        assert len(marked(mark)) > 2, "workers are found by their environment"
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130
    assert said.strip().splitlines() == [
        f"fedl2p: interrupted; go on with: fedl2p run smoke --out {tmp_path / 'run'} --resume"
    ]
    wait_until_gone(mark)
    done = subprocess.run(
        [*command, "--resume"], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(rounds.read_text().split()) == 1 + 6 + 1
    wait_until_gone(mark)
    assert set(Path("/tmp").glob("fedl2p-ray-*")) <= before


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"cpus_per_worker": 0.0}, "ray.cpus_per_worker is 0.0"),
        ({"cpus_per_worker": float("nan")}, "ray.cpus_per_worker is nan"),
        ({"gpus_per_worker": -1.0}, "ray.gpus_per_worker is -1.0"),
        ({"gpus_per_worker": 1.5}, "must be a whole number"),
        ({"workers": -1}, "ray.workers is -1"),
    ],
)
def test_bad_shares_are_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Ray(**fields)


def test_as_many_workers_as_fit() -> None:
    assert Ray().fitting(cpus=8, gpus=0) == 8
    assert Ray(cpus_per_worker=0.5).fitting(cpus=2, gpus=0) == 4
    assert Ray(cpus_per_worker=3).fitting(cpus=8, gpus=0) == 2
    assert Ray(gpus_per_worker=0.25).fitting(cpus=16, gpus=2) == 8
    assert Ray(workers=2).fitting(cpus=8, gpus=0) == 2
    assert [Ray(cpus_per_worker=c).threads for c in (0.5, 1.0, 2.9)] == [1, 1, 2]
    for too_much in (Ray(cpus_per_worker=9), Ray(gpus_per_worker=1), Ray(workers=9)):
        with pytest.raises(ValueError, match="do not fit into 8 CPUs and 0 GPUs"):
            too_much.fitting(cpus=8, gpus=0)
    with pytest.raises(ValueError, match="stack_size is 0"):
        Compute(stack_size=0)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"device": "cuda"}, "needs ray.gpus_per_worker above 0"),
        ({"device": "cpu", "ray": Ray(gpus_per_worker=1)}, "gpus_per_worker is 1, but the device"),
    ],
)
def test_device_and_share_must_agree(
    changes: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    study = dataclasses.replace(recipes.get("smoke"), engine="ray", **changes)
    with pytest.raises(ValueError, match=problem):
        engines.device_of(study)
    auto = dataclasses.replace(study, device="auto")
    assert engines.device_of(auto).type == ("cuda" if study.ray.gpus_per_worker else "cpu")


def test_nothing_is_written_where_no_worker_fits(tmp_path: Path) -> None:
    study = small(engine="ray", ray=Ray(cpus_per_worker=1e6))
    with pytest.raises(ValueError, match="do not fit"):
        run_study(study, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ray_that_is_not_installed_is_one_line(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from fedl2p import cli\n"
        f"cli.main(['run', 'smoke', '--engine', 'ray', '--out', {str(tmp_path / 'run')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "fedl2p: error: ray is not installed; install it with: pip install 'fedl2p[ray]'\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_engines_give_the_same_bits_by_default(tmp_path: Path) -> None:
    """At the defaults of ``run smoke --seed 5``: stacks of ten, two threads here and one there."""
    study = dataclasses.replace(
        recipes.get("smoke"), seed=5, methods=("finetuning-client", "bestfixed", "l2p", "fedl2p")
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run_study(study, tmp_path / "here")
    finally:
        torch.set_num_threads(threads)
    # Half a processor each: there may be a Ray running, with a worker of another test.
    run_study(dataclasses.replace(study, engine="ray", ray=HALF), tmp_path / "ray")
    node = engines.node_of(study, folder=(tmp_path / "encoded").absolute(), simulated=True)
    run_study(study, tmp_path / "encoded", clients=Encoded(InProcess(node)))
    for other in ("ray", "encoded"):
        assert_same_run(tmp_path / "here", tmp_path / other)
