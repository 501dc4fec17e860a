"""Settings of the core: inner loop, hypergradient, meta-nets, precision.

This file does not import torch, so that the command line can describe the settings before torch is
loaded.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from fedl2p.core.clientdata import ClientData

Statistics = Literal["corrected", "published", "global"]


def check_whole(least: int, **values: object) -> None:
    """Raise ValueError if one of the named values is not a whole number of at least ``least``."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError(f"{name} is {value!r}, but must be a whole number, {least} or more")
        if int(value) < least:
            raise ValueError(f"{name} is {value}, but must be {least} or more")


LOSSES = ("cross-entropy", "bce", "mse")
"""Losses that have a name, see :mod:`fedl2p.core.objective`."""

WITH_ACCURACY = ("cross-entropy", "bce")
"""Those of them that have an accuracy; they are in nats."""


def check_loss(loss: str) -> None:
    """Raise ValueError if a loss is none of :data:`LOSSES`."""
    if loss not in LOSSES:
        raise ValueError(
            f"loss is {loss!r}, but must be one of {', '.join(LOSSES)}, or package.module:callable"
        )


def check_ignore_index(ignore_index: int | None, loss: object) -> None:
    """Raise ValueError if labels are to be ignored by a loss other than cross-entropy."""
    if ignore_index is None:
        return
    if loss != "cross-entropy":
        raise ValueError(
            "ignore_index belongs to cross-entropy; another loss leaves out by itself what does "
            "not count"
        )
    if type(ignore_index) is not int:
        raise ValueError(f"ignore_index is {ignore_index!r}, but must be an integer")


DataParts = Literal["train", "train+validation"]
"""The parts of a client's data that training reads."""

InnerOptimizer = Literal["sgd", "adam"]


