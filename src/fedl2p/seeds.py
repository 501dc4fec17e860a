"""Seeds and generators of all random draws, derived from what each draw is for.

A draw is named by its purpose, e.g. ``(study seed, "learn", round, client name)``, never by who
makes it or when: the order and the number of workers cannot change a result.
"""

from __future__ import annotations

import hashlib
from numbers import Integral

import torch


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed, a hash of the parts that name a draw; equal parts give equal seeds."""
    text = "\x1f".join(map(_named, parts))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _named(part: object) -> str:
    if isinstance(part, str):
        return f"str:{part}"
    # whole numbers of numpy too, which are to give what the same int gives
    if isinstance(part, bool) or not isinstance(part, Integral):
        raise ValueError(f"a seed is {part!r}, but must be a whole number")
    return f"int:{int(part)}"


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded by :func:`derive_seed` of the parts."""
    return torch.Generator().manual_seed(derive_seed(*parts))
