"""An LRU cache of the data of opened clients, up to a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from fedl2p.core.clientdata import ClientData

KEEP_BYTES = 128 << 20
"""Default of ``keep_bytes``."""


class ClientCache:
    """Opens clients by name and keeps their data; the least recently opened one is dropped first.

    Parameters
    ----------
    load
        Opens a client that is not in the cache.
    keep_bytes
        Most bytes of tensors kept; a client larger than that is opened anew at every call.
    """

    def __init__(self, load: Callable[[str], ClientData], *, keep_bytes: int = KEEP_BYTES) -> None:
        self._load = load
        self._keep_bytes = keep_bytes
        self._clients: OrderedDict[str, ClientData] = OrderedDict()
        self._bytes = 0

    def __call__(self, name: str) -> ClientData:
        """Return a client's data."""
        if name in self._clients:
            self._clients.move_to_end(name)
            return self._clients[name]
        data = self._load(name)
        self._clients[name] = data
        self._bytes += size_of(data)
        while self._bytes > self._keep_bytes:
            _, dropped = self._clients.popitem(last=False)
            self._bytes -= size_of(dropped)
        return data


def size_of(data: ClientData) -> int:
    """Return the bytes of a client's tensors."""
    parts = [part for part in (data.train, data.validation, data.test) if part is not None]
    tensors = [tensor for part in parts for tensor in part]
    tensors += [raw for raw in (data.raw, data.raw_validation) if raw is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
