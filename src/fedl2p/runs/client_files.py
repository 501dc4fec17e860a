"""What a client writes down for itself: how it was personalized. These files never travel."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedl2p.atomic_files import write_text
from fedl2p.method import Outcome


def write_strategy(folder: Path, method: str, outcome: Outcome) -> None:
    """Write one client's hyperparameters and profile to ``clients/<method>/<client>.json``.

    Nothing is written for a method that has no hyperparameters.

    Parameters
    ----------
    folder
        The run's folder.
    method
        Name of the method that personalized the client.
    outcome
        The client's outcome. Mixes are in [0, 1], rates absolute, divergences in nats, moments
        a layer's ``[mean, standard deviation]``; a value that is not finite is written as null.
    """
    if outcome.hyperparams is None:
        return
    profile = outcome.profile
    content = {
        "client": outcome.client,
        "method": method,
        **outcome.hyperparams.by_name(),
        "divergence": None
        if profile is None
        else dict(zip(profile.sites.norms, profile.divergence.tolist(), strict=True)),
        "moments": None
        if profile is None
        else dict(zip(profile.sites.layers, profile.moments.tolist(), strict=True)),
    }
    # A client may be called anything; its file stays inside the folder.
    path = folder / "clients" / quote(method, safe=" ") / f"{quote(outcome.client, safe=' ')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # One file per client and method: waiting for the disk each time would take longest.
    write_text(path, json.dumps(_finite(content), indent=1), sync=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
