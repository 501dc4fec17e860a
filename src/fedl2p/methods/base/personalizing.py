"""What methods share: evaluation before and after, fine-tuning a cohort, its outcomes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fedl2p.core.clientdata import Examples
from fedl2p.core.finetuning.batches import EpochBatches, parts_of
from fedl2p.core.finetuning.in_place_sgd import Descent, moving
from fedl2p.core.finetuning.inner_loop import (
    batches_of,
    finite,
    folded,
    on,
    run_inner_loop,
    start_of,
)
from fedl2p.core.finetuning.stacking import Resident, evaluate, over_stacks, resident
from fedl2p.core.functional.copies import duplicate
from fedl2p.core.functional.inspection import inherit
from fedl2p.core.functional.model import Net, NetState
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.profiles import Profile
from fedl2p.core.settings import InnerLoop
from fedl2p.method import Client, Method, Outcome, State, Update
from fedl2p.methods.base.tensor_groups import per_client
from fedl2p.seeds import derive_seed

PROFILE_BATCH = 256
DIVERGED = "fine-tuning diverged: parameters are not finite; smaller rates are needed"

ForStack = Callable[[list[int]], tuple[Hyperparams, list[Profile] | None]]


def with_state(model: nn.Module, state: State) -> nn.Module:
    """Return a copy of ``model`` that holds the tensors of ``state``."""
    copied = duplicate(model)
    _, unexpected = copied.load_state_dict(state, strict=False)
    if unexpected:
        raise ValueError(f"the state holds {unexpected[0]!r}, which the model has not")
    inherit(copied, model)
    return copied


def validation_part(client: Client) -> Examples:
    """Return the validation part of a client, the training part if it has none."""
    return client.data.validation or client.data.train


def profile_of(work: Resident, client: Client) -> Profile:
    """Profile a client, or take the profile that it kept from an earlier call."""
    sites = work.net.sites
    if "profile.divergence" in client.kept:
        return Profile(
            client.kept["profile.divergence"].to(work.net.device),
            client.kept["profile.moments"].to(work.net.device),
            len(client.data.train.x),
            sites,
        )
    return work.profiler(client.data.train.x.split(PROFILE_BATCH))


def kept_profile(profile: Profile) -> State:
    """Return a profile as tensors that stay on the client."""
    return {
        "profile.divergence": profile.divergence.cpu(),
        "profile.moments": profile.moments.cpu(),
    }


def judge_global(model: nn.Module, clients: Sequence[Client]) -> list[Update]:
    """Judge the global model, as it is, on every client's validation part."""
    net = resident(model).net
    scores = evaluate_plain(net, clients, [validation_part(c) for c in clients])
    return [
        Update(c.name, weight=float(len(validation_part(c).x)), metrics=metrics_of(*score))
        for c, score in zip(clients, scores, strict=True)
    ]


def metrics_of(loss: float, accuracy: float) -> dict[str, float]:
    """Return the metrics of an update."""
    return {"loss": loss, "accuracy": accuracy}


def evaluate_plain(
    net: Net, clients: Sequence[Client], parts: Sequence[Examples]
) -> list[tuple[float, float]]:
    """Evaluate the net's own model, with global statistics, on one part per client."""
    start = net.start(len(clients), "global")
    return evaluate(net, start, same_mix(net, len(clients), 0.0), parts)


def same_mix(net: Net, clients: int, mix: float) -> Tensor:
    """Return the same mix in every norm layer of C clients, shape (C, B)."""
    shape = clients, len(net.sites.norms)
    return torch.full(shape, mix, device=net.device, dtype=net.dtype)


def tune(
    net: Net, clients: Sequence[Client], hyperparams: Hyperparams, inner: InnerLoop
) -> NetState:
    """Fine-tune a stack of clients; their batches are the same in every method."""
    batches = batches_of(
        net, [c.data for c in clients], [derive_seed(c.seed, "finetune") for c in clients], inner
    )
    validation = [c.data.validation for c in clients if c.data.validation is not None]
    if inner.early_stopping and len(validation) == len(clients):
        return _stopped_early(net, hyperparams, batches, validation, inner)
    return run_inner_loop(net, hyperparams, batches, statistics=inner.statistics)


def _stopped_early(
    net: Net,
    hyperparams: Hyperparams,
    batches: EpochBatches,
    validation: Sequence[Examples],
    inner: InnerLoop,
) -> NetState:
    """Return each client's state after its best epoch; a loss that is not finite never is."""

    def losses(state: NetState) -> Tensor:
        scores = torch.tensor([loss for loss, _ in evaluate(net, state, mix, validation)])
        return scores.nan_to_num(nan=math.inf)

    mix, rate = hyperparams.mix.detach(), hyperparams.rate.detach()
    best = start_of(net, len(mix), inner.statistics, steps=len(batches))
    lowest = losses(best)
    with Descent(net, best, mix, rate, wanted=moving(best, rate)) as way:
        for begin in range(0, len(batches), batches.per_epoch):
            for step in range(begin, begin + batches.per_epoch):
                for part in parts_of(batches, step):
                    way.step(part)
            loss = losses(way.state)
            best = per_client((loss < lowest).to(net.device), way.state, best)
            lowest = torch.minimum(lowest, loss)
    return best


