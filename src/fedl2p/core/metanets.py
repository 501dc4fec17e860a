"""The meta-nets: from a client's profile to its fine-tuning hyperparameters.

BNNet reads the divergences and writes a mix per norm layer; LRNet reads the input moments and
writes a rate per parameter tensor (Lee et al., "FedL2P", NeurIPS 2023, section 3.2, equations 2 and
3). What differs from the paper is a setting of :class:`MetaNetsConfig`;
``MetaNetsConfig.published()`` gives the paper's. Shapes: C clients, B norms, L layers, P parameter
tensors.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedl2p.atomic_files import write_tensors, write_text
from fedl2p.core.clamps import clamp_inward, clamp_straight_through
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.profiles import Profile
from fedl2p.core.settings import MetaNetsConfig
from fedl2p.core.sites import Sites

_swapping = threading.Lock()
"""Held while functional_call has other tensors in a module: stacks of clients run in threads."""


class _Mlp(nn.Module):
    """inputs -> hidden -> hidden -> outputs with ReLU, as published."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        # torch's own initialisation, replaced later, draws from the caller's global generator
        with torch.random.fork_rng(devices=[]):
            self.hidden1 = nn.Linear(inputs, hidden)
            self.hidden2 = nn.Linear(hidden, hidden)
            self.out = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.hidden1(x))
        return self.out(torch.relu(self.hidden2(x)))  # type: ignore[no-any-return]


