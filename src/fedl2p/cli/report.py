"""The command ``fedl2p report``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True, kw_only=True)
class Report:
    """Make report.html of a finished run again, from the files in its folder alone.

    Parameters
    ----------
    folder
        Folder of a finished run.
    """

    folder: Positional[Path]

    def __call__(self) -> int:
        """Write the page, print its path, and return the exit status."""
        from fedl2p.reporting.page import write_page

        print(f"report: {write_page(self.folder)}")
        return 0
