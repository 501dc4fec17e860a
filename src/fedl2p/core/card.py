"""The card of meta-nets: what they were learned for, on whom and how, and who lies outside of it.

It travels with the meta-nets: as data in ``metanets.json``, for people as the README.md beside it,
in the form that the Hugging Face hub shows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedl2p.core.profile_groups import GROUPS
from fedl2p.core.profiles import Profile
from fedl2p.core.settings import ProfileGroup
from fedl2p.core.sites import Sites
from fedl2p.version import __version__

FAR = 0.5
"""How far outside the range an entry of a profile is far: in widths of the range, or in units of
the scale on which the nets read it (:mod:`fedl2p.core.profile_groups`) where the range is narrower,
so that a handful of clients that are alike does not make everybody else an outlier."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known of how meta-nets were learned; what is not known is empty or None.

    Parameters
    ----------
    model
        Name of the model's class.
    shapes
        Shape of every parameter and buffer of the model, by name.
    clients
        Number of clients that learning could ask.
    profiled
        Number of clients whose profiles ``low`` and ``high`` are of.
    low, high
        Smallest and largest value of each entry of these profiles, by the entry's name, in its own
        unit. Each is one client's true value. Empty where profiles stayed with their clients, and
        under differential privacy, which would not cover them.
    settings
        Settings of learning, plain values by name.
    seed
        The source of all randomness.
    data_licence
        Licence of the clients' data, as whoever learned on them states it.
    version
        Version of this package.

    Raises
    ------
    ValueError
        If a value cannot be: a shape or a count that is none, an entry without both bounds.
    """

    model: str = ""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    clients: int | None = None
    profiled: int = 0
    low: Mapping[str, float] = field(default_factory=dict)
    high: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    data_licence: str | None = None
    version: str = __version__

    def __post_init__(self) -> None:
        for name in ("model", "data_licence", "version"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value.isprintable()):
                raise ValueError(f"{name} is {value!r}, but must be one printable line")
        for name in ("clients", "profiled", "seed"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value >= 0):
                raise ValueError(f"{name} is {value!r}, but must be a whole number from 0")
        shapes = {str(name): tuple(shape) for name, shape in self.shapes.items()}
        if not all(type(n) is int and n >= 0 for shape in shapes.values() for n in shape):
            raise ValueError("a shape holds something else than whole numbers")
        object.__setattr__(self, "shapes", shapes)
        if set(self.low) != set(self.high):
            raise ValueError("low and high are not of the same entries")
        for name, low in self.low.items():
            # False for NaN and for what is no number, too
            if not (_is_number(low) and _is_number(self.high[name]) and low <= self.high[name]):
                raise ValueError(f"the range of {name!r} is none: {low!r} to {self.high[name]!r}")
        if not isinstance(self.settings, Mapping):
            raise ValueError("settings is no mapping of names to values")

    def with_profiles(self, profiles: Sequence[Profile], groups: Sequence[ProfileGroup]) -> Card:
        """Return the card with the range of some clients' profiles."""
        if not profiles:
            return dataclasses.replace(self, profiled=0, low={}, high={})
        low: dict[str, float] = {}
        high: dict[str, float] = {}
        for group in groups:
            entries = torch.stack([profile.entries(group).detach().cpu() for profile in profiles])
            names = GROUPS[group].names(profiles[0].sites)
            low |= dict(zip(names, entries.amin(0).tolist(), strict=True))
            high |= dict(zip(names, entries.amax(0).tolist(), strict=True))
        return dataclasses.replace(self, profiled=len(profiles), low=low, high=high)

    def misfits(self, model: nn.Module, profile: Profile, groups: Sequence[ProfileGroup]) -> str:
        """Return what a model and a client's profile have that learning did not see, in one line.

        Empty if all is within, and for what the card does not know. An entry is outside if it lies
        beyond the range by more than :data:`FAR`.
        """
        parts = []
        if other := self._other_shape(shapes_of(model)):
            parts.append(other)
        names: list[str] = []
        beyond: list[float] = []
        values: list[float] = []
        for group in groups:
            of_group = GROUPS[group].names(profile.sites)
            if not all(name in self.low for name in of_group):
                continue
            entries = profile.entries(group).detach().cpu().double()
            names += of_group
            values += entries.tolist()
            beyond += self._beyond(group, of_group, entries).tolist()
        far = sorted(
            (i for i, distance in enumerate(beyond) if distance > FAR), key=lambda i: -beyond[i]
        )
        if far:
            name, value = names[far[0]], values[far[0]]
            verb = "lie" if len(far) > 1 else "lies"
            parts.append(
                f"{len(far)} of the profile's {len(names)} entries {verb} far outside what the "
                f"meta-nets were learned on, most of all {name!r}: {value:.3g}, learned on "
                f"{self.low[name]:.3g} to {self.high[name]:.3g} of {self.profiled} clients"
            )
        return "; ".join(parts)

    def _beyond(self, group: ProfileGroup, names: Sequence[str], entries: Tensor) -> Tensor:
        """Return how far each entry lies outside its range, in units of FAR."""
        read = GROUPS[group].as_read
        low = read(torch.tensor([self.low[name] for name in names], dtype=torch.float64))
        high = read(torch.tensor([self.high[name] for name in names], dtype=torch.float64))
        x = read(entries)
        outside = torch.maximum(low - x, x - high).clamp_min(0)
        return outside / (high - low).clamp_min(1.0)

    def _other_shape(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        for name, learned in self.shapes.items():
            if name in shapes and shapes[name] != learned:
                return (
                    f"the model's {name} is {list(shapes[name])}, but the meta-nets were learned "
                    f"for {list(learned)}"
                )
        return ""

    def readme(self, sites: Sites, form: str) -> str:
        """Return the card for people: Markdown with a YAML header, as the hub shows it."""
        rows = [
            ("model", f"`{self.model}`, {self._sizes()}" if self.shapes else _UNKNOWN),
            ("learning rates", str(len(sites.params))),
            ("mixes of batch-norm statistics", str(len(sites.norms))),
            ("clients", _UNKNOWN if self.clients is None else f"{self.clients:,}"),
            ("seed", _UNKNOWN if self.seed is None else str(self.seed)),
            ("licence of the clients' data", _text(self.data_licence or "not stated")),
            ("form of the meta-nets", form),
            ("made by", f"fedl2p {self.version}"),
        ]
        lines = [
            *(_HEADER, "", "# Meta-nets of FedL2P", "", _ABOUT, "", _USE),
            *("## What they were learned for", "", "| | |", "|---|---|"),
            *(f"| {name} | {value} |" for name, value in rows),
            *("", "## Profiles of the clients", "", *self._range()),
        ]
        if self.settings:
            said = [f"| {_text(key)} | {_text(value)} |" for key, value in self.settings.items()]
            lines += ["", "## Settings of learning", "", "| setting | value |", "|---|---|", *said]
        if self.shapes:
            said = [f"| `{_text(k)}` | {list(shape)} |" for k, shape in self.shapes.items()]
            lines += ["", "## Tensors of the model", "", "| tensor | shape |", "|---|---|", *said]
        return "\n".join(lines) + "\n"

    def _sizes(self) -> str:
        numbers = sum(map(math.prod, self.shapes.values()))
        return f"{len(self.shapes)} tensors, {numbers:,} numbers (listed below)"

    def _range(self) -> list[str]:
        if not self.low:
            return ["Their range is not known: profiles stay with the clients."]
        return [
            f"Smallest and largest value over {self.profiled} clients. `fedl2p.personalize` warns "
            "where a client lies far outside.",
            "",
            *("| entry | lowest | highest |", "|---|---|---|"),
            *(
                f"| {_text(name)} | {low:.4g} | {self.high[name]:.4g} |"
                for name, low in self.low.items()
            ),
        ]


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's parameters and buffers, by name."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tuple(tensor.shape) for name, tensor in named}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _text(value: object) -> str:
    """Return a value as text that cannot end a cell of a Markdown table."""
    line = " ".join(str(value).split())
    return line.replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


_UNKNOWN = "not known"

_HEADER = """---
library_name: fedl2p
tags:
- federated-learning
- personalization
- meta-learning
- fedl2p
---"""

_ABOUT = """Two small networks, learned by a federation of clients, that tell a client how to
fine-tune a shared model on its own data: a learning rate per parameter tensor, and per batch-norm
layer the share of the client's own statistics. They read a profile of the client's data, never the
data. The method: Lee et al., "FedL2P: Federated Learning to Personalize", NeurIPS 2023,
[arXiv 2310.02420](https://arxiv.org/abs/2310.02420)."""

_USE = """```python
import fedl2p

metanets = fedl2p.MetaNets.load("FOLDER")  # this folder
mine = fedl2p.personalize(model, metanets, (x, y))  # the model below, a client's examples
```
"""
