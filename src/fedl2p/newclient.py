"""A new client of a finished run: personalized in one call from the files of the run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fedl2p import models
from fedl2p.core.clientdata import Examples
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.innerloop import DivergedError
from fedl2p.core.metanets import MetaNets
from fedl2p.core.personal import Personalized, personalize
from fedl2p.core.profiles import Profile
from fedl2p.data.npz import read_npz_client
from fedl2p.engines import find_device
from fedl2p.method import Outcome
from fedl2p.reporting.files import missing, read_json, write_atomically
from fedl2p.rundir import load_tensors, save_tensors
from fedl2p.study import Study

FILES = ("model.safetensors", "hyperparams.json", "outcome.json")
"""What is written; outcome.json only for a client with test examples."""


@dataclass(frozen=True, kw_only=True)
class NewClient:
    """One personalized new client.

    Parameters
    ----------
    personalized
        The model, the hyperparameters it was fine-tuned with, and the profile they came from.
    num_train, num_test
        Numbers of examples.
    accuracy_before, accuracy
        Of the global and of the personalized model on the test part, fractions in [0, 1]; None
        without test examples.
    loss_before, loss
        Mean cross-entropy there, in nats; None without test examples.
    out
        The folder that was written.
    """

    personalized: Personalized
    num_train: int
    num_test: int
    accuracy_before: float | None
    accuracy: float | None
    loss_before: float | None
    loss: float | None
    out: Path

    def __str__(self) -> str:
        """Return what happened, for a terminal."""
        model = f"model: {self.out / FILES[0]}"
        if self.accuracy_before is None or self.accuracy is None:
            return f"personalized on {self.num_train} examples; there are none to test on\n{model}"
        before, after = 100 * self.accuracy_before, 100 * self.accuracy
        return (
            f"accuracy on {self.num_test} test examples: {before:.1f} % before, {after:.1f} % "
            f"after personalization on {self.num_train} examples\n{model}"
        )


def personalize_new_client(
    run: str | Path, data: str | Path, out: str | Path, *, seed: int = 0, device: str = "auto"
) -> NewClient:
    """Personalize the global model of a run for a new client, and write the result.

    Parameters
    ----------
    run
        Folder of a finished run of the method fedl2p.
    data
        The client's .npz file (see :mod:`fedl2p.data.npz`). All of ``x_train`` fine-tunes.
    out
        Folder to write into; made if there is none.
    seed
        Of the order of its batches.
    device
        auto, cpu or cuda.

    Raises
    ------
    ValueError
        If a file is missing, damaged or does not fit the run's model, or if ``out`` already holds
        a result; nothing is written then.
    """
    run, out = Path(run), Path(out)
    there = [name for name in FILES if (out / name).exists()]
    if there:
        raise ValueError(f"{out} already holds {there[0]}; give another folder")
    study, model, metanets = load_run(run)
    world = read_json(run / "population.json")
    client = read_npz_client(
        data, shape=tuple(world["shape"]), classes=int(world["classes"]), split=False
    )
    where = find_device(device)
    model, metanets, client = model.to(where), metanets.to(where), client.to(where)
    inner = study.settings.finetune
    try:
        personalized = personalize(
            model,
            metanets,
            client,
            epochs=inner.epochs,
            batch_size=inner.batch_size,
            seed=seed,
            statistics=inner.statistics,
        )
    except DivergedError as problem:
        raise ValueError(f"{data}: {problem}; look for extreme values in the data") from None
    before = _judge(model, client.test)
    after = _judge(personalized.model, client.test)
    result = NewClient(
        personalized=personalized,
        num_train=len(client.train.y),
        num_test=len(client.test.y) if client.test else 0,
        accuracy_before=before and before[0],
        accuracy=after and after[0],
        loss_before=before and before[1],
        loss=after and after[1],
        out=out,
    )
    _write(result)
    return result


def load_run(run: Path) -> tuple[Study, nn.Module, MetaNets]:
    """Return the study of a finished run, its global model and its meta-nets.

    Raises
    ------
    ValueError
        If a file is missing or damaged.
    """
    study = Study.load(run)
    for name in ("population.json", "global.safetensors", "metanets.safetensors", "metanets.json"):
        if not (run / name).exists():
            raise missing(run / name)
    world = read_json(run / "population.json")
    model = models.load(study.model, shape=tuple(world["shape"]), classes=int(world["classes"]))
    try:
        model.load_state_dict(load_tensors(run / "global.safetensors"))
    except RuntimeError:
        raise ValueError(
            f"the weights in {run / 'global.safetensors'} do not fit the model {study.model}; give "
            "the folder of an unchanged run"
        ) from None
    return study, model.eval(), MetaNets.load(run / "metanets")


@torch.no_grad()
def _judge(model: nn.Module, test: Examples | None) -> tuple[float, float] | None:
    """Return accuracy and mean cross-entropy on the test examples, if there are any."""
    if test is None:
        return None
    logits = torch.cat([model.eval()(x) for x in test.x.split(256)])
    accuracy = (logits.argmax(1) == test.y).double().mean().item()
    return accuracy, F.cross_entropy(logits, test.y).item()


def _write(result: NewClient) -> None:
    personalized = result.personalized
    outcome = {name: getattr(result, name) for name in _NUMBERS} if result.num_test else None
    _write_files(
        result.out, personalized.model, personalized.hyperparams, personalized.profile, outcome
    )


def write_personal_files(out: Path, outcome: Outcome) -> None:
    """Write a client that a federation has personalized in the form of a new client's files.

    Parameters
    ----------
    out
        Folder to write into; made if there is none. What an earlier call wrote is replaced.
    outcome
        With its ``model``; hyperparams.json is written only if it has hyperparameters, outcome.json
        only if it has test examples.
    """
    if outcome.model is None:
        raise ValueError(f"the outcome of client {outcome.client!r} holds no model")
    numbers = {name: getattr(outcome, name) for name in _NUMBERS} if outcome.num_test else None
    _write_files(out, outcome.model, outcome.hyperparams, outcome.profile, numbers)


_NUMBERS = ("num_train", "num_test", "accuracy_before", "accuracy", "loss_before", "loss")


def _write_files(
    out: Path,
    model: nn.Module,
    hyperparams: Hyperparams | None,
    profile: Profile | None,
    numbers: Mapping[str, float | None] | None,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_tensors(out / FILES[0], model.state_dict())
    if hyperparams is None:
        (out / FILES[1]).unlink(missing_ok=True)
    else:
        strategy = hyperparams.by_name()
        if profile is not None:
            sites = profile.sites
            strategy |= {
                "divergence": dict(zip(sites.norms, profile.divergence.tolist(), strict=True)),
                "moments": dict(zip(sites.layers, profile.moments.tolist(), strict=True)),
            }
        write_atomically(out / FILES[1], json.dumps(strategy, indent=1) + "\n")
    if numbers is None:
        (out / FILES[2]).unlink(missing_ok=True)
    else:
        write_atomically(out / FILES[2], json.dumps(dict(numbers), indent=1) + "\n")
