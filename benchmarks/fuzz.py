"""Thousands of malformed inputs: how many were tried, and whether any ended otherwise than named.

Runs ``tests/test_fuzz_*.py``, which by themselves try some hundreds each, with more and with other
inputs at every call, and prints the number tried of each kind. Exit status 1 if one of them ended
in another way than it should; the test's own output then shows the smallest such input.

    python benchmarks/fuzz.py               # about twenty times the usual
    python benchmarks/fuzz.py --times 100
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=20, help="multiple of the usual number")
    parser.add_argument("--only", default="", help="part of the tests' names")
    options = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.json"
        files = sorted(str(path) for path in TESTS.glob("test_fuzz_*.py"))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
            + (["-k", options.only] if options.only else []),
            cwd=TESTS.parent,
            env={
                **os.environ,
                "FEDL2P_FUZZ": str(options.times),
                "FEDL2P_FUZZ_COUNTS": str(counts),
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            },
            check=False,
        )
        tried = json.loads(counts.read_text()) if counts.exists() else {}
    width = max(map(len, tried), default=5)
    for name, number in sorted(tried.items()):
        print(f"{name:<{width}}  {number:>8,}")
    print(f"{'in all':<{width}}  {sum(tried.values()):>8,}  in {time.perf_counter() - began:.0f} s")
    return 1 if done.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
