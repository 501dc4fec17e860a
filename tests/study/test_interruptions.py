"""A run that is killed, or finds the disk full or its newest checkpoint torn, loses nothing.

It ends as if never stopped. The command itself runs, in processes of their own that are really
killed, on a study with every kind of stage.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.killing import TINY, call, result, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="kills and limits of POSIX systems"),
]

KILLS = 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    out = folder / "run"
    assert call(["run", "smoke", "--out", out, *TINY], folder / "said") == 0
    assert "fedl2p" in (folder / "said").read_text()
    return out


def assert_same_result(out: Path, whole: Path) -> None:
    found, wanted = result(out), result(whole)
    assert found.keys() == wanted.keys()  # no unfinished file is left either
    for name, value in wanted.items():
        assert found[name] == value, name


def test_twenty_kills_at_random_moments_change_no_result(tmp_path: Path, whole: Path) -> None:
    """Half of the kills come after a random time, half at a random one of the files written.

    The latter do not depend on how fast the machine is, so that every machine sees kills at every
    kind of moment.
    """
    draw = random.Random(20231207)
    kills, runs, positions = 0, 0, set()
    while kills < KILLS:
        runs += 1
        out = tmp_path / f"run{runs}"
        # The first kills may come before there is anything to be resumed.
        args = ["run", "smoke", "--out", out, *TINY, "--resume"]
        while True:
            at_a_file = kills < KILLS and kills % 2 == 1
            process = start(
                args, tmp_path / "said", die_at=draw.randrange(1, 40) if at_a_file else 0
            )
            if kills < KILLS and not at_a_file:
                time.sleep(draw.uniform(0.0, 1.5))
                process.kill()
            process.join(120)
            if process.exitcode == 0:  # faster than its killer, or the last one
                break
            assert process.exitcode == -9, (tmp_path / "said").read_text()
            kills += 1
            positions.add(tuple(sorted(str(path.relative_to(out)) for path in out.rglob("*"))))
        assert_same_result(out, whole)
    assert kills == KILLS
    assert len(positions) >= 8, "the kills did not come at different moments"


def test_a_torn_newest_checkpoint_falls_back_and_says_so(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    process = start(["run", "smoke", "--out", out, *TINY], tmp_path / "said")
    while len(list((out / "checkpoint" / "pretrain").glob("round-*"))) < 2:
        assert process.is_alive()
    process.kill()
    process.join()
    newest = max((out / "checkpoint" / "pretrain").glob("round-*"))
    newest.write_bytes(newest.read_bytes()[:-100])
    assert call(["run", "smoke", "--out", out, "--resume"], tmp_path / "said") == 0
    assert f"checkpoint {newest} is damaged" in (out / "log.txt").read_text()
    assert_same_result(out, whole)


def complaint(said: Path) -> str:
    """What a run that failed has said: one line, without a traceback."""
    lines = said.read_text().splitlines()
    assert len(lines) == 1, "\n".join(lines)
    assert lines[0].startswith("fedl2p: error: ")
    return lines[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB; skips where the system lets us have none."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# What is left for the run, in KiB: it stops in config.json, in population.json, in a checkpoint
# of pre-training, and in the rounds that learn.
@pytest.mark.parametrize("room", [0, 4, 300, 1000])
def test_a_full_disk_ends_a_run_in_one_line_and_it_goes_on_when_there_is_room(
    room: int, small_disk: Path, tmp_path: Path, whole: Path
) -> None:
    out, ballast = small_disk / "run", small_disk / "ballast"
    said = tmp_path / "said"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    os.truncate(ballast, ballast.stat().st_size - 1024 * room)
    status = call(["run", "smoke", "--out", out, *TINY], said)
    line = complaint(said)
    assert "No space left on device" in line
    if room == 0:  # not even the settings: refused, as any folder that cannot be written
        assert status == 2
        assert "cannot write into" in line
    else:
        assert status == 1
        assert str(out) in line
        assert line.endswith(f"go on with: fedl2p run smoke --out {out} --resume")
    # Still full: the same line, and nothing is lost.
    said.unlink()
    assert call(["run", "smoke", "--out", out, *TINY, "--resume"], said) == status
    assert "No space left on device" in complaint(said)
    ballast.unlink()
    assert call(["run", "smoke", "--out", out, *TINY, "--resume"], said) == 0
    assert_same_result(out, whole)


def test_a_file_that_may_not_grow_ends_a_run_in_one_line(tmp_path: Path, whole: Path) -> None:
    out, said = tmp_path / "run", tmp_path / "said"
    # The checkpoints of learning are the first files of more than 250 kB.
    assert call(["run", "smoke", "--out", out, *TINY], said, file_limit=250_000) == 1
    line = complaint(said)
    assert "File too large" in line
    assert "checkpoint" in line
    assert call(["run", "smoke", "--out", out, "--resume"], said) == 0
    assert_same_result(out, whole)
