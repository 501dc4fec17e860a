"""The clients that were opened last, kept up to a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from fedl2p.core.clientdata import ClientData

KEEP_BYTES = 128 << 20
"""What a population keeps unless told otherwise."""


class Opened:
    """Clients' data by name; what has not been asked for longest goes first.

    Parameters
    ----------
    make
        Opens a client that is not kept.
    keep_bytes
        Most bytes of tensors kept; a client larger than that is made at every call.
    """

    def __init__(self, make: Callable[[str], ClientData], *, keep_bytes: int = KEEP_BYTES) -> None:
        self._make = make
        self._keep_bytes = keep_bytes
        self._held: OrderedDict[str, ClientData] = OrderedDict()
        self._bytes = 0

    def __call__(self, name: str) -> ClientData:
        """Return a client's data."""
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name]
        data = self._make(name)
        self._held[name] = data
        self._bytes += size_of(data)
        while self._bytes > self._keep_bytes:
            _, gone = self._held.popitem(last=False)
            self._bytes -= size_of(gone)
        return data


def size_of(data: ClientData) -> int:
    """Return the bytes of a client's tensors."""
    parts = [part for part in (data.train, data.validation, data.test) if part is not None]
    tensors = [tensor for part in parts for tensor in part]
    tensors += [raw for raw in (data.raw, data.raw_validation) if raw is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
