"""The inner loop: fine-tuning under given hyperparameters.

theta_{k+1} = theta_k - eta (.) grad L_train(theta_k; beta), plain SGD on mini-batches, one learning
rate per parameter tensor, cross-entropy (Lee et al., "FedL2P", NeurIPS 2023, section 3.1).
Shapes: C clients, b examples of a batch, B norms, P parameter tensors.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedl2p.core.clientdata import Augment, ClientData, Examples, class_balance
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.mixing import fold
from fedl2p.core.net import Net, NetState, Statistics
from fedl2p.seeds import derive_seed, generator

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


class DivergedError(ArithmeticError):
    """Fine-tuning ended in values that are not finite."""


class Batches(Protocol):
    """The batches of C clients' inner steps, each (x, y) of shapes (C, b, ...) and (C, b)."""

    def __len__(self) -> int:
        """Return the number of inner steps."""

    def __getitem__(self, step: int, /) -> tuple[Tensor, Tensor]:
        """Return the batch of a step; the same one at every call."""


class EpochBatches:
    """Batches of a cohort whose clients hold equally many examples, drawn by index.

    Parameters
    ----------
    examples
        One per client, all of the same length n.
    seeds
        One per client; the order of its batches depends on it alone.
    epochs, batch_size
        As in :class:`InnerLoop`.
    augment
        One per client, applied to its batches; None for none.
    raw
        One per client: what its augment takes instead of the examples' ``x``; None for ``x``.
    balanced
        One per client, as in :class:`~fedl2p.core.clientdata.ClientData`; none for all False.
    """

    def __init__(
        self,
        examples: Sequence[Examples],
        seeds: Sequence[int],
        *,
        epochs: int,
        batch_size: int,
        augment: Sequence[Augment | None] = (),
        raw: Sequence[Tensor | None] = (),
        balanced: Sequence[bool] = (),
    ) -> None:
        self._sources = [e.x for e in examples]
        self._x = torch.stack(self._sources)
        self._y = torch.stack([e.y for e in examples])
        self.seeds = tuple(seeds)
        self._size = batch_size
        self._augment = list(augment) if any(augment) else []
        self._raw = list(raw) or [None] * len(examples)
        self._balanced = list(balanced) or [False] * len(examples)
        self._per_epoch = -(-self._x.shape[1] // batch_size)
        self._steps = epochs * self._per_epoch
        self._orders: dict[int, Tensor] = {}
        self._rows = torch.arange(len(examples), device=self._x.device).unsqueeze(1)

    def __len__(self) -> int:
        """Return epochs x batches per epoch."""
        return self._steps

    @property
    def per_epoch(self) -> int:
        """Batches per epoch."""
        return self._per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of the inner steps, and no further ones."""
        return (self[step] for step in range(len(self)))

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the batch of a step; steps beyond the last go on with further epochs."""
        epoch, position = divmod(step, self._per_epoch)
        chosen = self._order(epoch)[:, position * self._size : (position + 1) * self._size]
        x, y = self._x[self._rows, chosen], self._y[self._rows, chosen]
        if self._augment:
            x = self._augmented(step, x, chosen)
        return x, y

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            drawn = [self._drawn(c, generator(s, "order", epoch)) for c, s in enumerate(self.seeds)]
            self._orders[epoch] = torch.stack(drawn).to(self._x.device)
        return self._orders[epoch]

    def _drawn(self, client: int, rng: torch.Generator) -> Tensor:
        n = self._x.shape[1]
        if not self._balanced[client]:
            return torch.randperm(n, generator=rng)
        ends = class_balance(self._y[client].cpu()).cumsum(0)
        uniform = torch.rand(n, generator=rng, dtype=torch.float64)
        return torch.searchsorted(ends, uniform * ends[-1], right=True).clamp(max=n - 1)

    def _augmented(self, step: int, x: Tensor, chosen: Tensor) -> Tensor:
        """Return each client's batch, augmented.

        A client that is in the stack several times with one seed (a search that tries many settings
        on it) is augmented once.
        """
        done: dict[tuple[int, ...], Tensor] = {}
        batches = []
        for c, augment in enumerate(self._augment):
            if augment is None:
                batches.append(x[c])
                continue
            raw = self._raw[c]
            source = self._sources[c] if raw is None else raw
            key = (id(augment), source.data_ptr(), self._balanced[c], self.seeds[c])
            if key not in done:
                # a generator per step, not per run: a step can be computed again (checkpointing)
                rng = generator(self.seeds[c], "augment", step)
                done[key] = augment(x[c] if raw is None else raw[chosen[c]], rng)
            batches.append(done[key])
        return torch.stack(batches)


def noise_of(batches: Batches, step: int) -> int:
    """Return the seed of a step's dropout masks: by client and step, the same at every call."""
    seeds = batches.seeds if isinstance(batches, EpochBatches) else ()
    return derive_seed("noise", *seeds, step)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross-entropy of each client, shape (C,), in nats."""
    clients, examples = y.shape
    each = F.cross_entropy(logits.flatten(0, 1), y.flatten().long(), reduction="none")
    return each.view(clients, examples).mean(1)


def per_tensor(rate: Tensor, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Spread rates of shape (C, P) over the parameter tensors, each broadcast to (C, 1, ...)."""
    return {
        name: rate[:, i].view(-1, *(1,) * (p.dim() - 1))
        for i, (name, p) in enumerate(params.items())
    }


@dataclass(frozen=True)
class Step:
    """One inner step: the state after it, and its gradients by name."""

    state: NetState
    grads: dict[str, Tensor]


def train_gradient(
    net: Net, state: NetState, mix: Tensor, batch: tuple[Tensor, Tensor], *, noise: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return gradients of the training loss by name and the new running statistics, with a graph.

    The parameters must require gradients. ``noise`` is the seed of dropout's masks.
    """
    with torch.enable_grad():
        logits, stats = net.logits(state, mix, batch[0], training=True, noise=noise)
        grads = torch.autograd.grad(
            cross_entropy(logits, batch[1]).sum(),
            list(state.params.values()),
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    return dict(zip(state.params, grads, strict=True)), stats


def plain_gradient(
    net: Net,
    state: NetState,
    mix: Tensor,
    batch: tuple[Tensor, Tensor],
    *,
    noise: int = 0,
    wanted: Collection[str] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what :func:`train_gradient` returns, outside of any graph and faster.

    ``wanted`` names the parameters to differentiate by, None for all.
    """
    x, y = batch
    alone = len(x) == 1  # then no tensor has a client dimension until the end
    params, stats = (
        {k: v.detach().squeeze(0) if alone else v.detach() for k, v in tensors.items()}
        for tensors in (state.params, state.stats)
    )
    names = [k for k in params if wanted is None or k in wanted]
    for name in names:
        params[name].requires_grad_()
    with torch.enable_grad():
        if alone:
            logits, stats = net.single(
                params,
                stats,
                mix.squeeze(0),
                x.squeeze(0),
                training=True,
                noise=noise,
                first_order=True,
            )
            loss = F.cross_entropy(logits, y.squeeze(0).long())
        else:
            logits, stats = net.stacked(params, stats, mix, x, training=True, first_order=True)
            loss = cross_entropy(logits, y).sum()
        grads: tuple[Tensor, ...] = ()
        if names:
            at = [params[k] for k in names]
            grads = torch.autograd.grad(loss, at, allow_unused=True, materialize_grads=True)
    if alone:
        grads = tuple(g.unsqueeze(0) for g in grads)
        stats = {k: v.unsqueeze(0) for k, v in stats.items()}
    return dict(zip(names, grads, strict=True)), {k: v.detach() for k, v in stats.items()}


def inner_step(
    net: Net,
    state: NetState,
    mix: Tensor,
    rate: Tensor,
    batch: tuple[Tensor, Tensor],
    *,
    create_graph: bool = False,
    noise: int = 0,
) -> Step:
    """Take one step of SGD, differentiable in state, mix and rate if ``create_graph``."""
    gradient = train_gradient if create_graph else plain_gradient
    grads, stats = gradient(net, state, mix, batch, noise=noise)
    with torch.set_grad_enabled(create_graph):
        params = descended(state.params, per_tensor(rate, state.params), grads)
    after = NetState(params, stats)
    return Step(after if create_graph else after.detach(), grads)


def descended(
    params: dict[str, Tensor], rates: dict[str, Tensor], grads: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return parameters one step further; those without a gradient are the same tensors."""
    return {
        k: torch.addcmul(p, rates[k], grads[k], value=-1) if k in grads else p
        for k, p in params.items()
    }


class Gradient(Protocol):
    """What an inner step goes down: by default the gradient of a batch's loss.

    A method that needs another one (a proximal term, a gradient through a step) gives its own.
    """

    def __call__(
        self, state: NetState, step: int, wanted: Collection[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return gradients by name, outside of any graph, and the running statistics afterwards.

        ``wanted`` names the parameters that move; only these have gradients.
        """


def batch_gradient(net: Net, mix: Tensor, batches: Batches) -> Gradient:
    """Return the gradient of the training loss on the batch of each step."""

    def gradient(
        state: NetState, step: int, wanted: Collection[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        noise = noise_of(batches, step)
        return plain_gradient(net, state, mix, batches[step], noise=noise, wanted=wanted)

    return gradient


def start_of(net: Net, clients: int, statistics: Statistics, *, steps: int) -> NetState:
    """Return the state before the first inner step.

    Without any step the client's statistics are the global ones, since no data will enter them: a
    model that is not fine-tuned stays as it is, also under ``published`` statistics.
    """
    return net.start(clients, statistics if steps else "global")


def run_inner_loop(
    net: Net,
    hyperparams: Hyperparams,
    batches: Batches,
    *,
    statistics: Statistics,
    start: NetState | None = None,
    steps: range | None = None,
) -> NetState:
    """Fine-tune C clients from the global model (or ``start``), without a graph.

    ``steps`` are the numbers of the batches to take, all of them by default.
    """
    mix, rate = hyperparams.mix.detach(), hyperparams.rate.detach()
    if start is None:
        start = start_of(net, len(mix), statistics, steps=len(batches))
    taken = range(len(batches)) if steps is None else steps
    return descent(start, rate, batch_gradient(net, mix, batches), taken)


def descent(start: NetState, rate: Tensor, gradient: Gradient, steps: range) -> NetState:
    """Take steps down a gradient, without a graph.

    A parameter tensor whose rate, of shape (C, P), is 0 for every client stays the same tensor, and
    no gradient is computed for it.
    """
    rates = per_tensor(rate, start.params)
    moves = zip(start.params, (rate != 0).any(0).tolist(), strict=True)
    wanted = frozenset(name for name, does in moves if does)
    state = start.detach()
    for step in steps:
        grads, stats = gradient(state, step, wanted)
        state = NetState(descended(state.params, rates, grads), stats)
    return state


def finite(state: NetState) -> Tensor:
    """Tell for each client whether all its tensors are finite, shape (C,), bool."""
    tensors = (*state.params.values(), *state.stats.values())
    # a last dimension of 1 first: a scalar tensor of C clients has shape (C,)
    flags = [v.isfinite().unsqueeze(-1).flatten(1).all(1) for v in tensors]
    return torch.stack(flags).all(0)


def finetune(
    model: nn.Module,
    hyperparams: Hyperparams,
    data: ClientData | tuple[Tensor, Tensor],
    *,
    epochs: int = 15,
    batch_size: int = 32,
    seed: int = 0,
    statistics: Statistics = "corrected",
) -> nn.Module:
    """Fine-tune a copy of a model under given hyperparameters.

    Parameters
    ----------
    model
        The global model; the argument is untouched.
    hyperparams
        For one client: mix of shape (B,), rate of shape (P,).
    data
        The client's data, of which the training part is used, or a pair (x, y).
    epochs
        Passes over the training part.
    batch_size
        Examples per step.
    seed
        Determines the order of the batches and the augmentation.
    statistics
        How the client's running batch-norm statistics start, see :class:`InnerLoop`.

    Returns
    -------
    nn.Module
        An instance of the model's own class with plain batch-norm that holds the mixed statistics.

    Raises
    ------
    DivergedError
        If a parameter or statistic ends up not finite; a smaller rate helps.
    """
    net = Net(model)
    if hyperparams.sites != net.sites:
        raise ValueError(
            "the hyperparameters were made for another model: their names of norm layers or "
            "parameter tensors differ from this model's"
        )
    data = as_client_data(data)
    inner = InnerLoop(epochs=epochs, batch_size=batch_size, statistics=statistics)
    batches = batches_of(net, [data], [seed], inner)
    stacked = on(net, Hyperparams.stack([hyperparams]))
    state = run_inner_loop(net, stacked, batches, statistics=inner.statistics)
    if not finite(state)[0]:
        raise DivergedError(
            f"fine-tuning diverged: rates up to {hyperparams.rate.max():.3g} gave values "
            "that are not finite; use smaller rates or fewer epochs"
        )
    return folded(net, state, stacked.mix, 0)


def as_client_data(data: ClientData | tuple[Tensor, Tensor]) -> ClientData:
    """Accept a pair (x, y) as a client with only a training part."""
    return data if isinstance(data, ClientData) else ClientData(Examples(*data))


def batches_of(
    net: Net, data: Sequence[ClientData], seeds: Sequence[int], inner: InnerLoop
) -> EpochBatches:
    """Return the inner batches of clients with equally many training examples."""
    return EpochBatches(
        [d.train.to(net.device) for d in data],
        seeds,
        epochs=inner.epochs,
        batch_size=inner.batch_size,
        augment=[d.augment for d in data],
        raw=[None if d.raw is None else d.raw.to(net.device) for d in data],
        balanced=[d.balanced for d in data],
    )


def on(net: Net, hyperparams: Hyperparams) -> Hyperparams:
    """Return the hyperparameters in the net's device and dtype."""
    return Hyperparams(
        hyperparams.mix.to(net.device, net.dtype),
        hyperparams.rate.to(net.device, net.dtype),
        hyperparams.sites,
    )


def folded(net: Net, state: NetState, mix: Tensor, client: int) -> nn.Module:
    """Fold one client's state, of finite tensors, into a copy of the user's model.

    ``mix`` is that of C clients in evaluation, shape (C, B).
    """
    return fold(
        net.plain,
        {k: v[client] for k, v in state.params.items()},
        dict(zip(net.sites.norms, mix[client], strict=True)),
        net.client_stats(state.stats, client),
    )
