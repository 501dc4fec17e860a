"""The command ``fedl2p`` called in this process."""

from __future__ import annotations

import pytest

from fedl2p.cli import entry as cli


def call(*args: object) -> int:
    """Run the command in this process and return its exit status."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(arg) for arg in args])
    return int(stop.value.code or 0)


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Check that the command refuses in exactly one line, and return the line."""
    assert call(*args) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("fedl2p: error: ")
    return lines[0].removeprefix("fedl2p: error: ")
