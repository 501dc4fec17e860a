"""FedL2P: federated meta-nets that tell each client how to fine-tune.

Lee, Kim, Li, Qiu, Hospedales, Huszar, Lane, "FedL2P: Federated Learning to Personalize", NeurIPS
2023, arXiv 2310.02420, algorithm 1.

Two meta-nets, federated over all clients, read a client's profile and write its fine-tuning
hyperparameters (equations 2 and 3). In a round, each client of the cohort takes some outer steps:
it fine-tunes the frozen global model with the hyperparameters that the received nets write for it
(equation 1), and moves the nets down the hypergradient of its validation loss; the server averages
the nets by number of validation examples. Nothing else travels.

Departures, all settings of :class:`fedl2p.methods.base.settings.MetaLearning` whose ``published()``
restores the paper's: the estimator of the hypergradient
(:mod:`fedl2p.core.hypergradients.estimators`), the form of the nets (:mod:`fedl2p.core.metanets`),
one outer step on the whole validation part, whose clipped hypergradient a server optimizer
(FedAdam) applies, one profile of clean data that the client keeps, and metrics of the received
nets, so that the best round is chosen on losses measured after aggregation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedl2p.core import trees
from fedl2p.core.clientdata import Examples
from fedl2p.core.finetuning.batches import StackBatch
from fedl2p.core.finetuning.evaluation import evaluate
from fedl2p.core.finetuning.inner_loop import inner_batches
from fedl2p.core.finetuning.optimizers import optimizer_of
from fedl2p.core.finetuning.stacking import map_stacks
from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.hypergradients.estimators import UNEQUAL_SIZES, stack_hypergradient
from fedl2p.core.hypergradients.problem import Problem
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.metanets import MetaNets
from fedl2p.core.profiles import Profile
from fedl2p.core.settings import InnerLoop
from fedl2p.core.sites import Sites, find_sites
from fedl2p.core.working_copies import working_copies
from fedl2p.method import Client, Method, Outcome, State, Update
from fedl2p.methods.base.personalizing import (
    evaluation_updates,
    finetune_stack,
    kept_profile,
    metrics_of,
    personalize_with,
    profile_of,
    validation_part,
)
from fedl2p.methods.base.settings import MetaLearning, Settings
from fedl2p.seeds import derive_seed, generator


class MetaLearner:
    """The outer loop of a stack of C clients, each with meta-net weights of its own.

    Parameters
    ----------
    net
        The frozen global model.
    nets
        The meta-nets' form; their weights are given to :meth:`run`.
    meta, inner
        Settings of outer and inner loop.
    optimizer
        Of the outer steps.
    steps
        Outer steps; None for as many as ``meta`` says.
    rate
        Learning rate of the outer steps; None for those of ``meta``.
    """

    def __init__(
        self,
        net: FunctionalModel,
        nets: MetaNets,
        meta: MetaLearning,
        inner: InnerLoop,
        *,
        optimizer: Literal["sgd", "adam"] = "sgd",
        steps: int | None = None,
        rate: float | None = None,
    ) -> None:
        self.net, self.nets, self.meta, self.inner = net, nets, meta, inner
        self.optimizer, self.steps, self.rate = optimizer, steps, rate

    @property
    def unequal_sizes(self) -> bool:
        """Whether the clients of a stack may have unequally many examples.

        Not where that gives them unequally many outer steps, nor under estimators that take second
        derivatives on one batch of all clients.
        """
        return self.meta.hypergradient.mode in UNEQUAL_SIZES and not self.meta.validation_batch

    def run(
        self, states: Sequence[State], clients: Sequence[Client], profiles: Sequence[Profile]
    ) -> list[tuple[State, dict[str, float]]]:
        """Take the outer steps of a stack of clients.

        Parameters
        ----------
        states
            Every client's meta-nets before the first step.
        clients, profiles
            The clients and their profiles.

        Returns
        -------
        list of (state, metrics)
            Every client's meta-nets after the last step, and ``loss`` and ``accuracy``: of the
            first ones where the first step sees the whole validation part, otherwise the mean over
            the first pass, while they change (as published).
        """
        for client in clients:
            if client.data.validation is None:
                raise ValueError(
                    f"client {client.name!r} has no validation part, on which meta-nets are "
                    "learned; give it one"
                )
        net, config = self.net, self.meta.hypergradient
        weights = {
            k: torch.stack([s[k] for s in states]).to(net.device).requires_grad_()
            for k, _ in self.nets.named_parameters()
        }
        take_step = self._outer_steps(weights)
        profile = Profile.stack(list(profiles))
        data = [c.data for c in clients]
        scores: list[tuple[Tensor, Tensor]] = []
        validation = self._validation_batches(clients)
        for step, of_step in enumerate(validation):
            hyperparams = self.nets.per_client(weights, profile)
            seeds = [derive_seed(c.seed, "inner", step) for c in clients]
            batches = inner_batches(net, data, seeds, self.inner, align="end")
            problem = Problem(
                net=net,
                mix=hyperparams.mix.detach().to(net.device, net.dtype),
                rate=hyperparams.rate.detach().to(net.device, net.dtype),
                batches=batches,
                validation=of_step,
                statistics=self.inner.statistics,
                following=None if config.mode in UNEQUAL_SIZES else batches[len(batches)],
                optimizer=optimizer_of(self.inner),
            )
            gradient = stack_hypergradient(problem, config)
            scores.append((gradient.loss, gradient.accuracy))
            outputs = [(hyperparams.mix, gradient.mix), (hyperparams.rate, gradient.rate)]
            attached = [(h, g.to(h)) for h, g in outputs if h.requires_grad and h.numel()]
            grads = torch.autograd.grad(
                [h for h, _ in attached],
                list(weights.values()),
                grad_outputs=[g for _, g in attached],
                allow_unused=True,
                materialize_grads=True,
            )
            take_step(self._clipped(list(grads)))
        first_pass = scores[: max(1, len(validation) // max(1, self.meta.outer_epochs))]
        loss = torch.stack([s[0] for s in first_pass]).mean(0).tolist()
        accuracy = torch.stack([s[1] for s in first_pass]).mean(0).tolist()
        return [
            ({k: v.detach()[j] for k, v in weights.items()}, metrics_of(loss[j], accuracy[j]))
            for j in range(len(clients))
        ]

    def _outer_steps(self, weights: State) -> Callable[[Sequence[Tensor]], None]:
        """Return what changes the weights in place, by one step along their gradients."""
        # torch's optimizer as a function: its class imports torch._dynamo, about 2 s
        from torch.optim.adam import adam

        rate, base_rate = self.meta.rate, self.meta.base_rate
        if self.rate is not None:
            rate = base_rate = self.rate
        first, second = ([torch.zeros_like(w) for w in weights.values()] for _ in range(2))
        counts = [torch.tensor(0.0) for _ in weights]

        # both are elementwise, so that stacked weights are stepped as C clients would be
        @torch.no_grad()
        def take_step(grads: Sequence[Tensor]) -> None:
            for i, (name, weight) in enumerate(weights.items()):
                of_tensor = base_rate if name == "base" else rate
                if self.optimizer == "adam":
                    adam(
                        *([weight], [grads[i]], [first[i]], [second[i]], [], [counts[i]]),
                        foreach=False,
                        amsgrad=False,
                        beta1=0.9,
                        beta2=0.99,
                        lr=of_tensor,
                        weight_decay=0.0,
                        eps=1e-8,
                        maximize=False,
                    )
                else:
                    weight.add_(grads[i], alpha=-of_tensor)

        return take_step

    def _validation_batches(self, clients: Sequence[Client]) -> list[list[StackBatch]]:
        """Return the validation batches of every outer step, those of equal length together."""
        parts = [validation_part(c).to(self.net.device) for c in clients]
        count = max(p.num for p in parts)
        size = self.meta.validation_batch or count
        per_pass = -(-count // size)
        steps = self.steps
        if steps is None:
            steps = self.meta.outer_steps or self.meta.outer_epochs * per_pass
        if size >= count:
            return [_by_length(parts)] * steps
        batches: list[list[StackBatch]] = []
        for epoch in range(-(-steps // per_pass)):
            orders = [
                torch.randperm(count, generator=generator(c.seed, "validation", epoch))
                for c in clients
            ]
            for begin in range(0, count, size):
                rows = [o[begin : begin + size].to(self.net.device) for o in orders]
                batches.append(_by_length([p.take(r) for p, r in zip(parts, rows, strict=True)]))
        return batches[:steps]

    def _clipped(self, grads: list[Tensor]) -> list[Tensor]:
        """Clip each client's meta-gradient; entries (published) or its norm."""
        bound = self.meta.clip_at
        if self.meta.clip == "value":
            return [g.clamp(-bound, bound) for g in grads]
        if self.meta.clip == "norm":
            norm = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)
            scale = (bound / norm.clamp_min(1e-30)).clamp(max=1.0)
            return [g * scale.view(-1, *(1,) * (g.dim() - 1)) for g in grads]
        return grads