@dataclass(frozen=True)
class Tuned:
    """The personal models of a stack of C clients.

    Parameters
    ----------
    state
        Their tensors.
    mix
        Of their norms in evaluation, shape (C, B).
    hyperparams
        What they were fine-tuned with, where that says it all; None otherwise.
    profiles
        Where the hyperparameters come from, if there are any.
    """

    state: NetState
    mix: Tensor
    hyperparams: Hyperparams | None = None
    profiles: Sequence[Profile] | None = None


def personalize_with(
    model: nn.Module,
    clients: Sequence[Client],
    inner: InnerLoop,
    choose: ForStack,
    *,
    ragged: bool = True,
) -> list[Outcome]:
    """Fine-tune every client from ``model`` and evaluate before and after, where it has test data.

    ``choose`` is given the positions of a stack of clients and returns their hyperparameters,
    stacked, and their profiles if it made any; its time counts. ``ragged`` tells whether it takes
    clients with unequally many examples.
    """
    net = resident(model).net
    final = final_clients(clients, inner)

    def tuned(members: list[int]) -> Tuned:
        hyperparams, profiles = choose(members)
        hyperparams = on(net, hyperparams)
        state = tune(net, [final[i] for i in members], hyperparams, inner)
        return Tuned(state, hyperparams.mix, hyperparams, profiles)

    start = net.start(len(clients), "global")
    return outcomes(net, final, start, same_mix(net, len(clients), 0.0), tuned, ragged=ragged)


def final_clients(clients: Sequence[Client], inner: InnerLoop) -> list[Client]:
    """Return the clients with the data that the last fine-tuning reads.

    Clients whose shapes agreed before agree afterwards, and the other way round.
    """
    return [replace(c, data=inner.final_data(c.data)) for c in clients]


def outcomes(
    net: Net,
    clients: Sequence[Client],
    start: NetState,
    mix: Tensor,
    tuned: Callable[[list[int]], Tuned],
    *,
    ragged: bool,
) -> list[Outcome]:
    """Evaluate every client before and after personalization; one outcome each, in order.

    Parameters
    ----------
    start, mix
        What the clients have without fine-tuning.
    tuned
        Given the positions of a stack of clients, returns their personal models; its time counts.
    ragged
        Whether it takes clients with unequally many examples.
    """
    tests = [_test_part(c) for c in clients]
    before = evaluate(net, start, mix, tests)

    def stack(members: list[int]) -> list[Outcome]:
        began = time.perf_counter()
        made = tuned(members)
        seconds = time.perf_counter() - began
        examples = sum(len(clients[i].data.train.x) for i in members)
        sound = finite(made.state).tolist()
        after = evaluate(net, made.state, made.mix, [tests[i] for i in members])
        return [
            Outcome(
                clients[i].name,
                len(clients[i].data.train.x),
                len(tests[i].x),
                accuracy_before=before[i][1],
                accuracy=after[j][1],
                loss_before=before[i][0],
                loss=after[j][0],
                seconds=seconds * len(clients[i].data.train.x) / examples,
                hyperparams=None if made.hyperparams is None else made.hyperparams[j],
                profile=None if made.profiles is None else made.profiles[j],
                model=folded(net, made.state, made.mix, j)
                if sound[j] and clients[i].wants_model
                else None,
                failure=None if sound[j] else DIVERGED,
            )
            for j, i in enumerate(members)
        ]

    return over_stacks(net, [c.data for c in clients], stack, ragged=ragged)


def uniform(
    net: Net, clients: int, *, mix: float, rate: float, only: Collection[str] | None = None
) -> Hyperparams:
    """Return the same mix in all norms and the same rate for all tensors, for C clients.

    With ``only``, tensors of other names get rate 0 and so stay as they are.
    """
    one = Hyperparams.constant(net.sites, mix=mix, rate=rate)
    if only is not None:
        moves = torch.tensor([name in only for name in net.sites.params])
        one = replace(one, rate=torch.where(moves, one.rate, torch.zeros(())))
    return on(net, Hyperparams.stack([one] * clients))


def constant_for(
    net: Net, mix: float, rate: float, only: Collection[str] | None = None
) -> ForStack:
    """Give every client the same mix in all norms and the same rate for all tensors."""

    def choose(members: list[int]) -> tuple[Hyperparams, None]:
        return uniform(net, len(members), mix=mix, rate=rate, only=only), None

    return choose


def pick(
    points: Sequence[tuple[float, float]], losses: Tensor, accuracies: Tensor, criterion: str
) -> tuple[float, float]:
    """Return the grid point of lowest loss, or of highest accuracy (ties by loss)."""
    losses = losses.nan_to_num(nan=float("inf"), posinf=float("inf"))
    if criterion == "accuracy":
        losses = torch.where(
            accuracies >= accuracies.max(), losses, torch.full_like(losses, float("inf"))
        )
    return points[int(losses.argmin())]


def _test_part(client: Client) -> Examples:
    """Return the test part of a client; no examples, on which every score is NaN, without one."""
    if client.data.test is None:
        return Examples(client.data.train.x[:0], client.data.train.y[:0])
    return client.data.test


@dataclass(frozen=True, kw_only=True)
class WithoutRounds(Method):
    """A method that learns nothing from others: each client is personalized by itself."""

    @property
    def rounds(self) -> Literal["none", "one"]:
        """It has no federated training."""
        return "none"

    def start(self, model: nn.Module, *, seed: int = 0) -> State:
        """Return an empty state."""
        return {}

    def train(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        """Judge the model as it is; there is nothing to learn."""
        return judge_global(model, clients)
