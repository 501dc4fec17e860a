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
from fedl2p.atomic_files import write_tensors
from fedl2p.core.clientdata import Examples
from fedl2p.core.finetuning.inner_loop import DivergedError
from fedl2p.core.functional.precision import computing
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.metanets import MetaNets
from fedl2p.core.personalization import Personalized, personalize
from fedl2p.core.profiles import Profile
from fedl2p.data.npz import MAX_CLASSES, read_npz_client
from fedl2p.method import Outcome
from fedl2p.runs.files import damaged, missing, read_json, write_atomically
from fedl2p.runs.layout import load_tensors
from fedl2p.study.engines import find_device
from fedl2p.study.settings import Study

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
    run: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    seed: int = 0,
    device: str = "auto",
    model: str | None = None,
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
    model
        The run's model, if it is none of :mod:`fedl2p.models.registry`: see :func:`load_run`.

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
    study, net, metanets = load_run(run, model=model)
    shape, classes = _read_world(run)
    client = read_npz_client(data, shape=shape, classes=classes, split=False)
    where = find_device(device)
    net, metanets, client = net.to(where), metanets.to(where), client.to(where)
    inner = study.settings.finetune
    client = inner.final_data(client)
    try:
        personalized = personalize(
            computing(net, study.compute),
            metanets,
            client,
            epochs=inner.epochs,
            batch_size=inner.batch_size,
            seed=seed,
            statistics=inner.statistics,
        )
    except DivergedError as problem:
        raise ValueError(f"{data}: {problem}; look for extreme values in the data") from None
    before = _judge(net, client.test)
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


def load_run(run: Path, *, model: str | None = None) -> tuple[Study, nn.Module, MetaNets]:
    """Return the study of a finished run, its global model and its meta-nets.

    Parameters
    ----------
    run
        The run's folder.
    model
        The run's model as package.module:callable, if it is none of :mod:`fedl2p.models.registry`.
        To build it is to run that code, so a folder that came from elsewhere cannot name it alone.

    Raises
    ------
    ValueError
        If a file is missing or damaged, or the model is one that must be named.
    """
    study = Study.load(run)
    for name in ("population.json", "global.safetensors", "metanets.safetensors", "metanets.json"):
        if not (run / name).exists():
            raise missing(run / name)
    if not models.is_ours(study.model) and model != study.model:
        raise ValueError(
            f"the run in {run} has the model {study.model!r}, code outside this package; if you "
            f"trust it, name it: --model {study.model}"
        )
    shape, classes = _read_world(run)
    weights = load_tensors(run / "global.safetensors")
    net = models.load(study.model, shape=shape, classes=classes)
    try:
        net.load_state_dict(weights)
    except RuntimeError:
        raise ValueError(
            f"the weights in {run / 'global.safetensors'} do not fit the model {study.model}; give "
            "the folder of an unchanged run"
        ) from None
    return study, net.eval(), MetaNets.load(run / "metanets")


def _read_world(run: Path) -> tuple[tuple[int, ...], int]:
    """Return the shape of an example and the number of classes of a run."""
    path = run / "population.json"
    world = read_json(path)
    shape, classes = world.get("shape"), world.get("classes")
    if not isinstance(shape, list) or not all(
        type(n) is int and 0 < n <= _LARGEST_SIDE for n in shape
    ):
        raise damaged(path, f"shape is {str(shape)[:80]}, not a list of sizes")
    if not (type(classes) is int and 0 < classes <= MAX_CLASSES):
        raise damaged(path, f"classes is {str(classes)[:80]}, not a number of classes")
    return tuple(shape), classes


_LARGEST_SIDE = 2**16


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
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ValueError(
            f"cannot write into {out} ({problem.strerror}); give another folder"
        ) from None
    write_tensors(out / FILES[0], model.state_dict())
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
