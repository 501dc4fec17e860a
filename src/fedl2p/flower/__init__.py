"""FedL2P in a Flower app of one's own: a strategy for its ServerApp, handlers for its ClientApp.

``docs/flower.md`` has the whole of it on one page.
"""

from fedl2p.flower.handlers import add_fedl2p as add_fedl2p
from fedl2p.flower.strategy import FedL2P as FedL2P

__all__ = ["FedL2P", "add_fedl2p"]
