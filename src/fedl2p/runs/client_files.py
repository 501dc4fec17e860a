"""Files of one client: how it was personalized, and its personalized model. They never travel."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedl2p.atomic_files import write_tensors, write_text
from fedl2p.core.functional.state_tensors import state_tensors
from fedl2p.runs import layout
from fedl2p.runs.columns import SCORES, values_of
from fedl2p.runs.files import (
    damaged,
    read_json,
    with_number,
    without_infinities,
    write_atomically,
)
from fedl2p.runs.validation import from_plain

if TYPE_CHECKING:
    from torch import nn

    from fedl2p.core.hyperparams import Hyperparams
    from fedl2p.core.profiles import Profile
    from fedl2p.core.sites import Sites
    from fedl2p.method import Outcome


@dataclass(frozen=True, kw_only=True)
class ClientHyperparams:
    """A client's hyperparameters and profile, the content of its JSON file.

    Parameters
    ----------
    client, method
        Names.
    mix
        Mix in [0, 1] by norm layer.
    rate
        Learning rate by parameter tensor.
    divergence
        Of the profile, in nats by norm layer; None without a profile.
    moments
        Of the profile, mean and standard deviation by layer; None without a profile.
    gradients
        Of the profile, norm relative to that of the weights by parameter tensor; None without a
        profile of them, as the following ones.
    loss
        Of the profile: ``loss`` and ``accuracy`` of the global model.
    labels
        Of the profile: ``entropy`` in nats and number of ``classes``.
    size
        Of the profile: number of ``examples``.
    """

    client: str
    method: str
    mix: Mapping[str, float]
    rate: Mapping[str, float]
    divergence: Mapping[str, float] | None
    moments: Mapping[str, tuple[float, float]] | None
    gradients: Mapping[str, float] | None
    loss: Mapping[str, float] | None
    labels: Mapping[str, float] | None
    size: Mapping[str, float] | None

    @classmethod
    def of(
        cls, client: str, method: str, hyperparams: Hyperparams, profile: Profile | None
    ) -> ClientHyperparams:
        """Return what the file of a client holds."""
        divergence = moments = None
        if profile is not None:
            divergence = dict(zip(profile.sites.norms, profile.divergence.tolist(), strict=True))
            pairs = [(mean, deviation) for mean, deviation in profile.moments.tolist()]
            moments = dict(zip(profile.sites.layers, pairs, strict=True))
        held = {} if profile is None else profile.tensors()
        more = {
            field: dict(zip(keys, held[field].tolist(), strict=True)) if field in held else None
            for field, keys in _keys(hyperparams.sites).items()
        }
        values = hyperparams.by_name()
        return cls(
            client=client,
            method=method,
            mix=values["mix"],
            rate=values["rate"],
            divergence=divergence,
            moments=moments,
            **more,
        )

    def to_json(self) -> str:
        """Return the content of the file; a number that is not finite is null."""
        return json.dumps(without_infinities(asdict(self)), indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> ClientHyperparams:
        """Read a client's file.

        Raises
        ------
        ValueError
            If the file is missing or damaged.
        """
        content = read_json(path)
        values = {key: value for key, value in content.items() if isinstance(value, dict)}
        try:
            return from_plain(cls, {**content, **with_number(math.nan, values)})
        except ValueError as error:
            raise damaged(path, str(error)) from None

    def profile(self, sites: Sites, path: Path, groups: Collection[str]) -> Profile:
        """Return the profile, in the order of a model's sites; ``path`` is for messages.

        Raises
        ------
        ValueError
            If there is none, or it lacks one of the groups or a layer, or a number is not finite.
        """
        import torch

        from fedl2p.core.profile_groups import GROUPS
        from fedl2p.core.profiles import Profile

        wanted = {GROUPS[group].field for group in GROUPS if group in groups}
        divergence, moments = self.divergence or {}, self.moments or {}
        pairs = [moments.get(name, (math.nan, math.nan)) for name in sites.layers]
        plain = {
            "divergence": [divergence.get(name, math.nan) for name in sites.norms],
            **{
                field: [(getattr(self, field) or {}).get(key, math.nan) for key in keys]
                for field, keys in _keys(sites).items()
                if field in wanted
            },
        }
        values = {k: torch.tensor(v, dtype=torch.float64) for k, v in plain.items()}
        values["moments"] = torch.tensor(pairs, dtype=torch.float64).reshape(len(sites.layers), 2)
        if not all(bool(t.isfinite().all()) for t in values.values()):
            raise damaged(path, "it lacks the profile, or a part of it, of the run's model")
        # how many examples it was made of is not always recorded, and its readers do not need it
        return Profile(**values, num_examples=0, sites=sites)


def _keys(sites: Sites) -> dict[str, tuple[str, ...]]:
    """Return the keys of those parts of a profile that have one number per key."""
    return {
        "gradients": sites.params,
        "loss": ("loss", "accuracy"),
        "labels": ("entropy", "classes", "agreement"),
        "size": ("examples",),
    }


def write_hyperparams(run: Path, method: str, outcome: Outcome) -> None:
    """Write a client's hyperparameters and profile to ``clients/<method>/<client>.json``.

    Nothing is written for a method that has no hyperparameters.

    Parameters
    ----------
    run
        The run's folder.
    method
        Name of the method that personalized the client.
    outcome
        The client's outcome.
    """
    if outcome.hyperparams is None:
        return
    content = ClientHyperparams.of(outcome.client, method, outcome.hyperparams, outcome.profile)
    path = layout.client_file(run, method, outcome.client)
    path.parent.mkdir(parents=True, exist_ok=True)
    # One file per client and method: waiting for the disk each time would take longest.
    write_text(path, content.to_json(), sync=False)


def write_personal_files(
    out: Path,
    model: nn.Module,
    hyperparams: ClientHyperparams | None = None,
    scores: object | None = None,
) -> None:
    """Write a client's personalized model into a folder of its own, with what is known of it.

    Parameters
    ----------
    out
        The folder; made if there is none. What an earlier call wrote is replaced or removed.
    model
        The personalized model.
    hyperparams
        What it was fine-tuned with; None where the method has no hyperparameters.
    scores
        The numbers of a :class:`fedl2p.method.Scores`; None without test examples.

    Raises
    ------
    ValueError
        If the folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ValueError(
            f"cannot write into {out} ({problem.strerror}); give another folder"
        ) from None
    write_tensors(out / layout.MODEL, state_tensors(model))
    numbers = [name for name in SCORES if name != "seconds"]
    texts = {
        layout.HYPERPARAMS: None if hyperparams is None else hyperparams.to_json(),
        layout.OUTCOME: None
        if scores is None
        else json.dumps(dict(zip(numbers, values_of(scores, numbers), strict=True)), indent=1)
        + "\n",
    }
    for name, text in texts.items():
        if text is None:
            (out / name).unlink(missing_ok=True)
        else:
            write_atomically(out / name, text)
