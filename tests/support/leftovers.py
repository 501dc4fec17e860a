"""Finding the processes that a test has started, and those that these have started in turn."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def marked(mark: str) -> dict[int, str]:
    """Return id and command of the processes whose environment has FEDL2P_TEST=``mark``.

    Children inherit the environment, however they are started and whoever their parent is now.
    """
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            entries = (folder / "environ").read_bytes().split(b"\0")
            if f"FEDL2P_TEST={mark}".encode() in entries:
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue  # it has ended, or is somebody else's
    return found


def wait_until_gone(mark: str, *, seconds: float = 20.0) -> None:
    """Fail if processes are there after some seconds, and end them by their ids."""
    end = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert left == {}
