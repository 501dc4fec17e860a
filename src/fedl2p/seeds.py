"""Seeds and generators of all random draws, derived from what each draw is for.

A draw is named by its purpose, e.g. ``(study seed, "learn", round, client name)``, never by who
makes it or when: the order and the number of workers cannot change a result.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed, a hash of the parts that name a draw; equal parts give equal seeds."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded by :func:`derive_seed` of the parts."""
    return torch.Generator().manual_seed(derive_seed(*parts))
