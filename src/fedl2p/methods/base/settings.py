"""Settings of the methods. A study gives the same ones to all its methods."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from fedl2p.core.settings import (
    DataParts,
    HypergradientConfig,
    InnerLoop,
    MetaNetsConfig,
    check_mode,
    check_whole,
)


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """Local training in a federated round (FedAvg and the methods built on it).

    Parameters
    ----------
    epochs
        Passes over the client's training part per round.
    batch_size
        Examples per step of SGD.
    rate
        Learning rate of the first round, plain SGD.
    decay
        Factor on the rate at each round of decay_rounds.
    decay_rounds
        Rounds at which the rate is multiplied by decay.
    end_rate
        Exponential decay instead of such steps: the learning rate from end_round on; None for none.
    end_round
        The first round with end_rate, 2 or more; 0 without one.
    reads
        Data of the training: the training part, or the validation part too (published for
        CIFAR-10).
    """

    epochs: int = 1
    batch_size: int = 32
    rate: float = 0.1
    decay: float = 0.1
    decay_rounds: tuple[int, ...] = ()
    end_rate: float | None = None
    end_round: int = 0
    reads: DataParts = "train"

    def __post_init__(self) -> None:
        check_whole(1, epochs=self.epochs, batch_size=self.batch_size)
        if not (0 < self.rate < math.inf and 0 < self.decay < math.inf):
            raise ValueError(
                f"rate {self.rate} and decay {self.decay} must both be above 0 and finite"
            )
        if self.reads not in get_args(DataParts):
            choices = ", ".join(get_args(DataParts))
            raise ValueError(f"reads is {self.reads!r}, but must be one of {choices}")
        self._check_end()

    def _check_end(self) -> None:
        if self.end_rate is None:
            if self.end_round:
                raise ValueError(
                    f"end_round is {self.end_round}, but there is no end_rate; give it"
                )
            return
        if not 0 < self.end_rate < float("inf") or self.end_round < 2:
            raise ValueError(
                f"end_rate {self.end_rate} must be above 0 and finite, and its end_round "
                f"{self.end_round} be 2 or more"
            )
        if self.decay_rounds:
            raise ValueError(
                "the rate cannot both fall in steps (decay_rounds) and exponentially (end_rate); "
                "give one of them"
            )

    def rate_in(self, round: int) -> float:
        """Return the learning rate of a round, counted from 1."""
        if self.end_rate is not None:
            passed = min((round - 1) / (self.end_round - 1), 1.0)
            return float(self.rate ** (1 - passed) * self.end_rate**passed)
        return self.rate * self.decay ** sum(round >= r for r in self.decay_rounds)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The grid of a search: every mix with every rate.

    Parameters
    ----------
    mixes
        Mixes in [0, 1], the same in every norm layer.
    rates
        Learning rates, the same for every parameter tensor.
    criterion
        Compared on validation data: mean loss in nats, or accuracy (ties by loss).
    """

    mixes: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    criterion: Literal["loss", "accuracy"] = "loss"

    def __post_init__(self) -> None:
        if not self.mixes or not self.rates:
            raise ValueError("the grid is empty; give at least one mix and one rate")
        if not all(0 <= m <= 1 for m in self.mixes):
            raise ValueError(f"mixes are {self.mixes}, but each must be in [0, 1]")
        if not all(0 < r < float("inf") for r in self.rates):
            raise ValueError(f"rates are {self.rates}, but each must be positive and finite")

    @property
    def points(self) -> list[tuple[float, float]]:
        """All (mix, rate) pairs."""
        return [(m, r) for m in self.mixes for r in self.rates]


