"""A question of the server to clients, a client's answer, and how many bytes each has when encoded.

Both hold plain tensors. :mod:`fedl2p.federation.flower` turns them into Flower's records; in this
process and on Ray nothing is encoded, and the bytes are those that the encoded form would have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Literal, Protocol

import numpy as np
import torch
from torch import nn

from fedl2p.core.functional.state_tensors import state_tensors
from fedl2p.method import Outcome, State, Update
from fedl2p.runs.columns import SCORES

Action = Literal["train", "validate", "personalize"]

WEIGHT = "num-examples"
"""Name of an update's weight among the numbers that travel, as Flower's strategies expect it."""

HALF = (torch.float16, torch.bfloat16)
"""Dtypes that travel as float32: NumPy has no bfloat16, and sums of halves lose digits."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.complex64, torch.complex128, torch.bool, torch.uint8),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
    )
}
"""Dtypes that can travel, by name."""


class FederationError(RuntimeError):
    """The rounds cannot go on: too many in a row had too few good answers, or no worker runs."""


class UnknownModelError(LookupError):
    """A node lacks the global model that a question names, and the question does not bring it."""


@dataclass(frozen=True)
class FrozenModel:
    """The weights of a model that do not change for a whole stage.

    Parameters
    ----------
    weights
        By name; None where the receiver has them.
    key
        Their content hash.
    """

    weights: State | None
    key: str

    @classmethod
    def of(cls, model: nn.Module) -> FrozenModel:
        """Take the weights of a model."""
        weights = state_tensors(model)
        return cls(weights, content_hash(weights))


@dataclass(frozen=True, kw_only=True)
class Question:
    """What many clients are asked at once.

    Parameters
    ----------
    action
        train: one call of ``Method.train``; validate: judge the state; personalize.
    method
        Name of the method.
    stage, round
        Of which this is part; the round counts from 1 and is 0 outside the rounds.
    state
        What the method sends to every client.
    model
        The frozen global model. It travels to each client that does not have it, once.
    seeds
        The clients to ask, each with the seed of its randomness. The order counts: clients are cut
        into stacks by it.
    """

    action: Action
    method: str
    stage: str
    round: int
    state: State
    model: FrozenModel
    seeds: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One client's answer; exactly one of the first three after the name is given.

    Parameters
    ----------
    client
        Its name.
    update
        After train and validate: what travels, so without ``kept``.
    outcome
        After personalize: numbers alone.
    failure
        Why there is none, in one line.
    bytes_down, bytes_up
        Encoded size of all messages to and from the client.
    bytes_model
        The part of ``bytes_down`` that is the frozen model.
    """

    client: str
    update: Update | None = None
    outcome: Outcome | None = None
    failure: str | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    bytes_model: int = 0


class Clients(Protocol):
    """Where the clients of a study are: in this process, on Ray's workers, or on Flower's nodes.

    Use one object for a whole study: it knows which client has which global model, so that a model
    travels to each client once.
    """

    @property
    def simulated(self) -> bool:
        """Whether all clients are on this machine, run by this package's own code."""

    def ask(self, question: Question) -> Iterator[Answer]:
        """Yield one answer per client of the question, in any order.

        Raises
        ------
        ValueError
            If a client does not exist here.
        """

    def kept(self, method: str) -> dict[str, State]:
        """Return what clients keep for a method, where that is on this machine."""

    def restore(self, method: str, kept: Mapping[str, State]) -> None:
        """Set what clients keep for a method; a client that is not named keeps nothing.

        Nodes elsewhere are left alone.
        """

    def has_model(self, key: str) -> list[str] | None:
        """Return the clients that have a model, by its content hash, sorted; None for all."""

    def set_has_model(self, key: str, names: Sequence[str] | None) -> None:
        """Set which clients have a model; None for all. Nodes elsewhere know it themselves."""

    def close(self) -> None:
        """Stop what was started here."""


def one_line(reason: str, *, most: int = 300) -> str:
    """Return a reason as it may stand in a log: printable, in one line, not longer than ``most``.

    Reasons come from other machines.
    """
    text = "".join(c if c.isprintable() else " " for c in reason[: 8 * most])
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def content_hash(state: State) -> str:
    """Return a BLAKE2b hash of the names, dtypes, shapes and bytes of a state, in hex.

    The order of the names does not matter.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():  # an empty one, such as the mixes of a model without norms, has no bytes
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def state_bytes(state: State) -> int:
    """Return the encoded size of named tensors: names, and each tensor in NumPy's file format.

    Raises
    ------
    ValueError
        If a tensor has a dtype that cannot travel.
    """
    return sum(
        len(name) + _tensor_bytes(tensor.dtype, tuple(tensor.shape))
        for name, tensor in state.items()
    )


def question_bytes(question: Question) -> int:
    """Return the encoded size of the message to one client, without the frozen model."""
    texts = {
        "method": question.method,
        "stage": question.stage,
        "model": question.model.key,
    }
    words = sum(len(key) + len(value) for key, value in texts.items())
    return state_bytes(question.state) + words + numbers_bytes(("round", "seed"))


def answer_bytes(answer: Answer) -> int:
    """Return the encoded size of an answer; a failure of a round travels without content."""
    if answer.outcome is not None:
        return numbers_bytes(SCORES)
    if answer.update is None:
        return 0
    numbers = numbers_bytes((WEIGHT, *answer.update.metrics))
    return numbers + state_bytes(answer.update.shared)


def numbers_bytes(names: Iterable[str]) -> int:
    """Return the encoded size of named numbers, 8 bytes each."""
    return sum(len(name) + 8 for name in names)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name under which a dtype travels.

    Raises
    ------
    ValueError
        If it cannot.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"a tensor of dtype {name} cannot travel; convert it to float32 first")
    return name


@lru_cache(maxsize=4096)
def _tensor_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    dtype_name(dtype)
    array = torch.empty(0, dtype=torch.float32 if dtype in HALF else dtype).numpy()
    buffer = BytesIO()
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return len(buffer.getvalue()) + int(np.prod(shape, dtype=np.int64)) * array.dtype.itemsize
