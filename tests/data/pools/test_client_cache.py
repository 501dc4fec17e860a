"""The LRU cache of opened clients."""

from __future__ import annotations

import torch

from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.data.pools.client_cache import ClientCache, size_of


def client(rows: int) -> ClientData:
    return ClientData(Examples(torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.int64)))


def test_opened_clients_are_kept_up_to_a_number_of_bytes() -> None:
    loaded: list[str] = []

    def load(name: str) -> ClientData:
        loaded.append(name)
        return client(int(name[1:]))

    each = size_of(client(10))
    assert each == 10 * (4 * 4 + 8)
    cache = ClientCache(load, keep_bytes=2 * each)
    a = cache("a10")
    cache("b10")
    assert cache("a10") is a  # and b is now the least recently opened
    cache("c10")
    cache("a10")
    assert loaded == ["a10", "b10", "c10"]
    cache("b10")
    assert loaded[-1] == "b10"
    for _ in range(2):
        assert len(cache("d100").train.x) == 100
    assert loaded[-2:] == ["d100", "d100"]
    cache("a10")
    assert cache("a10") is cache("a10")
