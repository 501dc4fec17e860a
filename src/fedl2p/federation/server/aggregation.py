"""Many updates become one state: their mean, and a server optimizer's step towards it.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv 2003.00295, algorithm 2: the mean
update is the gradient of an optimizer of the server. With m the mean of what clients sent and s the
state that they received, the gradient is s - m. FedAvgM is SGD with momentum, FedAdagrad Adagrad,
FedAdam Adam, each as torch has it. Departure: Adam with the usual bias correction, which the paper
leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from statistics import median
from typing import Protocol

import torch
from torch import Tensor

from fedl2p.core.functional.state_tensors import on_cpu
from fedl2p.federation.server.answer_checks import not_finite
from fedl2p.federation.settings import Rounds
from fedl2p.federation.updates import clip, difference, like, moved, norm
from fedl2p.method import State, Update

Rule = Callable[[State, Sequence[Update]], State | None]
"""A robust rule: the state that it makes of the updates, or None if they are too few for it."""


class Mean(Protocol):
    """What becomes of the updates of a round."""

    def add(self, update: Update) -> None:
        """Add a checked update; updates come in the order of the clients' names."""

    def result(self) -> State | None:
        """Return what they make, or None if they are too few."""


class WeightedMean:
    """The mean weighted by each update's weight, as a running sum in float64.

    Its memory is that of one state, however many updates there are.

    Parameters
    ----------
    state
        The state that was sent.
    clip_norm
        Largest L2 norm of an update; 0 for no bound.
    """

    def __init__(self, state: State, *, clip_norm: float = 0.0) -> None:
        self._state, self._clip_norm = state, clip_norm
        self._weight = 0.0
        self._sums = [
            torch.zeros(
                t.shape, dtype=torch.complex128 if t.is_complex() else torch.float64, device="cpu"
            )
            for t in state.values()
        ]

    def add(self, update: Update) -> None:
        """Add an update."""
        update = clipped(self._state, update, self._clip_norm)
        tensors = [on_cpu(update.shared[name]) for name in self._state]
        if tensors:
            torch._foreach_add_(self._sums, tensors, alpha=update.weight)
        self._weight += update.weight

    def result(self) -> State | None:
        """Return the mean, or None without any update."""
        if not self._weight:
            return None
        pairs = zip(self._state.items(), self._sums, strict=True)
        return {name: like(total / self._weight, tensor) for (name, tensor), total in pairs}


class RuleOfAll:
    """A rule that compares updates with one another, and so holds them all."""

    def __init__(self, state: State, rule: Rule) -> None:
        self._state, self._rule = state, rule
        self._updates: list[Update] = []

    def add(self, update: Update) -> None:
        """Add an update."""
        self._updates.append(update)

    def result(self) -> State | None:
        """Return what the rule makes."""
        return self._rule(self._state, self._updates)


def norm_clipping(rounds: Rounds) -> Rule:
    """Return the plain mean of updates of bounded norm (Sun et al., 2019, arXiv 1911.07963).

    The bound is ``rounds.clip_norm``, or with 0 the median norm of the round's updates.
    """

    def rule(state: State, updates: Sequence[Update]) -> State | None:
        if len(updates) < rounds.fewest:
            return None
        bound = rounds.clip_norm or median(norm(difference(state, u.shared)) for u in updates)
        mean = WeightedMean(state)
        for update in updates:
            mean.add(replace(clipped(state, update, bound), weight=1.0))
        return mean.result()

    return rule


def clipped(state: State, update: Update, bound: float) -> Update:
    """Return an update whose difference to the state has at most that L2 norm; 0 for no bound."""
    if not bound:
        return update
    change = difference(state, update.shared)
    return replace(update, shared=moved(state, change)) if clip(change, bound) else update


class ServerOptimizer:
    """The step from a state towards the mean of a round's updates, and what it remembers.

    Parameters
    ----------
    rounds
        Names the strategy and its settings.
    buffers
        Names of tensors that are no parameters (running statistics): they become the mean, since a
        step can make a variance negative. Integers become the mean, rounded, under every strategy.
    variances
        Names of tensors that are never below 0: noise, a step or a hostile client could push a
        running variance there, and the model with it into NaN.
    """

    def __init__(
        self, rounds: Rounds, *, buffers: Collection[str] = (), variances: Collection[str] = ()
    ) -> None:
        self._rounds = rounds
        self._buffers, self._variances = frozenset(buffers), frozenset(variances)
        self.memory: State = {"steps": torch.tensor(0)}
        """What continuing needs: the number of steps, and the optimizer's state by tensor."""

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return int(self.memory["steps"])

    def step(self, state: State, mean: State) -> State:
        """Return the next state; names, shapes and dtypes are those of ``state``.

        Raises
        ------
        ArithmeticError
            If the result is not finite; what the optimizer remembers is then as before.
        """
        memory = dict(self.memory)
        new = dict(mean)
        for name, old in state.items() if self._rounds.strategy != "fedavg" else ():
            if old.is_floating_point() and name not in self._buffers:
                try:
                    new[name] = like(self._stepped(name, old, mean[name], memory), old)
                except RuntimeError as error:  # a rate that the tensor's dtype does not hold
                    raise ArithmeticError(
                        f"the combined answers overflow in tensor {name!r}"
                    ) from error
        memory["steps"] = memory["steps"] + 1
        if (overflown := not_finite(new) or not_finite(memory)) is not None:
            raise ArithmeticError(f"the combined answers overflow in tensor {overflown!r}")
        self.memory = memory
        return {name: t.clamp(min=0) if name in self._variances else t for name, t in new.items()}

    def _stepped(self, name: str, old: Tensor, mean: Tensor, memory: State) -> Tensor:
        """Take a step of one tensor, and note what is remembered of it in ``memory``."""
        # torch's optimizers as functions: their classes import torch._dynamo, about 2 s.
        from torch.optim.adagrad import adagrad
        from torch.optim.adam import adam
        from torch.optim.sgd import sgd

        rounds = self._rounds
        rate = rounds.server_rate_at(self.steps)
        dtype = torch.float64 if old.dtype == torch.float64 else torch.float32
        param = old.detach().to("cpu", dtype, copy=True)
        gradient = param - mean.to("cpu", dtype)

        def remembered(key: str) -> Tensor:
            tensor = memory.get(f"{key}/{name}")
            tensor = torch.zeros_like(param) if tensor is None else tensor.clone()
            memory[f"{key}/{name}"] = tensor
            return tensor

        step = [torch.tensor(float(self.steps))]
        match rounds.strategy:
            case "fedavgm":
                sgd(
                    [param],
                    [gradient],
                    [remembered("momentum")],
                    weight_decay=0.0,
                    momentum=rounds.server_beta1,
                    lr=rate,
                    dampening=0.0,
                    nesterov=False,
                    maximize=False,
                    foreach=False,
                )
            case "fedadagrad":
                adagrad(
                    [param],
                    [gradient],
                    [remembered("squares")],
                    step,
                    lr=rate,
                    weight_decay=0.0,
                    lr_decay=0.0,
                    eps=rounds.server_tau,
                    maximize=False,
                    foreach=False,
                )
            case "fedadam":
                adam(
                    [param],
                    [gradient],
                    [remembered("first")],
                    [remembered("second")],
                    [],
                    step,
                    amsgrad=False,
                    beta1=rounds.server_beta1,
                    beta2=rounds.server_beta2,
                    lr=rate,
                    weight_decay=0.0,
                    eps=rounds.server_tau,
                    maximize=False,
                    foreach=False,
                )
        return param
