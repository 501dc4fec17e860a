"""Many answers become one state: Flower's strategies, with the dtypes and shapes kept."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from torch import Tensor

from fedl2p.federation.flower import records
from fedl2p.federation.privacy.noise import PrivateMean
from fedl2p.federation.server import robust
from fedl2p.federation.server.answer_checks import not_finite
from fedl2p.federation.server.clipping import clipped, like
from fedl2p.federation.server.replies import Reply
from fedl2p.federation.settings import SERVER_OPTIMIZERS, Rounds
from fedl2p.method import State


class Aggregator:
    """Combines the answers of a round, and holds what a server optimizer remembers between rounds.

    Parameters
    ----------
    rounds
        Names the strategy and its settings.
    buffers
        Names of tensors that are no parameters (running statistics): a server optimizer averages
        them instead of stepping, since a step can make a variance negative. Integer tensors are
        averaged and rounded under every strategy.
    variances
        Names of tensors that are never below 0: noise, a server optimizer or a hostile client
        could push a running variance there, and the model with it into NaN.
    private
        The noised mean that takes the place of the plain one, under central privacy.

    Notes
    -----
    FedAdam is Adam with the usual bias correction: Flower 1.41 corrects round r with the exponent
    r + 1, so it is told the number of steps before this one.
    """

    def __init__(
        self,
        rounds: Rounds,
        *,
        buffers: Collection[str] = (),
        variances: Collection[str] = (),
        private: PrivateMean | None = None,
    ) -> None:
        self._rounds = rounds
        self._variances = frozenset(variances)
        self._private = private
        self._strategy = _strategy(rounds)
        self._averaged = frozenset(buffers) if rounds.strategy in SERVER_OPTIMIZERS else frozenset()
        self._steps = 0

    def combine(self, state: State, replies: Sequence[Reply]) -> State | None:
        """Return the next state, or None if the strategy finds the answers too few.

        Parameters
        ----------
        state
            The state that was sent; names, shapes and dtypes of the result are the same.
        replies
            Checked answers. Their order does not matter: they are sorted by client first, since
            the order of a floating-point sum does. Tensors that lie in a file are read one at a
            time as the sum goes on; robust rules and ``clip_norm`` compare replies with one
            another and hold them all.

        Raises
        ------
        ArithmeticError
            If the result is not finite; what a server optimizer remembers is then as before.
        """
        before = self.memory()
        combined = self._combined(state, replies)
        if combined is None:
            return None
        if (name := not_finite(combined) or not_finite(self.memory())) is not None:
            self.remember(before)
            raise ArithmeticError(f"the combined answers overflow in tensor {name!r}")
        return combined

    def _combined(self, state: State, replies: Sequence[Reply]) -> State | None:
        ordered = self._prepared(state, sorted(replies, key=lambda reply: reply.client))
        if ordered is None:
            return None
        stepped = [
            name
            for name, tensor in state.items()
            if tensor.is_floating_point() and name not in self._averaged
        ]
        averaged = [name for name in state if name not in set(stepped)]
        combined: dict[str, Tensor] = {}
        for strategy, names in ((self._strategy, stepped), (flower.FedAvg(), averaged)):
            if not names:
                continue
            if isinstance(strategy, flower.FedAdam | flower.FedYogi):
                strategy.eta = self._rounds.server_rate_at(self._steps)
                strategy.current_arrays = {name: records.payload(state[name]) for name in names}
            # What overflows is found and named above.
            with robust.quiet_flower(), np.errstate(over="ignore", invalid="ignore"):
                arrays, _ = strategy.aggregate_train(self._steps, _messages(ordered, names))
            if arrays is None:
                return None
            combined |= {name: torch.from_numpy(np.array(arrays[name].numpy())) for name in names}
        self._steps += 1
        new = {name: like(combined[name], tensor) for name, tensor in state.items()}
        return {name: t.clamp(min=0) if name in self._variances else t for name, t in new.items()}

    def _prepared(self, state: State, replies: list[Reply]) -> list[Reply] | None:
        """Return what the strategy is given: the answers, or the one that stands for them all."""
        if self._private is not None:
            return [_one(self._private.combine(state, replies, step=self._steps))]
        if self._rounds.robust != "none":
            one = robust.combined(self._rounds, state, replies)
            return None if one is None else [_one(one)]
        if self._rounds.clip_norm:
            return clipped(state, replies, self._rounds.clip_norm)
        return replies

    def memory(self) -> State:
        """Return what a server optimizer remembers, as tensors."""
        memory: State = {"steps": torch.tensor(self._steps)}
        if self._private is not None:
            memory["bound"] = torch.tensor(self._private.bound, dtype=torch.float64)
        for moment in ("m_t", "v_t"):
            for name, array in (getattr(self._strategy, moment, None) or {}).items():
                memory[f"{moment}/{name}"] = torch.from_numpy(np.array(array))
        return memory

    def remember(self, memory: State) -> None:
        """Set what :meth:`memory` returned."""
        self._steps = int(memory["steps"])
        if self._private is not None:
            self._private.bound = float(memory["bound"])
        for moment in ("m_t", "v_t"):
            arrays = {
                name.removeprefix(f"{moment}/"): tensor.numpy()
                for name, tensor in memory.items()
                if name.startswith(f"{moment}/")
            }
            if hasattr(self._strategy, moment):
                setattr(self._strategy, moment, arrays or None)


def _strategy(rounds: Rounds) -> flower.FedAvg:
    adaptive: dict[str, Any] = {
        "eta": rounds.server_rate,
        "beta_1": rounds.server_beta1,
        "beta_2": rounds.server_beta2,
        "tau": rounds.server_tau,
    }
    match rounds.strategy:
        case "fedavg":
            return flower.FedAvg()
        case "fedadam":
            return flower.FedAdam(**adaptive)
        case "fedyogi":
            return flower.FedYogi(**adaptive)


def _one(state: State) -> Reply:
    return Reply("", state, 1.0, {})


def _messages(replies: Sequence[Reply], names: Sequence[str]) -> list[Message]:
    messages = []
    for reply in replies:
        arrays = ArrayRecord()
        for name in names:
            arrays[name] = records.array_of(reply.shared, name)
        metrics = MetricRecord({records.WEIGHT: float(reply.weight)})
        content = RecordDict({records.ARRAYS: arrays, records.METRICS: metrics})
        messages.append(Message(content, dst_node_id=1, message_type=records.TRAIN))
    return messages