@dataclass(frozen=True, kw_only=True)
class MetaLearning:
    """The outer loop of FedL2P: how a client learns the meta-nets.

    Parameters
    ----------
    nets
        The form of the meta-nets.
    hypergradient
        The estimator of the hypergradient.
    outer_steps
        Outer steps per client and round; 0 = as many as outer_epochs passes over the
        validation part need.
    outer_epochs
        Passes over the validation part, one batch per outer step (published: 3).
    validation_batch
        Validation examples per outer step; 0 = all of them.
    rate
        Learning rate of the outer steps (plain SGD) for both nets. With a server optimizer
        (FedAdam) and one outer step, 1.0 sends the clipped hypergradient itself.
    base_rate
        Learning rate of the outer steps for the base rates.
    clip
        value: every entry of a meta-gradient clamped to [-clip_at, clip_at] (published);
        norm: the whole of it scaled down to norm clip_at; none.
    clip_at
        The bound of clip.
    """

    nets: MetaNetsConfig = field(default_factory=MetaNetsConfig)
    hypergradient: HypergradientConfig = field(default_factory=HypergradientConfig)
    outer_steps: int = 1
    outer_epochs: int = 3
    validation_batch: int = 0
    rate: float = 1.0
    base_rate: float = 1.0
    clip: Literal["value", "norm", "none"] = "norm"
    clip_at: float = 1.0

    def __post_init__(self) -> None:
        check_whole(
            0,
            outer_steps=self.outer_steps,
            outer_epochs=self.outer_epochs,
            validation_batch=self.validation_batch,
        )
        if not self.outer_steps and not self.outer_epochs:
            raise ValueError("outer_steps and outer_epochs are both 0, so nothing would be learned")
        rates = (self.rate, self.base_rate)
        if not (all(0 < rate < math.inf for rate in rates) and self.clip_at > 0):
            raise ValueError("rate, base_rate and clip_at must all be above 0, the rates finite")

    @classmethod
    def published(cls, *, base_rate: float = 1e-3) -> MetaLearning:
        """Return the paper's settings (those of its public code)."""
        return cls(
            nets=MetaNetsConfig.published(base_rate=base_rate),
            hypergradient=HypergradientConfig(mode="published"),
            outer_steps=0,
            outer_epochs=3,
            validation_batch=32,
            rate=1e-3,
            base_rate=1e-4,
            clip="value",
        )


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """Settings of the methods that FedL2P is compared with; each name begins with the method's.

    Parameters
    ----------
    rate
        Learning rate of their personalization, and of finetuning-head and finetuning-norms; None
        for local.rate, that of their training.
    head
        Name of the module that fedper, fedrep, fedbabu and finetuning-head take for the model's
        head; None for the linear layer that a forward pass calls last.
    fedprox_mu
        Weight of the proximal term, >= 0. The paper tries 0.001, 0.01, 0.1 and 1.
    ditto_lambda
        Weight of the proximal term between personal and global model, >= 0. The paper's clients
        choose among 0.1, 1 and 2 on validation data; on digits (seed 100, seen and unseen clients)
        0.1 gave accuracies of 0.88 and 0.89, 1 gave 0.85 and 0.81.
    perfedavg_alpha
        Learning rate of Per-FedAvg's look-ahead step, > 0; the paper's.
    perfedavg_beta
        Learning rate of its local training, > 0; None for local.rate (the paper: 0.001, for
        thousands of steps).
    perfedavg_delta
        Length of the finite difference for Hessian products of the Hessian-free variant, > 0.
    fedrep_head_epochs
        Epochs of head training in each round, before local.epochs of the body; the paper's.
    apfl_alpha
        Share of the personal model in the mixture at first, in [0, 1].
    apfl_adaptive
        Whether each client adapts that share.
    """

    rate: float | None = None
    head: str | None = None
    fedprox_mu: float = 0.01
    ditto_lambda: float = 0.1
    perfedavg_alpha: float = 0.01
    perfedavg_beta: float | None = None
    perfedavg_delta: float = 1e-2
    fedrep_head_epochs: int = 10
    apfl_alpha: float = 0.5
    apfl_adaptive: bool = True

    def __post_init__(self) -> None:
        for name in ("rate", "perfedavg_alpha", "perfedavg_beta", "perfedavg_delta"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}, but must be above 0 and finite")
        for name in ("fedprox_mu", "ditto_lambda"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}, but must be 0 or more and finite")
        check_whole(1, fedrep_head_epochs=self.fedrep_head_epochs)
        if not 0 <= self.apfl_alpha <= 1:
            raise ValueError(f"apfl_alpha is {self.apfl_alpha}, but must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of all methods of a study.

    Parameters
    ----------
    finetune
        The inner loop: fine-tuning, in every method that does it.
    finetune_rate
        Learning rate of plain fine-tuning (methods without a learned or searched one).
    local
        Local training of FedAvg and of the local baseline.
    local_epochs
        Epochs that the local-only baseline trains on its own data.
    meta
        FedL2P's outer loop.
    grid
        The grid that searches try.
    alone_steps
        Meta-training steps of each l2p client. For a fair comparison use rounds x
        clients_per_round / clients.
    alone_optimizer
        Optimizer of l2p's outer steps; that of FedL2P's server.
    alone_rate
        Learning rate of l2p's outer steps; None for meta.rate.
    baselines
        Settings of single baselines.
    """

    finetune: InnerLoop = field(default_factory=InnerLoop)
    finetune_rate: float = 1e-3
    local: LocalTraining = field(default_factory=LocalTraining)
    local_epochs: int = 50
    meta: MetaLearning = field(default_factory=MetaLearning)
    grid: Grid = field(default_factory=Grid)
    alone_steps: int = 20
    alone_optimizer: Literal["sgd", "adam"] = "adam"
    alone_rate: float | None = 0.005
    baselines: Baselines = field(default_factory=Baselines)

    @property
    def personal_rate(self) -> float:
        """The learning rate with which baselines personalize.

        Raises
        ------
        ValueError
            If it would be that of local training, which is one of SGD, but they use adam.
        """
        if self.baselines.rate is None and self.finetune.optimizer == "adam":
            raise ValueError(
                f"finetune.optimizer is adam, but baselines would personalize at local.rate "
                f"{self.local.rate}, which is for SGD; give baselines.rate, e.g. 0.001"
            )
        return self.local.rate if self.baselines.rate is None else self.baselines.rate

    def plain_sgd_loop(self, method: str) -> InnerLoop:
        """Return the inner loop for a method whose steps are defined for plain SGD only.

        Raises
        ------
        ValueError
            If fine-tuning has another optimizer.
        """
        if not self.finetune.plain_sgd:
            raise ValueError(
                f"{method} personalizes by steps of its own, which take no momentum, weight decay "
                f"or adam; leave out {method}, or these settings of finetune"
            )
        return self.finetune

    def __post_init__(self) -> None:
        check_mode(self.meta.hypergradient.mode, plain_sgd=self.finetune.plain_sgd)
        for name in ("finetune_rate", "alone_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < math.inf:
                raise ValueError(f"{name} is {rate}, but must be above 0 and finite")
        check_whole(1, alone_steps=self.alone_steps, local_epochs=self.local_epochs)
