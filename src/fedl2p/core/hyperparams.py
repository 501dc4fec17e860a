"""Fine-tuning hyperparameters: a mix per batch-norm layer and a rate per parameter tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass
from html import escape

import torch
from torch import Tensor

from fedl2p.core.sites import Sites
from fedl2p.text_table import Words, html_table, short_repr, span


@dataclass(frozen=True)
class Hyperparams:
    """The hyperparameters of one client, or of C clients with a leading dimension C.

    Parameters
    ----------
    mix
        Shape (B,) or (C, B), in [0, 1]: the share of the client's own statistics in each norm
        layer. 0 = the global model's statistics, 1 = the client's.
    rate
        Shape (P,) or (C, P), >= 0: the absolute learning rate of each parameter tensor.
    sites
        The names that the entries belong to.
    check
        Whether values outside of their bounds, NaN included, are refused; what the meta-nets write
        keeps to them by construction.

    Notes
    -----
    beta and eta of Lee et al., "FedL2P", NeurIPS 2023, section 3.
    """

    mix: Tensor
    rate: Tensor
    sites: Sites
    check: InitVar[bool] = True

    def __post_init__(self, check: bool) -> None:
        for name, tensor, names in (
            ("mix", self.mix, self.sites.norms),
            ("rate", self.rate, self.sites.params),
        ):
            if tensor.dim() not in (1, 2) or tensor.shape[-1] != len(names):
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, but the model has {len(names)} "
                    f"entries for it; give shape ({len(names)},), or (clients, {len(names)})"
                )
        if check:
            self._check_values()
        if self.mix.dim() != self.rate.dim():
            raise ValueError("mix and rate must both be for one client or both for many clients")
        if self.mix.shape[:-1] != self.rate.shape[:-1]:
            raise ValueError(
                f"mix is for {len(self.mix)} clients, but rate for {len(self.rate)}; give both for "
                "the same clients"
            )

    def _check_values(self) -> None:
        mix, rate = self.mix.detach(), self.rate.detach()
        if not bool(((mix >= 0) & (mix <= 1)).all()):  # NaN is outside, too
            _check_mix(float(mix[~((mix >= 0) & (mix <= 1))][0]))
        if not bool(((rate >= 0) & (rate < math.inf)).all()):
            _check_rate(float(rate[~((rate >= 0) & (rate < math.inf))][0]))

    def __rich_repr__(self) -> Iterator[tuple[str, object]]:
        if self.mix.dim() == 2:
            yield "clients", len(self.mix)
        yield "mix", _summary(self.mix, "norms")
        yield "rate", _summary(self.rate, "tensors")

    def __repr__(self) -> str:
        return short_repr(self)

    def _repr_html_(self) -> str:
        if self.mix.dim() == 2:
            return f"<pre>{escape(repr(self))}</pre>"
        named = self.by_name()
        tables = [
            html_table([(head, what), *((name, f"{v:.3g}") for name, v in named[what].items())])
            for head, what in (("norm layer", "mix"), ("parameter tensor", "rate"))
            if named[what]
        ]
        return "".join(tables)

    @classmethod
    def constant(cls, sites: Sites, *, mix: float, rate: float) -> Hyperparams:
        """Return the same mix in every norm layer and the same rate for every tensor.

        Raises
        ------
        ValueError
            If ``mix`` is outside [0, 1] or ``rate`` is negative or not finite.
        """
        _check_mix(mix)
        _check_rate(float(torch.tensor(float(rate))))  # what is finite may not be so in its dtype
        return cls(
            torch.full((len(sites.norms),), float(mix)),
            torch.full((len(sites.params),), float(rate)),
            sites,
            check=False,
        )

    @classmethod
    def stack(cls, many: Sequence[Hyperparams]) -> Hyperparams:
        """Stack those of C clients, each of shape (B,) and (P,), along a new first dimension."""
        return cls(
            torch.stack([h.mix for h in many]), torch.stack([h.rate for h in many]), many[0].sites
        )

    def __getitem__(self, client: int) -> Hyperparams:
        """Return those of one of C clients."""
        return Hyperparams(self.mix[client], self.rate[client], self.sites, check=False)

    def to(self, device: torch.device, dtype: torch.dtype) -> Hyperparams:
        """Return the same hyperparameters on another device and in another dtype."""
        return Hyperparams(
            self.mix.to(device, dtype), self.rate.to(device, dtype), self.sites, check=False
        )

    def by_name(self) -> dict[str, dict[str, float]]:
        """Return plain numbers: ``{"mix": {norm: value}, "rate": {parameter: value}}``."""
        if self.mix.dim() != 1:
            raise ValueError("by_name is for one client; take one of them first: hyperparams[i]")
        return {
            "mix": dict(zip(self.sites.norms, self.mix.tolist(), strict=True)),
            "rate": dict(zip(self.sites.params, self.rate.tolist(), strict=True)),
        }


def _check_mix(mix: float) -> None:
    if not 0 <= mix <= 1:  # NaN is outside, too
        raise ValueError(
            f"a mix is {mix:g}, but must be in [0, 1]: 0 = global, 1 = client statistics"
        )


def _check_rate(rate: float) -> None:
    if not 0 <= rate < math.inf:
        raise ValueError(f"a rate is {rate:g}, but a learning rate must be >= 0 and finite")


def _summary(values: Tensor, what: str) -> Words:
    """Return the range of some values, and of how many sites each client's are."""
    return Words(f"[{span(values.detach().flatten().tolist())}, {values.shape[-1]} {what}]")
