"""A SuperLink and SuperNodes as processes of this machine, each as it would be started on its own.

Everything lies below one folder, listens on free ports of the loopback address, and is stopped by
its process id.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from certificates import make_node_key, make_server_certificate

APP = Path(__file__).resolve().parent / "app"
HOST = "127.0.0.1"
CONNECTION = "here"


class Machines:
    """A federation in one folder; use it as a context, so that it stops whatever happens.

    The folder has ``certs/`` and ``logs/``, and ``flower/`` for what Flower itself writes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.certs = self.folder / "certs"
        self.logs = self.folder / "logs"
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._families: dict[str, set[int]] = {}
        for made in (self.logs, self.folder / "flower"):
            made.mkdir(parents=True)
        make_server_certificate(self.certs, [HOST, "localhost"])
        (self.folder / "flower" / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "{HOST}:{self.port}"\n'
            f"root-certificates = {json.dumps(str(self.certs / 'ca.crt'))}\n"
        )

    def __enter__(self) -> Machines:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # --- what an operator does -----------------------------------------------------------------

    def start_superlink(self) -> None:
        """Start the SuperLink: encrypted, and open to registered SuperNodes only."""
        self._start(
            "superlink",
            *("flower-superlink", "--host", HOST, "--port", str(self.port)),
            *("--ssl-ca-certfile", self.certs / "ca.crt"),
            *("--ssl-certfile", self.certs / "server.crt"),
            *("--ssl-keyfile", self.certs / "server.key"),
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
        )
        self.wait_for_port(self.port, "superlink")

    def register(self, name: str) -> None:
        """Tell the SuperLink the public key of a SuperNode."""
        if not (self.certs / f"{name}.pub").exists():
            make_node_key(self.certs, name)
        self.flwr("supernode", "register", self.certs / f"{name}.pub", CONNECTION)

    def start_supernode(self, name: str, config: Mapping[str, object]) -> None:
        """Start a SuperNode with its own key and its own configuration."""
        if not (self.certs / f"{name}.key").exists():
            make_node_key(self.certs, name)
        self._start(
            name,
            *("flower-supernode", "--superlink", f"{HOST}:{self.port}"),
            *("--root-certificates", self.certs / "ca.crt"),
            *("--auth-supernode-private-key", self.certs / f"{name}.key"),
            *("--host", HOST, "--port", str(free_port())),
            *("--node-config", " ".join(f"{k}={_toml(str(v))}" for k, v in config.items())),
        )

    def submit(self, config: Mapping[str, str | int | float | bool], *, app: Path = APP) -> str:
        """Start a run of an app and return its id."""
        text = " ".join(f"{key}={_toml(value)}" for key, value in config.items())
        said = self.flwr("run", app, CONNECTION, "--run-config", text, "--format", "json")
        return str(_json_in(said)["run-id"])

    def status(self, run: str) -> str:
        """Return a run's status as Flower says it, e.g. ``finished:completed``."""
        said = self.flwr("list", CONNECTION, "--run-id", run, "--format", "json")
        return str(_json_in(said)["runs"][0]["status"])

    def follow(self, run: str, *, seconds: float = 600) -> str:
        """Show what the server's side of a run says until it is over; return the status."""
        with subprocess.Popen(
            [_command("flwr"), "log", run, CONNECTION, "--stream"],
            env=self._environment(),
            cwd=self.folder,
        ) as shown:
            try:
                shown.wait(timeout=seconds)
            finally:
                shown.kill()
        return self.status(run)

    def flwr(self, *args: object) -> str:
        """Run Flower's command and return what it prints."""
        done = subprocess.run(
            [_command("flwr"), *map(str, args)],
            env=self._environment(),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"flwr {args[0]} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    # --- processes -----------------------------------------------------------------------------

    def log(self, name: str) -> str:
        """Return what a process has said so far."""
        return (self.logs / f"{name}.log").read_text(errors="replace")

    def wait_for_port(self, port: int, name: str, *, seconds: float = 60) -> None:
        """Wait until a process listens."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
                return
            if self.processes[name].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} does not listen on port {port}:\n{self.log(name)}")
            time.sleep(0.1)

    def kill(self, name: str) -> None:
        """Kill a process without warning, and then what it had started."""
        process = self.processes[name]
        family = self._family(name)
        process.kill()
        process.wait()
        _end(family)

    def stop(self) -> None:
        """Stop every process by its id: the SuperNodes, the SuperLink, and what they started."""
        families = {name: self._family(name) for name in self.processes}
        for name in reversed(self.processes):
            self.processes[name].terminate()
        for name, process in reversed(self.processes.items()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            if process.poll() is None:
                process.kill()
                process.wait()
            _end(families[name])

    def _start(self, name: str, program: str, *args: object) -> None:
        with (self.logs / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [_command(program), *map(str, args)],
                env=self._environment(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for this script, which stops them in order
            )

    def _environment(self) -> dict[str, str]:
        bin_folder = str(Path(sys.executable).parent)
        # The processes run in another folder than this one.
        path = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
        return {
            "OMP_NUM_THREADS": "1",
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            # Flower starts its own commands by their names.
            "PATH": os.pathsep.join([bin_folder, os.environ.get("PATH", os.defpath)]),
            "FLWR_HOME": str(self.folder / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }

    def _family(self, name: str) -> set[int]:
        """Return the ids of the processes that one has started, also by way of others."""
        found = self._families.setdefault(name, set())
        found |= _descendants(self.processes[name].pid)
        return found


def free_port() -> int:
    """Return a port of the loopback address that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _command(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _toml(value: str | int | float | bool) -> str:
    return json.dumps(value)


def _json_in(text: str) -> dict[str, Any]:
    """Return the JSON object in what a command printed; a note may stand before it."""
    found: dict[str, Any] = json.loads(text[text.index("{") :])
    return found


def _descendants(root: int) -> set[int]:
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    parents = dict((int(n) for n in line.split()) for line in listed.splitlines())
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family - {root}


def _end(pids: set[int], *, seconds: float = 5) -> None:
    """Wait for processes to go, which they do when they miss their parent; then kill what is left.

    They are no children of this process, so a process id is checked by signal 0.
    """
    deadline = time.monotonic() + seconds
    while pids := {pid for pid in pids if _alive(pid)}:
        if time.monotonic() > deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    # One that has ended and that nobody has asked about is none that runs.
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.strip()
    return bool(state) and not state.startswith("Z")
