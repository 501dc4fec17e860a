"""The smoke recipe's numbers, so that no change of a default or of the arithmetic goes unnoticed.

Where they should change, make them again and say so in the commit:

    fedl2p run smoke --out DIR && python tests/study/test_golden.py DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden_smoke.json"


def numbers(folder: Path) -> dict[str, dict[str, float]]:
    told = json.loads((folder / "results.json").read_text())["methods"]
    return {f"{m['method']}, {m['pool']}": {k: m[k] for k in ("loss", "accuracy")} for m in told}


def test_the_smoke_recipes_numbers(smoke_run: Path) -> None:
    """Within what another processor's order of summation changes, which steps amplify."""
    ours, golden = numbers(smoke_run), json.loads(GOLDEN.read_text())
    assert ours.keys() == golden.keys()
    for row, wanted in golden.items():
        assert ours[row]["loss"] == pytest.approx(wanted["loss"], rel=0.02), row
        assert ours[row]["accuracy"] == pytest.approx(wanted["accuracy"], abs=0.025), row


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(numbers(Path(sys.argv[1])), indent=1) + "\n")
