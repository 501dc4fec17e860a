"""The command line, one file per command."""

from fedl2p.cli.entry import main

__all__ = ["main"]
