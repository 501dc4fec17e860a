"""Personalization shared by methods: fine-tuning stacks of clients, evaluation before and after."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fedl2p.core.clientdata import Examples
from fedl2p.core.finetuning.batches import EpochBatches, step_batches
from fedl2p.core.finetuning.evaluation import evaluate
from fedl2p.core.finetuning.in_place_sgd import InPlaceSGD, trainable
from fedl2p.core.finetuning.inner_loop import (
    all_finite,
    fold_client,
    initial_state,
    inner_batches,
    run_inner_loop,
)
from fedl2p.core.finetuning.optimizers import optimizer_of
from fedl2p.core.finetuning.stacking import map_stacks
from fedl2p.core.functional.copies import duplicate
from fedl2p.core.functional.inspection import inherit
from fedl2p.core.functional.model import FunctionalModel, ModelState
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.profile_groups import GROUPS
from fedl2p.core.profiles import Profile
from fedl2p.core.settings import PUBLISHED_PROFILE, InnerLoop, ProfileGroup
from fedl2p.core.sites import Sites
from fedl2p.core.working_copies import WorkingCopies, working_copies
from fedl2p.method import Client, Method, Outcome, State, Update
from fedl2p.methods.base.tensor_groups import where
from fedl2p.seeds import derive_seed

PROFILE_BATCH = 256
REMEDY = "smaller rates are needed"
DIVERGED = f"fine-tuning diverged: parameters are not finite; {REMEDY}"

Choose = Callable[[Sequence[Client]], tuple[Hyperparams, list[Profile] | None]]
"""Chooses the hyperparameters of a stack of clients; with their profiles, if it made any."""


def model_with_state(model: nn.Module, state: State) -> nn.Module:
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


def profile_of(work: WorkingCopies, client: Client, groups: Collection[ProfileGroup]) -> Profile:
    """Return the profile that a client kept from an earlier call, or profile it.

    It has at least the groups that are named.
    """
    fields = {GROUPS[g].field for g in (*PUBLISHED_PROFILE, *groups)}
    if all(f"profile.{field}" in client.kept for field in fields):
        return Profile(
            **{f: client.kept[f"profile.{f}"].to(work.net.device) for f in fields},
            num_examples=client.data.train.num,
            sites=work.net.sites,
        )
    return work.profiler(client.data.train.batches(PROFILE_BATCH), groups)


def kept_profile(profile: Profile) -> State:
    """Return a profile as tensors that stay on the client."""
    return {f"profile.{field}": value.cpu() for field, value in profile.tensors().items()}


def profile_in(kept: State, sites: Sites) -> Profile:
    """Return the profile among what a client keeps; how many examples it is of is not kept."""
    start = "profile."
    tensors = {k.removeprefix(start): v for k, v in kept.items() if k.startswith(start)}
    return Profile(**tensors, num_examples=0, sites=sites)


def metrics_of(loss: float, accuracy: float) -> dict[str, float]:
    """Return the metrics of an update; without an accuracy where the loss has none (NaN)."""
    return {"loss": loss} if math.isnan(accuracy) else {"loss": loss, "accuracy": accuracy}


def evaluation_updates(
    clients: Sequence[Client],
    parts: Sequence[Examples],
    scores: Sequence[tuple[float, float]],
) -> list[Update]:
    """Return updates that hold the loss and accuracy of each client on its part, no tensors."""
    return [
        Update(c.name, weight=float(part.num), metrics=metrics_of(*score))
        for c, part, score in zip(clients, parts, scores, strict=True)
    ]


def evaluate_global(model: nn.Module, clients: Sequence[Client]) -> list[Update]:
    """Evaluate the global model, as it is, on every client's validation part."""
    net = working_copies(model).net
    parts = [validation_part(c) for c in clients]
    start = net.start(len(clients), "global")
    mix = constant_mix(net, len(clients), 0.0)
    return evaluation_updates(clients, parts, evaluate(net, start, mix, parts))


