"""Seeds are named by what a draw is for."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch

import fedl2p.seeds
from fedl2p.seeds import derive_seed, generator

PINNED = 3003438778132873230


def test_equal_names_give_equal_seeds_and_others_differ() -> None:
    names = [
        (0,),
        (1,),
        ("1",),
        (0, "learn", 3, "anna"),
        (0, "learn", 3, "bert"),
        (0, "learn", 4, "anna"),
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        (1, 23),
        (12, 3),
        (),
    ]
    for a, b in combinations(names, 2):
        assert derive_seed(*a) != derive_seed(*b), (a, b)
    assert [derive_seed(*n) for n in names] == [derive_seed(*n) for n in names]


def test_seeds_fit_into_63_bits_and_fill_them() -> None:
    drawn = [derive_seed("draw", i) for i in range(1000)]
    assert all(0 <= s < 2**63 for s in drawn)
    assert len(set(drawn)) == 1000
    assert max(drawn) > 2**62 > min(drawn)


def test_a_seed_is_the_same_in_another_process() -> None:
    """Python's own hash() of a string is not; pinned, since old runs must stay reproducible."""
    code = "from fedl2p.seeds import derive_seed; print(derive_seed(0, 'learn', 3, 'anna'))"
    source = str(Path(fedl2p.seeds.__file__).parents[1])
    said = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": source, "PYTHONHASHSEED": "1", "PATH": ""},
    ).stdout
    assert int(said) == derive_seed(0, "learn", 3, "anna") == PINNED


def test_generators_draw_by_name_and_leave_the_global_one_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = torch.rand(4, generator=generator(1, "order", 2))
    again = torch.rand(4, generator=generator(1, "order", 2))
    other = torch.rand(4, generator=generator(1, "order", 3))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("parts", [("x",), (2**70,), ("ä", -1)])
def test_any_name_makes_a_generator(parts: tuple[int | str, ...]) -> None:
    assert generator(*parts).initial_seed() == derive_seed(*parts)