@dataclass(frozen=True, kw_only=True)
class InnerLoop:
    """How a client fine-tunes, apart from its hyperparameters.

    Parameters
    ----------
    epochs
        Passes over the client's training part; 0 leaves the model as it is.
    batch_size
        Examples per step; the last batch of an epoch may be smaller.
    statistics
        Start of the client's running batch-norm statistics: corrected (bias removed), published
        (mean 0, variance 1, as in the reference), or global (those of the global model, as in plain
        training).
    final
        Data of the last fine-tuning, that of the model which a client uses: its training part, or
        the validation part too (published for CIFAR-10). What is chosen or learned before that uses
        the training part alone.
    early_stopping
        Keep the client's state after the epoch of lowest loss on its validation part (the state
        without fine-tuning counts too) when it is personalized; learning is not stopped early. A
        client without a validation part keeps the last state.
    optimizer
        sgd or adam (torch.optim.Adam with its default betas and epsilon); the learned or given
        rates are its learning rates. Adam needs smaller ones than SGD: 0.001 is a usual one.
    momentum
        Momentum of SGD, in [0, 1), as in torch.optim.SGD; 0 for none.
    weight_decay
        Factor of the weights that is added to their gradient (an L2 term, also in Adam), 0 or more.
    """

    epochs: int = 15
    batch_size: int = 32
    statistics: Statistics = "corrected"
    final: DataParts = "train"
    early_stopping: bool = False
    optimizer: InnerOptimizer = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_whole(0, epochs=self.epochs)
        check_whole(1, batch_size=self.batch_size)
        if self.statistics not in get_args(Statistics):
            choices = ", ".join(get_args(Statistics))
            raise ValueError(f"statistics is {self.statistics!r}, but must be one of {choices}")
        if self.final not in get_args(DataParts):
            choices = ", ".join(get_args(DataParts))
            raise ValueError(f"final is {self.final!r}, but must be one of {choices}")
        if self.early_stopping and self.final == "train+validation":
            raise ValueError(
                "early_stopping needs a validation part that is not trained on, but final is "
                "'train+validation'; use one of the two"
            )
        self._check_optimizer()

    def _check_optimizer(self) -> None:
        if self.optimizer not in get_args(InnerOptimizer):
            choices = ", ".join(get_args(InnerOptimizer))
            raise ValueError(f"optimizer is {self.optimizer!r}, but must be one of {choices}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}, but must be in [0, 1)")
        if self.momentum and self.optimizer == "adam":
            raise ValueError(
                f"momentum is {self.momentum}, but adam has its own (0.9); leave it at 0"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"weight_decay is {self.weight_decay}, but must be 0 or more and finite"
            )

    @property
    def plain_sgd(self) -> bool:
        """Whether a step follows the gradient itself: SGD without momentum and weight decay."""
        return self.optimizer == "sgd" and not self.momentum and not self.weight_decay

    def final_data(self, data: ClientData) -> ClientData:
        """Return a client's data as the last fine-tuning reads it."""
        return data.joined() if self.final == "train+validation" else data

    def steps(self, examples: int) -> int:
        """Return the number of inner steps on that many examples."""
        return self.epochs * -(-examples // self.batch_size)


Mode = Literal["published", "last-step", "trajectory", "implicit", "truncated", "unrolled"]

MODES: tuple[Mode, ...] = get_args(Mode)

OPTIMIZER_MODES: tuple[Mode, ...] = ("last-step", "truncated", "unrolled")
"""Modes for every inner optimizer; the formulas of the others hold for plain SGD only."""


def check_mode(mode: Mode, *, plain_sgd: bool) -> None:
    """Raise a ValueError if a mode is for plain SGD only, but the inner loop has another step."""
    if not plain_sgd and mode not in OPTIMIZER_MODES:
        raise ValueError(
            f"hypergradient mode {mode!r} is for plain SGD, but the inner loop has momentum, "
            f"weight decay or adam; use one of the modes {', '.join(OPTIMIZER_MODES)}"
        )


@dataclass(frozen=True, kw_only=True)
class HypergradientConfig:
    """The estimator of the hypergradient.

    Parameters
    ----------
    mode
        last-step and trajectory are first-order and cheap, implicit solves a linear system with the
        Hessian, truncated differentiates through the last steps, unrolled through all (exact),
        published is that of the reference.
    steps
        Inner steps that truncated differentiates through (T).
    segment
        Inner steps between checkpoints of unrolled and truncated, whose graph is in memory at a
        time: larger ones need fewer copies of the weights and less time, but memory for larger
        graphs. Changes results by rounding only. None: as many as fit into 256 MiB.
    psi
        Step of the Neumann series (published).
    terms
        Terms of the Neumann series after the first (published).
    damping
        Added to the Hessian's diagonal (implicit).
    iterations
        Most iterations of conjugate gradients (implicit); they stop early at a relative residual of
        1e-10 or at negative curvature.
    """

    mode: Mode = "truncated"
    steps: int = 10
    segment: int | None = None
    psi: float = 0.1
    terms: int = 3
    damping: float = 0.0
    iterations: int = 10

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}, but must be one of {', '.join(MODES)}")
        check_whole(1, steps=self.steps, iterations=self.iterations)
        if self.segment is not None:
            check_whole(1, segment=self.segment)
        check_whole(0, terms=self.terms)
        if not (0 < self.psi < math.inf and 0 <= self.damping < math.inf):
            raise ValueError(
                f"damping {self.damping} must be 0 or more and psi {self.psi} above 0, both finite"
            )


Form = Literal["default", "published"]

ProfileGroup = Literal["divergences", "moments", "gradients", "loss", "labels", "size"]
"""Groups of a profile's entries, see :class:`~fedl2p.core.profiles.Profile`."""

PROFILE_GROUPS: tuple[ProfileGroup, ...] = get_args(ProfileGroup)

PUBLISHED_PROFILE: tuple[ProfileGroup, ...] = ("divergences", "moments")

_PROFILES = {"full": PROFILE_GROUPS, "published": PUBLISHED_PROFILE}


def profile_groups(names: Collection[str]) -> tuple[ProfileGroup, ...]:
    """Return the groups that are named, one by one or as ``full`` or ``published``, in order.

    Raises
    ------
    ValueError
        If a name is unknown, or there is none.
    """
    given = list(names) if not isinstance(names, str) else None
    choices = (*PROFILE_GROUPS, *_PROFILES)
    if not given or any(name not in choices for name in given):
        raise ValueError(
            f"profile is {names!r}, but must be a tuple of one or more of {', '.join(choices)}"
        )
    chosen = {group for name in given for group in _PROFILES.get(name, (name,))}
    return tuple(group for group in PROFILE_GROUPS if group in chosen)