def constant_mix(net: FunctionalModel, clients: int, mix: float) -> Tensor:
    """Return the same mix in every norm layer of C clients, shape (C, B)."""
    shape = clients, len(net.sites.norms)
    return torch.full(shape, mix, device=net.device, dtype=net.dtype)


def constant_hyperparams(
    net: FunctionalModel,
    clients: int,
    *,
    mix: float,
    rate: float,
    only: Collection[str] | None = None,
) -> Hyperparams:
    """Return the same mix in all norms and the same rate for all tensors, for C clients.

    With ``only``, tensors of other names get rate 0 and so stay as they are.
    """
    one = Hyperparams.constant(net.sites, mix=mix, rate=rate)
    if only is not None:
        trains = torch.tensor([name in only for name in net.sites.params])
        one = replace(one, rate=torch.where(trains, one.rate, torch.zeros(())))
    one = one.to(net.device, net.dtype)
    mixes, rates = one.mix.repeat(clients, 1), one.rate.repeat(clients, 1)
    return Hyperparams(mixes, rates, net.sites, check=False)


def choose_constant(
    net: FunctionalModel, mix: float, rate: float, only: Collection[str] | None = None
) -> Choose:
    """Return what chooses the same mix for all norms and the same rate for all tensors."""

    def choose(clients: Sequence[Client]) -> tuple[Hyperparams, None]:
        return constant_hyperparams(net, len(clients), mix=mix, rate=rate, only=only), None

    return choose


def finetune_stack(
    net: FunctionalModel, clients: Sequence[Client], hyperparams: Hyperparams, inner: InnerLoop
) -> ModelState:
    """Fine-tune a stack of clients; their batches are the same in every method."""
    batches = inner_batches(
        net, [c.data for c in clients], [derive_seed(c.seed, "finetune") for c in clients], inner
    )
    validation = [c.data.validation for c in clients if c.data.validation is not None]
    if inner.early_stopping and len(validation) == len(clients):
        return _finetune_with_early_stopping(net, hyperparams, batches, validation, inner)
    return run_inner_loop(
        net, hyperparams, batches, statistics=inner.statistics, optimizer=optimizer_of(inner)
    )


def _finetune_with_early_stopping(
    net: FunctionalModel,
    hyperparams: Hyperparams,
    batches: EpochBatches,
    validation: Sequence[Examples],
    inner: InnerLoop,
) -> ModelState:
    """Return each client's state after the epoch of lowest loss; NaN and infinity are never low."""

    def losses(state: ModelState) -> Tensor:
        scores = torch.tensor([loss for loss, _ in evaluate(net, state, mix, validation)])
        return scores.nan_to_num(nan=math.inf)

    mix, rate = hyperparams.mix.detach(), hyperparams.rate.detach()
    best = initial_state(net, len(mix), inner.statistics, steps=len(batches))
    lowest = losses(best)
    names, optimizer = trainable(best, rate), optimizer_of(inner)
    with InPlaceSGD(net, best, mix, rate, trainable=names, optimizer=optimizer) as sgd:
        for begin in range(0, len(batches), batches.per_epoch):
            for step in range(begin, begin + batches.per_epoch):
                for batch in step_batches(batches, step):
                    sgd.step(batch)
            loss = losses(sgd.state)
            best = where((loss < lowest).to(net.device), sgd.state, best)
            lowest = torch.minimum(lowest, loss)
    return best


@dataclass(frozen=True)
class PersonalModels:
    """The personal models of a stack of C clients.

    Parameters
    ----------
    state
        Their tensors.
    mix
        Of their norms in evaluation, shape (C, B).
    hyperparams
        What they were fine-tuned with, where that describes it completely; None otherwise.
    profiles
        What the hyperparameters were made from, if they were made from profiles.
    """

    state: ModelState
    mix: Tensor
    hyperparams: Hyperparams | None = None
    profiles: Sequence[Profile] | None = None


