"""The command ``fedl2p recipes``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """List the recipes with one line each."""

    def __call__(self) -> int:
        """Print the list and return the exit status."""
        from fedl2p import recipes

        width = max(map(len, recipes.names()))
        for name in recipes.names():
            _, *variants = recipes.variants(name)
            also = f" (also {', '.join(variants)})" if variants else ""
            print(f"{name:<{width}}  {recipes.describe(name)}{also}")
        return 0
