"""Idle threads sleep, where the user has not said otherwise."""

from __future__ import annotations

import subprocess
import sys

from fedl2p.thread_waiting import PASSIVE, wait_asleep


def test_threads_sleep_unless_the_user_chose() -> None:
    fresh: dict[str, str] = {}
    wait_asleep(fresh)
    assert fresh == PASSIVE
    for chosen in ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "100"}):
        kept = dict(chosen)
        wait_asleep(kept)
        assert kept == chosen


def test_the_command_sets_it_before_torch_is_there() -> None:
    code = (
        "import os, sys\n"
        "for key in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'): os.environ.pop(key, None)\n"
        "from fedl2p import cli\n"
        "assert 'torch' not in sys.modules\n"
        "try: cli.main(['--version'])\n"
        "except SystemExit: pass\n"
        "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["PASSIVE", "False"]