def personalize_with(
    model: nn.Module,
    clients: Sequence[Client],
    inner: InnerLoop,
    choose: Choose,
    *,
    unequal_sizes: bool = True,
) -> list[Outcome]:
    """Fine-tune every client from ``model`` with hyperparameters that are chosen for its stack.

    The time of ``choose`` counts. ``unequal_sizes`` tells whether it takes clients with unequally
    many examples.
    """
    net = working_copies(model).net
    given = {c.name: c for c in clients}  # choosing reads other data than the last fine-tuning

    def personalize_stack(final: Sequence[Client]) -> PersonalModels:
        hyperparams, profiles = choose([given[c.name] for c in final])
        hyperparams = hyperparams.to(net.device, net.dtype)
        state = finetune_stack(net, final, hyperparams, inner)
        return PersonalModels(state, hyperparams.mix, hyperparams, profiles)

    return personal_outcomes(
        net,
        with_final_data(clients, inner),
        net.start(len(clients), "global"),
        constant_mix(net, len(clients), 0.0),
        personalize_stack,
        unequal_sizes=unequal_sizes,
    )


def with_final_data(clients: Sequence[Client], inner: InnerLoop) -> list[Client]:
    """Return the clients with the data that the last fine-tuning reads.

    Clients have equal shapes afterwards if and only if they had before.
    """
    return [replace(c, data=inner.final_data(c.data)) for c in clients]


def personal_outcomes(
    net: FunctionalModel,
    clients: Sequence[Client],
    start: ModelState,
    mix: Tensor,
    personalize_stack: Callable[[Sequence[Client]], PersonalModels],
    *,
    unequal_sizes: bool,
) -> list[Outcome]:
    """Evaluate every client before and after personalization; one outcome each, in order.

    Parameters
    ----------
    net
        The model.
    clients
        With the data that the last fine-tuning reads.
    start, mix
        What the clients have without fine-tuning.
    personalize_stack
        Returns the personal models of a stack of clients; its time counts.
    unequal_sizes
        Whether it takes clients with unequally many examples.
    """
    tests = [_test_part(c) for c in clients]
    before = evaluate(net, start, mix, tests)

    def stack(
        clients: Sequence[Client],
        tests: Sequence[Examples],
        before: Sequence[tuple[float, float]],
    ) -> list[Outcome]:
        began = time.perf_counter()
        made = personalize_stack(clients)
        seconds = time.perf_counter() - began
        examples = sum(c.data.train.num for c in clients)
        after = evaluate(net, made.state, made.mix, tests)
        failures = [
            _failure(finite, score, part)
            for finite, score, part in zip(
                all_finite(made.state).tolist(), after, tests, strict=True
            )
        ]
        return [
            Outcome(
                client=client.name,
                num_train=client.data.train.num,
                num_test=tests[j].num,
                accuracy_before=before[j][1],
                accuracy=after[j][1],
                loss_before=before[j][0],
                loss=after[j][0],
                seconds=seconds * client.data.train.num / examples,
                hyperparams=None if made.hyperparams is None else made.hyperparams[j],
                profile=None if made.profiles is None else made.profiles[j],
                model=fold_client(net, made.state, made.mix, j)
                if failures[j] is None and client.wants_model
                else None,
                failure=failures[j],
            )
            for j, client in enumerate(clients)
        ]

    data = [c.data for c in clients]
    return map_stacks(stack, net, data, clients, tests, before, unequal_sizes=unequal_sizes)


def _failure(finite: bool, score: tuple[float, float], test: Examples) -> str | None:
    """Return why a personal model is none, in one line, or None.

    Finite tensors are not enough: a running variance of 1e38 and weights to match give outputs
    that are not.
    """
    if not finite:
        return DIVERGED
    if test.num and not math.isfinite(score[0]):
        return f"fine-tuning diverged: the loss on the test part is {score[0]}; {REMEDY}"
    return None


def _test_part(client: Client) -> Examples:
    """Return the test part of a client; no examples, on which every score is NaN, without one."""
    if client.data.test is None:
        return client.data.train.take(slice(0))
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
        """Evaluate the model as it is; there is nothing to learn."""
        return evaluate_global(model, clients)
