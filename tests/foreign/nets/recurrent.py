"""Recurrent nets, which vmap cannot batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foreign.nets.case import Case, seeded


class Recurrent(nn.Module):
    """Embedded tokens, a recurrent layer, a norm, a head."""

    def __init__(self, layer: type[nn.RNNBase], **settings: object) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.rnn = layer(4, 4, batch_first=True, **settings)
        self.norm = nn.BatchNorm1d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.rnn(self.embed(tokens))
        return self.fc(self.norm(hidden[:, -1]))


class CellByCell(nn.Module):
    """A recurrence written out with a cell, over floating-point series."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(2, 5)
        self.norm = nn.BatchNorm1d(5)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 5)
        for step in x.unbind(1):
            h = self.cell(step, h)
        return self.fc(self.norm(h))


class Branching(nn.Module):
    """Takes one of two ways, depending on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.fc = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x))
        return self.fc(torch.tanh(h) if h.mean() > -100 else h)


class Masked(nn.Module):
    """Picks values by a mask, whose number depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.fc = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x))
        return self.fc(torch.tanh(h)) + 0.1 * h[h > 0].mean()


CASES = {
    "LSTM": Case(build=seeded(lambda: Recurrent(nn.LSTM)), shape=(4,), tokens=11),
    "GRU": Case(build=seeded(lambda: Recurrent(nn.GRU)), shape=(4,), tokens=11),
    "GRU cell": Case(build=seeded(CellByCell), shape=(4, 2)),
    "branch on data": Case(build=seeded(Branching), shape=(5,)),
    "boolean mask": Case(build=seeded(Masked), shape=(5,)),
    "LSTM with dropout": Case(
        build=seeded(lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.4)),
        shape=(4,),
        tokens=11,
        random=True,
    ),
}
