"""The command ``fedl2p compare``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Show runs of one recipe under several seeds in one table, with 95 % confidence intervals.

    Parameters
    ----------
    folders
        Folders of finished runs that differ in their seeds only.
    """

    folders: Positional[tuple[Path, ...]]

    def __call__(self) -> int:
        """Print the table and return the exit status."""
        from fedl2p.reporting.comparison import compare

        print(compare(self.folders))
        return 0
