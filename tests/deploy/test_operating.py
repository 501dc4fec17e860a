"""The files for operators: they parse, close the control port, and name commands that exist."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import pytest

FILES = Path(__file__).parents[2] / "examples" / "federation" / "operating"
ROOT = Path(__file__).parents[2]


def unit(name: str) -> RawConfigParser:
    read = RawConfigParser(strict=False)
    read.optionxform = str  # type: ignore[assignment, method-assign]
    text = (FILES / name).read_text().replace("\\\n", " ")
    read.read_string(text)
    return read


def options_of(program: str) -> set[str]:
    said = subprocess.run([program, "--help"], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"--[a-z][a-z-]+", said))


def commands() -> dict[str, list[str]]:
    yaml = pytest.importorskip("yaml")
    services: dict[str, Any] = yaml.safe_load((FILES / "compose.yaml").read_text())["services"]
    found = {
        f"compose {k}": shlex.split(v["command"]) for k, v in services.items() if "command" in v
    }
    for name in ("superlink.service", "supernode.service"):
        found[name] = shlex.split(unit(name)["Service"]["ExecStart"])
    return found


@pytest.mark.slow
def test_every_option_exists_in_flower() -> None:
    pytest.importorskip("flwr")
    given = commands()
    assert len(given) == 4
    for where, command in given.items():
        program = str(Path(sys.executable).parent / Path(command[0]).name)
        asked = {word for word in command[1:] if word.startswith("--")}
        assert asked <= options_of(program), where
        assert not asked & {"--insecure"}


@pytest.mark.parametrize("name", ["superlink.service", "supernode.service"])
def test_units_keep_what_they_write_to_themselves(name: str) -> None:
    service = unit(name)["Service"]
    assert service["UMask"] == "0077"
    assert service["NoNewPrivileges"] == "yes"
    assert service["User"] != "root"


def test_the_proxy_passes_the_nodes_and_nobody_else() -> None:
    text = re.sub(r"#.*", "", (FILES / "nginx.conf").read_text())
    assert text.count("{") == text.count("}")
    locations = dict(re.findall(r"location (\S+) \{([^}]*)\}", text))
    assert set(locations) == {"/v1/fleet/", "/"}
    assert locations["/"].split() == ["return", "403;"]
    # without a path of its own in proxy_pass nginx passes what it has matched
    assert "proxy_pass https://superlink:8000;" in locations["/v1/fleet/"]
    yaml = pytest.importorskip("yaml")
    compose = yaml.safe_load((FILES / "compose.yaml").read_text())
    assert "ports" not in compose["services"]["superlink"]
    assert compose["services"]["superlink"]["networks"] == ["inside"]
    assert compose["networks"]["inside"] == {"internal": True}


@pytest.mark.slow
def test_the_container_is_built_where_there_is_an_engine() -> None:
    engine = shutil.which("podman") or shutil.which("docker")
    if engine is None or subprocess.run([engine, "info"], capture_output=True).returncode:
        pytest.skip("no container engine runs here")
    made = subprocess.run(
        [engine, "build", "-t", "fedl2p-test", "-f", FILES / "Containerfile", ROOT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-2000:]