def _by_length(parts: Sequence[Examples]) -> list[StackBatch]:
    """Return one batch for each group of clients with equally many examples."""
    lengths: dict[int, list[int]] = {}
    for i, part in enumerate(parts):
        lengths.setdefault(part.num, []).append(i)
    return [
        StackBatch(
            trees.stack([parts[i].x for i in members]),
            trees.stack([parts[i].y for i in members]),
            tuple(members) if len(lengths) > 1 else None,
        )
        for members in lengths.values()
    ]


@dataclass(frozen=True, kw_only=True)
class FedL2P(Method):
    """Meta-nets learned by all seen clients together.

    Parameters
    ----------
    meta
        The outer loop.
    inner
        The inner loop, in learning and in personalization.
    """

    meta: MetaLearning
    inner: InnerLoop

    @property
    def stage(self) -> str:
        """The stage ``learn``; the ablation without profiles is a stage by its own name."""
        return "learn" if self.name == "fedl2p" else self.name

    def final_metanets(self, model: nn.Module, state: State) -> MetaNets | None:
        """Return the learned meta-nets; None for the ablation without profiles."""
        if self.stage != "learn":
            return None
        return self.build_metanets(find_sites(model), {k: v.cpu() for k, v in state.items()})

    def build_metanets(
        self, sites: Sites, state: State | None = None, *, seed: int = 0
    ) -> MetaNets:
        """Return meta-nets of this method's form, with the weights of ``state`` if given."""
        nets = MetaNets(sites, config=self.meta.nets, seed=derive_seed(seed, "metanets"))
        if state is not None:
            nets.load_state_dict(state)
        return nets

    def start(self, model: nn.Module, *, seed: int = 0) -> State:
        """Return the initial meta-nets."""
        nets = self.build_metanets(working_copies(model).net.sites, seed=seed)
        return {k: v.detach().clone() for k, v in nets.state_dict().items()}

    def train(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        """Take every client's outer steps from the received meta-nets."""
        work = working_copies(model)
        nets = self.build_metanets(work.net.sites)
        learner = MetaLearner(work.net, nets, self.meta, self.inner)

        def stack(clients: Sequence[Client]) -> list[Update]:
            profiles = [profile_of(work, c, self.meta.nets.groups) for c in clients]
            learned = learner.run([state] * len(clients), clients, profiles)
            return [
                Update(
                    client.name,
                    shared={k: weights[k].cpu() for k in state},
                    kept=kept_profile(profile),
                    weight=float(validation_part(client).num),
                    metrics=metrics,
                    failure=_failure(weights, metrics),
                )
                for client, profile, (weights, metrics) in zip(
                    clients, profiles, learned, strict=True
                )
            ]

        data = [c.data for c in clients]
        return map_stacks(stack, work.net, data, clients, unequal_sizes=learner.unequal_sizes)

    def validate(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        """Fine-tune with the received nets and evaluate on the validation parts."""
        work = working_copies(model)
        net, nets = work.net, self.build_metanets(work.net.sites, state).to(work.net.device)

        def stack(clients: Sequence[Client]) -> list[Update]:
            profiles = [profile_of(work, c, self.meta.nets.groups) for c in clients]
            with torch.no_grad():
                hyperparams = nets(Profile.stack(profiles)).to(net.device, net.dtype)
            tuned = finetune_stack(net, clients, hyperparams, self.inner)
            parts = [validation_part(c) for c in clients]
            return evaluation_updates(clients, parts, evaluate(net, tuned, hyperparams.mix, parts))

        data = [c.data for c in clients]
        return map_stacks(stack, net, data, clients, unequal_sizes=True)

    def personalize(
        self, model: nn.Module, state: State, clients: Sequence[Client]
    ) -> list[Outcome]:
        """Profile, one forward pass of the nets, fine-tune."""
        work = working_copies(model)
        nets = self.build_metanets(work.net.sites, state).to(work.net.device)

        def choose(clients: Sequence[Client]) -> tuple[Hyperparams, list[Profile]]:
            profiles = [profile_of(work, c, self.meta.nets.groups) for c in clients]
            with torch.no_grad():
                return nets(Profile.stack(profiles)), profiles

        return personalize_with(model, clients, self.inner, choose)


def _failure(weights: State, metrics: dict[str, float]) -> str | None:
    if all(bool(w.isfinite().all()) for w in weights.values()):
        return None
    return (
        f"the hypergradient is not finite (validation loss {metrics['loss']:.3g}); "
        "fine-tuning diverged under the received meta-nets: bound the rates lower"
    )


def _fedl2p(settings: Settings, name: str = "fedl2p", *, constant: bool = False) -> FedL2P:
    meta = settings.meta
    if constant:
        meta = dataclasses.replace(meta, nets=dataclasses.replace(meta.nets, constant=True))
    return FedL2P(name=name, meta=meta, inner=settings.finetune)


METHODS = {
    "fedl2p": _fedl2p,
    "fedl2p-constant": lambda s: _fedl2p(s, "fedl2p-constant", constant=True),
}
