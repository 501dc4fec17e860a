"""What the fuzz tests share: how many inputs, how one ends, and how files are mutated.

Quick by default. ``FEDL2P_FUZZ=20`` tries twenty times as many inputs (see ``benchmarks/fuzz.py``),
and ``FEDL2P_FUZZ_COUNTS`` names a file that gets the number tried per test.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

TIMES = int(os.environ.get("FEDL2P_FUZZ", "1"))

LONGEST = 30
"""Seconds of computing after which one input is taken to hang, however busy the machine is."""

tried: Counter[str] = Counter()


def fuzz(examples: int) -> Callable[[Any], Any]:
    """Return the settings of a fuzz test that tries so many inputs, times ``FEDL2P_FUZZ``."""
    return settings(
        max_examples=examples * TIMES,
        deadline=None,
        database=None,
        derandomize=TIMES == 1,  # the quick run is the same every time; the long one explores
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def ends_well(what: str, *named: type[Exception]) -> Iterator[None]:
    """Count an input; let it end in nothing or in one line of a named error, in time.

    Any other exception passes through and fails the test.
    """
    tried[what] += 1

    def hang(*_: object) -> None:
        raise AssertionError(f"still busy after {LONGEST} s")

    before = signal.signal(signal.SIGPROF, hang)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    ending: Exception | None = None
    try:
        yield
    except Exception as error:
        ending = error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    if ending is None:
        return
    # The class itself: UnicodeError and the like are no named errors, though derived from them.
    if type(ending) not in (named or (ValueError,)):
        raise ending
    assert str(ending).strip(), f"{type(ending).__name__} without a message"


def refused(what: str, capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Call the command; it must refuse in one line and status 2. Return the line."""
    from fedl2p.cli import entry as cli

    with ends_well(what), pytest.raises(SystemExit) as stop:
        cli.main([str(arg) for arg in args])
    said = capsys.readouterr()
    assert stop.value.code == 2, (stop.value.code, said.err)
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("fedl2p: error: "), lines[0]
    assert len(lines[0]) > len("fedl2p: error: "), "without a message"
    assert said.out == ""
    return lines[0]


def fingerprint(folder: Path) -> str:
    """Return a hash of all names and contents in a folder."""
    digest = hashlib.blake2b()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path).encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


ODD: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**400)]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["", "\0", "nan", "1e999", "../..", "a" * 5000, "\ud800", "NaN", "-", "--", "{}"]
    ),
    st.lists(st.integers() | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers() | st.none(), max_size=3),
)
"""Values that JSON can hold and a field hardly wants."""


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all entries in nested lists and objects, the root's first."""
    found = [at]
    if isinstance(value, dict):
        pairs: list[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    else:
        return found
    for key, item in pairs:
        found += paths_of(item, (*at, key))
    return found


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """Draw a copy of a JSON value in which some entries are replaced, removed, renamed or added."""
    new = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths_of(new)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                new = draw(ODD)
            continue
        parent = new
        for key in path[:-1]:
            parent = parent[key]
        match draw(st.sampled_from(["replace", "replace", "remove", "rename", "add", "wrap"])):
            case "replace":
                parent[path[-1]] = draw(ODD)
            case "remove":
                del parent[path[-1]]
            case "rename" if isinstance(parent, dict):
                parent[draw(st.text(max_size=5))] = parent.pop(path[-1])
            case "add" if isinstance(parent, dict):
                parent[draw(st.text(max_size=5) | st.just("kind"))] = draw(ODD)
            case _:
                parent[path[-1]] = [parent[path[-1]]]
    return new


def as_json(value: Any) -> bytes:
    """Return JSON of anything that :data:`ODD` can hold, as a careless or hostile writer would."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


@st.composite
def mutated(draw: st.DrawFn, content: bytes, *, head: int = 0) -> bytes:
    """Draw a copy of some bytes with bits flipped, parts removed, doubled or overwritten.

    ``head`` bytes at the start, where formats keep what they say of the rest, are hit half of the
    time.
    """
    new = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        if not new:
            break
        most = len(new) - 1
        within = min(head, most) if head and draw(st.booleans()) else most
        at = draw(st.integers(0, within))
        match draw(st.sampled_from(["flip", "byte", "cut", "drop", "double", "insert", "number"])):
            case "flip":
                new[at] ^= 1 << draw(st.integers(0, 7))
            case "byte":
                new[at] = draw(st.integers(0, 255))
            case "cut":
                del new[at:]
            case "drop":
                del new[at : at + draw(st.integers(1, 64))]
            case "double":
                size = draw(st.integers(1, 64))
                new[at:at] = new[at : at + size]
            case "insert":
                new[at:at] = draw(st.binary(max_size=16))
            case "number":
                size = draw(st.sampled_from([2, 4, 8]))
                value = draw(st.sampled_from([0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1)]))
                new[at : at + size] = value.to_bytes(size, "little")
    return bytes(new)


@atexit.register
def _tell() -> None:
    if (target := os.environ.get("FEDL2P_FUZZ_COUNTS")) and tried:
        path = Path(target)
        told = Counter(json.loads(path.read_text())) if path.exists() else Counter()
        path.write_text(json.dumps(dict(told + tried)))