@dataclass(frozen=True, kw_only=True)
class MetaNetsConfig:
    """The form and the size of the meta-nets.

    Parameters
    ----------
    form
        default or published (the paper's); fedl2p.core.metanets has both by formula.
    profile
        What the nets read of a client: full, published (divergences and moments, all that the
        published form can read), or groups one by one. A server can compute what the nets read
        from a client's update, unless privacy is on: divergences and moments tell how the client's
        inputs differ from everybody's, mean and deviation of the raw values included; loss how
        well the global model does there; gradients how far each of its tensors is from the
        client's optimum; labels how many classes the client has, how evenly, and how far its labels
        follow from what the model sees; size how many examples.
    constant
        Leave the profile out: no nets, only one learned mix per norm and one learned rate per
        tensor, the same for all clients (an ablation).
    hidden
        Width of the two hidden layers of each net.
    base_rate
        Learning rate of every tensor before learning.
    initial_mix
        Mix of every norm before learning, in the default form; about 0.5 in the published one.
    min_rate
        Lower bound of the learning rates in the default form.
    max_rate
        Upper bound of the learning rates in the default form.
    """

    form: Form = "default"
    profile: tuple[ProfileGroup | Literal["full", "published"], ...] = PROFILE_GROUPS
    constant: bool = False
    hidden: int = 100
    base_rate: float = 5e-2
    initial_mix: float = 0.75
    min_rate: float = 1e-5
    max_rate: float = 0.3

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise ValueError(
                f"form is {self.form!r}, but must be one of {', '.join(get_args(Form))}"
            )
        object.__setattr__(self, "profile", profile_groups(self.profile))
        if self.form == "published" and not self.constant and self.profile != PUBLISHED_PROFILE:
            raise ValueError(
                f"profile is {', '.join(self.profile)}, but the published form of the nets reads "
                "divergences and moments; give profile published, or form default"
            )
        check_whole(1, hidden=self.hidden)
        if not 0 < self.base_rate < math.inf:
            raise ValueError(f"base_rate is {self.base_rate}, but must be positive and finite")
        if not 0 <= self.initial_mix <= 1:
            raise ValueError(f"initial_mix is {self.initial_mix}, but must be in [0, 1]")
        if not 0 < self.min_rate < self.max_rate < math.inf:
            raise ValueError(
                f"min_rate {self.min_rate} and max_rate {self.max_rate} must be finite and "
                "0 < min < max"
            )
        if self.form == "default" and not self.min_rate <= self.base_rate <= self.max_rate:
            raise ValueError(
                f"base_rate {self.base_rate} must lie within [{self.min_rate}, {self.max_rate}]"
            )

    @property
    def groups(self) -> tuple[ProfileGroup, ...]:
        """The groups of a profile that the nets read; none if they are constants."""
        return () if self.constant else profile_groups(self.profile)

    @classmethod
    def published(cls, *, base_rate: float = 1e-3) -> MetaNetsConfig:
        """Return the paper's form, with the base rate of its public code."""
        return cls(form="published", profile=PUBLISHED_PROFILE, base_rate=base_rate)


Precision = Literal["full", "bfloat16"]
Stacking = Literal["measured", "always"]


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Precision, memory layout and stacking of the computations.

    Parameters
    ----------
    precision
        full: in the model's own dtype. bfloat16: by torch.autocast, for processors that are faster
        in it. Weights, gradients, statistics of norm layers, losses and data profiles stay in the
        model's dtype, but results change by more than rounding: some 3 digits are left in each
        activation. Clients run one at a time then, not stacked, so that it pays for large models.
    channels_last
        Whether weights, and with them activations, of 2-d convolutions are laid out with channels
        last. It changes results by rounding, and only clients that run alone: stacked ones lie side
        by side as channels.
    stack_size
        Most clients that are computed together as one stack, which is what makes many small models
        fast; 1 for each alone. The clients of a round are cut into stacks in the order of their
        names, so that no result depends on what runs them. It changes results by rounding.
    stacking
        measured: on a CPU a step is timed at first use, and clients are stacked only if that takes
        less time on this machine; later runs read the answer from the user's cache folder. always:
        wherever the model and the data allow it, so that two machines with equal arithmetic give
        equal bits.
    """

    precision: Precision = "full"
    channels_last: bool = False
    stack_size: int = 10
    stacking: Stacking = "measured"

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            choices = ", ".join(get_args(Precision))
            raise ValueError(f"precision is {self.precision!r}, but must be one of {choices}")
        if self.stacking not in get_args(Stacking):
            choices = ", ".join(get_args(Stacking))
            raise ValueError(f"stacking is {self.stacking!r}, but must be one of {choices}")
        check_whole(1, stack_size=self.stack_size)
