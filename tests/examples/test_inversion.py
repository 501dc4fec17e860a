"""What the documents say that a server can read from one update."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_a_profile_is_recovered_without_privacy_and_not_from_a_noised_update() -> None:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import inversion
    finally:
        sys.path.remove(str(EXAMPLES))
    rows = {row.setting: row for row in inversion.measure(clients=10, pretrain=2, seed=0)}
    plain = rows["none (the default)"]
    assert plain.identified == 1.0
    assert plain.divergences < 1e-3
    noised = rows["local noise 0.001"]
    assert noised.divergences > 0.5
    assert noised.identified <= 0.3
    # Noise that is too small for the update hides nothing.
    assert rows["local noise 1e-05"].identified > noised.identified
    # The sum of ten is the profile of nobody.
    together = rows["only the sum of 10 is seen"]
    assert together.divergences > 0.2
    assert together.identified <= 0.3
