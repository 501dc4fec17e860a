"""Flower's own simulation, as a user runs it: a local SuperLink of a test's own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fedl2p
from support.leftovers import wait_until_gone


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback address that nobody uses now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@contextmanager
def local_superlink(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Run a local SuperLink of our own; yield the environment that Flower's command needs."""
    api, control = free_ports(2)
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "here"\n\n[superlink.here]\n'
        f'address = "127.0.0.1:{api}"\ninsecure = true\n'
    )
    mark = f"fedl2p-{tmp_path}"
    values = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(fedl2p.__file__).parents[1]),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # The packages are here; otherwise Flower's runtime installs them anew for every run.
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "FEDL2P_TEST": mark,
    }
    address = ("--host", "127.0.0.1", "--port", str(api))
    log = (tmp_path / "superlink.log").open("w")
    superlink = subprocess.Popen(
        [
            *("flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"),
            *("--control-api-address", f"127.0.0.1:{control}", *address),
        ],
        env=values,
        stdout=log,
        stderr=log,
    )
    try:
        wait_for_port(api, superlink)
        yield values
    finally:
        superlink.terminate()
        superlink.wait(timeout=60)
        log.close()
        wait_until_gone(mark, seconds=60)


def wait_for_port(port: int, process: subprocess.Popen[bytes], *, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, "the SuperLink has ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the SuperLink does not listen")
