"""Idle threads sleep and freed memory is kept, where the user has not said otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from fedl2p.process_environment import VARIABLES, prepare_children

THREADS, MEMORY = VARIABLES[:2], VARIABLES[2:]

CHURN = """
import resource
import numpy as np
def used():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for turn in range(12):
    if turn == 2:
        before = used()
    blocks = [np.ones(500_000) for _ in range(10)]  # 40 MB
    del blocks
print(used() - before)
"""


def without_choices() -> dict[str, str]:
    """Return this process's environment as it is where the user has chosen nothing."""
    return {k: v for k, v in os.environ.items() if k not in (*VARIABLES, "GLIBC_TUNABLES")}


def test_all_is_set_but_what_the_user_chose() -> None:
    fresh: dict[str, str] = {}
    prepare_children(fresh)
    assert fresh.keys() == set(VARIABLES)
    for name, others in (
        ("OMP_WAIT_POLICY", MEMORY),
        ("GOMP_SPINCOUNT", MEMORY),
        ("MALLOC_MMAP_THRESHOLD_", THREADS),
        ("MALLOC_TRIM_THRESHOLD_", THREADS),
    ):
        kept = {name: "1"}
        prepare_children(kept)
        assert kept == {name: "1", **{other: fresh[other] for other in others}}
    tuned = {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1"}
    prepare_children(tuned)
    assert tuned.keys() == {"GLIBC_TUNABLES", *THREADS}


def test_the_command_sets_it_before_torch_is_there() -> None:
    code = (
        "import os, sys\n"
        "from fedl2p import cli\n"
        "assert 'torch' not in sys.modules\n"
        "try: cli.main(['--version'])\n"
        "except SystemExit: pass\n"
        "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=without_choices(),
    )
    assert done.stdout.split()[-2:] == ["PASSIVE", "False"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept() -> None:
    settle = "from fedl2p.process_environment import prepare_process; prepare_process()"
    environment = without_choices()
    kept, given_back, chosen = (
        int(
            subprocess.run(
                [sys.executable, "-c", begin + CHURN],
                capture_output=True,
                text=True,
                check=True,
                env=env,
            ).stdout
        )
        for begin, env in (
            (settle, environment),
            ("", environment),
            (settle, {**environment, "MALLOC_TRIM_THRESHOLD_": "0"}),
        )
    )
    pages = 10 * 40_000_000 // os.sysconf("SC_PAGE_SIZE")
    assert kept < pages / 10
    assert min(given_back, chosen) > pages / 2
