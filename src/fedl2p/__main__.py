"""``python -m fedl2p`` is the command ``fedl2p``."""

from fedl2p.cli import main

main()
