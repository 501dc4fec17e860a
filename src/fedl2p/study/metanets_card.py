"""The card of meta-nets that were just learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from fedl2p.core.card import Card, shapes_of
from fedl2p.core.functional.recorded_objective import objective_of
from fedl2p.core.metanets import MetaNets
from fedl2p.federation.messages import Clients
from fedl2p.federation.settings import Rounds
from fedl2p.method import Method
from fedl2p.methods.base.personalizing import profile_in


def learned_card(
    nets: MetaNets,
    model: nn.Module,
    method: Method,
    *,
    rounds: Rounds,
    clients: Clients,
    seen: int,
    seed: int,
    data_licence: str | None,
) -> Card:
    """Return the card of meta-nets.

    The range of the profiles is known where clients are simulated on this machine, which keep
    theirs here; under differential privacy it is left out.

    Parameters
    ----------
    nets, model, method
        What was learned, for which model, by which method.
    rounds, seed
        How.
    clients, seen
        Who was asked, and how many there are.
    data_licence
        As whoever learned states it.
    """
    kept = {} if rounds.privacy.on or not clients.simulated else clients.kept(method.name)
    profiles = [profile_in(state, nets.sites) for _, state in sorted(kept.items())]
    loss = objective_of(model).loss
    settings: dict[str, Any] = {"loss": loss if isinstance(loss, str) else "a function"}
    settings |= _flat("rounds", dataclasses.asdict(rounds))
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            settings |= _flat(field.name, dataclasses.asdict(value))
    card = Card(
        model=type(model).__name__,
        shapes=shapes_of(model),
        clients=seen,
        settings=settings,
        seed=seed,
        data_licence=data_licence,
    )
    return card.with_profiles(profiles, nets.config.groups)


def _flat(name: str, value: object) -> dict[str, Any]:
    """Return nested settings as one level of dotted names."""
    if isinstance(value, Mapping):
        return {k: v for key, one in value.items() for k, v in _flat(f"{name}.{key}", one).items()}
    plain = value is None or isinstance(value, str | int | float | bool)
    return {name: value if plain else str(value)}