class _InputScale(nn.Module):
    """A learnable shift and scale per profile entry."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(entries))
        self.scale = nn.Parameter(torch.ones(entries))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) * self.scale


class MetaNets(nn.Module):
    """BNNet, LRNet and the learnable base rates.

    Parameters
    ----------
    sites
        Of the model whose fine-tuning they steer. Without norm layers only rates are learned.
    config
        Their form; keyword arguments of :class:`MetaNetsConfig` may be given instead.
    seed
        Of the initial weights.
    """

    def __init__(
        self,
        sites: Sites,
        *,
        config: MetaNetsConfig | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__()
        if config is not None and settings:
            raise ValueError("give either a config or its single settings, not both")
        self.sites = sites
        self.config = config or MetaNetsConfig(**settings)
        norms, layers, params = len(sites.norms), len(sites.layers), len(sites.params)
        hidden = self.config.hidden
        if not self.config.constant:
            whole = norms + 2 * layers
            if norms:
                self.bnnet = _Mlp(whole if self._whole else norms, hidden, norms)
            self.lrnet = _Mlp(whole if self._whole else 2 * layers, hidden, params)
            if self.config.inputs in ("log", "scaled"):
                self.divergence_scale = _InputScale(norms)
                self.moments_scale = _InputScale(2 * layers)
            self._initialise(torch.Generator().manual_seed(seed))
        base, speed = self.config.base_rate, self.config.speed
        base = base if self.config.rates == "linear" else math.log(base)
        self.base = nn.Parameter(torch.full((params,), base / speed))
        if self.config.initial == "sensitive" or self.config.constant:
            self.base_mix = nn.Parameter(torch.full((norms,), self.config.initial_mix / speed))

    def _initialise(self, generator: torch.Generator) -> None:
        config = self.config
        for prefix, net in self.named_children():
            if not isinstance(net, _Mlp):
                continue
            rate = prefix == "lrnet"
            for layer in (net.hidden1, net.hidden2, net.out):
                if config.initial == "published":
                    nn.init.xavier_normal_(layer.weight, gain=0.1, generator=generator)
                    nn.init.constant_(layer.bias, 1.0 if rate else 0.5)
                else:
                    nn.init.kaiming_normal_(layer.weight, generator=generator)
                    nn.init.zeros_(layer.bias)
            if config.initial == "sensitive":
                with torch.no_grad():
                    net.out.weight.mul_(config.gain)
                first = 1.0 if rate and config.rates == "linear" else 0.0
                nn.init.constant_(net.out.bias, first)
            elif rate and config.rates == "log":
                nn.init.zeros_(net.out.bias)

    @property
    def _whole(self) -> bool:
        return self.config.reads == "whole"

    def forward(self, profile: Profile) -> Hyperparams:
        """Write hyperparameters for a profile, or for a cohort's with a leading dimension C."""
        mix, rate = self.outputs(*self.entries(profile))
        return Hyperparams(mix, rate, self.sites)

    def entries(self, profile: Profile) -> tuple[Tensor, Tensor]:
        """Return the nets' inputs: divergences (..., B), and means and sds in turn (..., 2L)."""
        if profile.sites != self.sites:
            raise ValueError(
                "the profile belongs to another model than the meta-nets: names of layers or "
                "parameters differ; profile with the model that the meta-nets were learned for"
            )
        like = self.base
        return profile.divergence.to(like), profile.moments.to(like).flatten(-2)

    def outputs(self, divergence: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Return mix (..., B) and rate (..., P) for inputs (..., B) and (..., 2L)."""
        config = self.config
        clamp = clamp_inward if config.clamp == "inward" else clamp_straight_through
        if not config.constant:
            divergence, moments = self._prepared(divergence, moments)
        raw_mix, raw_rate = self._raw(divergence, moments)
        mix = clamp(raw_mix, 0.0, 1.0)
        if config.rates == "linear":
            rate = config.speed * self.base * clamp(raw_rate, 0.0, config.max_rate)
            return mix, clamp(rate, 0.0, math.inf)
        low, high = math.log(config.min_rate), math.log(config.max_rate)
        return mix, clamp(config.speed * self.base + raw_rate, low, high).exp()

    def prepared(self, profile: Profile) -> tuple[Tensor, Tensor]:
        """Return what the nets read: the entries (..., B) and (..., 2L) as ``inputs`` says.

        Every entry is changed by itself, so each still stands for one entry of the profile.
        """
        return self._prepared(*self.entries(profile))

    def unbounded(self, divergence: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Return mix (..., B) and rate (..., P) before their bounds, for prepared inputs.

        The rate is its logarithm where the configuration has rates in log space. Differentiable
        without the special gradients that the bounds have in learning.
        """
        mix, rate = self._raw(divergence, moments)
        shared = self.config.speed * self.base
        return mix, shared * rate if self.config.rates == "linear" else shared + rate

    def _raw(self, divergence: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Return mix before its bounds and what LRNet writes, for prepared inputs."""
        config = self.config
        if config.constant:
            raw_mix = torch.zeros_like(divergence)
            ones = torch.ones_like if config.rates == "linear" else torch.zeros_like
            raw_rate = ones(self.base).expand(*divergence.shape[:-1], -1)
        else:
            for_rates = moments
            if self._whole:
                divergence = for_rates = torch.cat([divergence, moments], dim=-1)
            raw_mix = self.bnnet(divergence) if self.sites.norms else divergence[..., :0]
            raw_rate = self.lrnet(for_rates)
        if hasattr(self, "base_mix"):
            raw_mix = config.speed * self.base_mix + raw_mix
        return raw_mix, raw_rate

    def _prepared(self, divergence: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.inputs == "raw":
            return divergence, moments
        if self.config.inputs == "log":
            divergence = (divergence + 1e-3).log() + 1.5
        else:
            divergence = divergence.log1p()
        if self.config.inputs in ("log", "scaled"):
            return self.divergence_scale(divergence), self.moments_scale(moments)
        return divergence, moments

    def per_client(self, weights: Mapping[str, Tensor], profile: Profile) -> Hyperparams:
        """Write hyperparameters of C clients, each by its own weights of shape (C, ...)."""
        divergence, moments = self.entries(profile)

        def one(own: dict[str, Tensor], d: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
            called: tuple[Tensor, Tensor] = functional_call(_Outputs(self), _prefixed(own), (d, m))
            return called

        with _swapping:
            mix, rate = vmap(one)(dict(weights), divergence, moments)
        return Hyperparams(mix, rate, self.sites)

    def save(self, path: str | Path) -> None:
        """Write ``<path>.safetensors`` (weights) and ``<path>.json`` (sites and configuration).

        Each file is written beside its place and then put there: one that is there is whole.
        """
        description = {"config": asdict(self.config), "sites": asdict(self.sites)}
        weights, about = _files(path)
        write_tensors(weights, self.state_dict())
        write_text(about, json.dumps(description, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> MetaNets:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            If a file is missing, damaged, or does not fit the other.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        weights, about = _files(path)
        try:
            description = json.loads(about.read_text())
            names = {k: _names(v) for k, v in description["sites"].items()}
            config = MetaNetsConfig(**description["config"])
            tensors = load_file(weights)
            # Before nets of that width are made: the weights are as large as their file, a number
            # in a description may be anything.
            if not config.constant and len(tensors["lrnet.hidden2.bias"]) != config.hidden:
                raise ValueError(f"hidden is {config.hidden}, but the weights have another width")
            nets = cls(Sites(**names), config=config)
            nets.to(tensors["base"].dtype).load_state_dict(tensors)
            if not all(bool(t.isfinite().all()) for t in tensors.values()):
                raise ValueError("a weight is NaN or infinite")
        except (
            *(OSError, LookupError, TypeError, AttributeError, RuntimeError, ValueError),
            ArithmeticError,
        ) as error:
            raise _unreadable(path, error) from error
        except SafetensorError as error:
            raise _unreadable(path, error) from error
        return nets


class _Outputs(nn.Module):
    """Makes ``MetaNets.outputs`` callable with swapped weights."""

    def __init__(self, nets: MetaNets) -> None:
        super().__init__()
        self.nets = nets

    def forward(self, divergence: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
        return self.nets.outputs(divergence, moments)


def _prefixed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"nets.{name}": value for name, value in weights.items()}


def _files(path: str | Path) -> tuple[Path, Path]:
    """Return the two files of meta-nets; a dot in their name is part of it."""
    path = Path(path)
    if path.suffix in (".safetensors", ".json"):
        path = path.with_suffix("")
    return path.with_name(f"{path.name}.safetensors"), path.with_name(f"{path.name}.json")


def _names(value: object) -> tuple[str, ...]:
    if not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise TypeError("a list of names is something else")
    return tuple(value)


def _unreadable(path: str | Path, error: Exception) -> ValueError:
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(
        f"meta-nets at {path} cannot be read ({line}); give the path that save() wrote"
    )
