"""Settings of the core: how clients fine-tune, how that is differentiated, the form of the nets.

Without torch, so that the command line can describe them before it is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args, get_type_hints

if TYPE_CHECKING:
    from fedl2p.core.clientdata import ClientData

Statistics = Literal["corrected", "published", "global"]

Parts = Literal["train", "train+validation"]
"""The parts of a client's data that training reads."""


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
        How the client's running batch-norm statistics start: corrected (bias removed, our
        default), published (mean 0, variance 1, as in the reference), or global (at the global
        model's, as in plain training).
    final
        What the last fine-tuning, that of the model which a client uses, reads: its training part,
        or the validation part too (published for CIFAR-10). Whatever is chosen or learned before,
        is on the training part alone.
    early_stopping
        Keep the client's state after the epoch with the lowest loss on its validation part (the
        state without fine-tuning counts too), where a method personalizes; learning is not
        stopped early. A client without a validation part keeps the last state.
    """

    epochs: int = 15
    batch_size: int = 32
    statistics: Statistics = "corrected"
    final: Parts = "train"
    early_stopping: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.epochs < math.inf:
            raise ValueError(f"epochs is {self.epochs}, but must be 0 or more")
        if not 1 <= self.batch_size < math.inf:
            raise ValueError(f"batch_size is {self.batch_size}, but must be 1 or more")
        if self.statistics not in get_args(Statistics):
            wanted = ", ".join(get_args(Statistics))
            raise ValueError(f"statistics is {self.statistics!r}, but must be one of {wanted}")
        if self.final not in get_args(Parts):
            wanted = ", ".join(get_args(Parts))
            raise ValueError(f"final is {self.final!r}, but must be one of {wanted}")
        if self.early_stopping and self.final == "train+validation":
            raise ValueError(
                "early_stopping needs a validation part that is not trained on, but final is "
                "'train+validation'; use one of the two"
            )

    def final_data(self, data: ClientData) -> ClientData:
        """Return a client's data as the last fine-tuning reads it."""
        return data.joined() if self.final == "train+validation" else data

    def steps(self, examples: int) -> int:
        """Return the number of inner steps on that many examples."""
        return self.epochs * -(-examples // self.batch_size)


Mode = Literal["published", "last-step", "trajectory", "implicit", "truncated", "unrolled"]

MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, kw_only=True)
class HypergradientConfig:
    """Which estimator, and its settings.

    Parameters
    ----------
    mode
        The estimator: last-step and trajectory are first-order and cheap, implicit solves with the
        Hessian, truncated goes back through the last steps, unrolled through all (exact), published
        is that of the reference.
    steps
        T of truncated, in inner steps.
    segment
        Inner steps whose graph is held at a time in unrolled and truncated: 1 holds one
        step's graph and every step's weights; larger ones hold fewer weights and larger graphs,
        and save a plain step's time for every graph that need not be made again. The result is
        the same up to rounding. None: as many as fit into 256 MiB.
    psi
        Step of the Neumann series (published).
    terms
        Terms of the Neumann series after the first (published).
    damping
        Added to the Hessian's diagonal (implicit).
    iterations
        Of conjugate gradients at most (implicit); they stop early at a relative residual of
        1e-10 or at negative curvature, where the inverse means nothing.
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
        for name in ("steps", "segment", "iterations"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < math.inf:
                raise ValueError(f"{name} is {value}, but must be 1 or more")
        if not (self.terms >= 0 and 0 < self.psi < math.inf and 0 <= self.damping < math.inf):
            raise ValueError(
                f"terms {self.terms} and damping {self.damping} must be 0 or more, psi {self.psi} "
                "above 0, all finite"
            )


@dataclass(frozen=True, kw_only=True)
class MetaNetsConfig:
    """The form of the meta-nets.

    Parameters
    ----------
    hidden
        Width of the two hidden layers of each net.
    inputs
        How the profile enters. raw: as it is (published). log1p: divergences through
        log(1 + x), since a dead channel alone gives thousands of nats. scaled: log1p, then a
        learnable shift and scale per entry, which lives in the nets, so that no profile leaves a
        client. log (default): log(0.001 + x) + 1.5 instead, then the same; divergences vary over
        orders of magnitude, and this has about mean 0 and deviation 1 over the clients of the
        embedded data without anybody having looked at them.
    reads
        own: BNNet reads the divergences, LRNet the moments (published). whole: both read
        both. A shift that leaves the moments of whole tensors as they are, such as a rotated
        image, shows in the divergences only.
    rates
        linear: rate = base x clamp(LRNet), base a learnable number per tensor, as published (a
        base may turn negative; the rate is then cut at 0). log: rate = exp(log base + LRNet),
        kept within [min_rate, max_rate].
    clamp
        Gradient of the bounds on mix and rate. straight-through: 1 everywhere (published).
        inward: 0 where a step would lead further outside, so that an entry at its bound does
        not wind up behind it.
    initial
        published: every weight Xavier-normal with gain 0.1, every bias 0.5 (BNNet) or 1.0
        (LRNet): the output then hardly depends on the client. sensitive: hidden layers
        Kaiming-normal with zero bias, last layer scaled by gain: it does.
    gain
        Standard deviation scale of the last layers under sensitive.
    speed
        How many times faster than a net's weight the parts that all clients share move under an
        optimizer with steps of equal size (Adam): the base rates in log space, and a mix offset
        per norm. They are stored divided by it. 1 as published, where there is no mix offset.
    constant
        Leave the profile out: no nets, only what all clients share, one learned mix per norm and
        one learned rate per tensor (an ablation).
    base_rate
        Learning rate per tensor before learning.
    initial_mix
        Mix before learning under sensitive; the published one is about 0.5 too.
    min_rate
        Smallest rate under log; linear rates may be 0.
    max_rate
        Largest rate under log; under linear the largest factor that LRNet puts on the base rate, at
        least 1.
    """

    hidden: int = 100
    inputs: Literal["raw", "log1p", "log", "scaled"] = "log"
    reads: Literal["own", "whole"] = "whole"
    rates: Literal["linear", "log"] = "log"
    clamp: Literal["straight-through", "inward"] = "inward"
    initial: Literal["published", "sensitive"] = "sensitive"
    gain: float = 0.1
    speed: float = 3.0
    constant: bool = False
    base_rate: float = 5e-2
    initial_mix: float = 0.75
    min_rate: float = 1e-5
    max_rate: float = 0.3

    def __post_init__(self) -> None:
        if not 1 <= self.hidden < math.inf:
            raise ValueError(f"hidden is {self.hidden}, but must be 1 or more units")
        for name in ("inputs", "reads", "rates", "clamp", "initial"):
            value, wanted = getattr(self, name), get_args(get_type_hints(type(self))[name])
            if value not in wanted:
                raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(wanted)}")
        if not 0 < self.base_rate < math.inf:
            raise ValueError(f"base_rate is {self.base_rate}, but must be positive and finite")
        if not math.isfinite(self.gain):
            raise ValueError(f"gain is {self.gain}, but must be finite")
        if not 0 < self.speed < math.inf:
            raise ValueError(f"speed is {self.speed}, but must be positive and finite")
        if not 0 <= self.initial_mix <= 1:
            raise ValueError(f"initial_mix is {self.initial_mix}, but must be in [0, 1]")
        if not 0 < self.min_rate < self.max_rate < math.inf:
            raise ValueError(
                f"min_rate {self.min_rate} and max_rate {self.max_rate} must be finite and "
                "0 < min < max"
            )
        if self.rates == "linear" and self.max_rate < 1:
            raise ValueError(
                f"max_rate is {self.max_rate}, but under linear rates it is the largest factor on "
                "the base rate and must be 1 or more, e.g. 10"
            )
        if self.rates == "log" and not self.min_rate <= self.base_rate <= self.max_rate:
            raise ValueError(
                f"base_rate {self.base_rate} must lie within [{self.min_rate}, {self.max_rate}]"
            )

    @classmethod
    def published(cls, *, base_rate: float = 1e-3) -> MetaNetsConfig:
        """Return the paper's form (settings of the public reference implementation)."""
        return cls(
            inputs="raw",
            reads="own",
            rates="linear",
            clamp="straight-through",
            initial="published",
            speed=1.0,
            base_rate=base_rate,
            max_rate=1e3,
        )


Precision = Literal["full", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How convolutions and matrix products are computed.

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
    """

    precision: Precision = "full"
    channels_last: bool = False

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            wanted = ", ".join(get_args(Precision))
            raise ValueError(f"precision is {self.precision!r}, but must be one of {wanted}")
