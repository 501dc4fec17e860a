"""A new client of a finished run: personalized in one call from the files of the run's folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fedl2p import methods, models
from fedl2p.core.clientdata import Examples
from fedl2p.core.finetuning.evaluation import evaluate
from fedl2p.core.finetuning.inner_loop import DivergedError
from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.functional.precision import with_compute
from fedl2p.core.functional.state_tensors import load_state_tensors
from fedl2p.core.metanets import MetaNets
from fedl2p.core.objective import Objective
from fedl2p.core.personalization import Personalized, personalize
from fedl2p.data.files.npz_client import read_npz_client
from fedl2p.runs import layout
from fedl2p.runs.client_files import ClientHyperparams, write_personal_files
from fedl2p.runs.files import missing
from fedl2p.runs.population import PopulationInfo
from fedl2p.runs.tensors import load_tensors
from fedl2p.study.engines import find_device, objective_of_study
from fedl2p.study.settings import Study


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
        without test examples, or where the loss has no accuracy.
    loss_before, loss
        Mean loss there; None without test examples.
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
        model = f"model: {self.out / layout.MODEL}"
        if self.loss_before is None or self.loss is None:
            return f"personalized on {self.num_train} examples; there are none to test on\n{model}"
        if self.accuracy_before is None or self.accuracy is None:
            return (
                f"loss on {self.num_test} test examples: {self.loss_before:.4g} before, "
                f"{self.loss:.4g} after personalization on {self.num_train} examples\n{model}"
            )
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
    code: Sequence[str] = (),
) -> NewClient:
    """Personalize the global model of a run for a new client, and write the result.

    Parameters
    ----------
    run
        Folder of a finished run of the method fedl2p.
    data
        The client's file (see :mod:`fedl2p.data.files.npz_client`). All of ``x_train`` fine-tunes.
    out
        Folder to write into; made if there is none.
    seed
        Of the order of its batches.
    device
        auto, cpu or cuda.
    model
        The run's model, if it is none of :mod:`fedl2p.models.registry`: see :func:`load_run`.
    code
        The run's loss, metric and outputs where they are code outside this package, for the same
        reason: package.module:callable each.

    Raises
    ------
    ValueError
        If a file is missing, damaged or does not fit the run's model, or if ``out`` already holds
        a result; nothing is written then.
    """
    run, data, out = Path(run), Path(data), Path(out)
    for name in layout.PERSONAL:
        if (out / name).exists():
            raise ValueError(f"{out} already holds {name}; give another folder")
    study, net, metanets = load_run(run, model=model)
    for name in study.objective_code:
        if name not in code:
            raise ValueError(
                f"the run in {run} has {name!r} in its loss, metric or outputs, code outside this "
                f"package; if you trust it, name it: --code {name}"
            )
    aim = objective_of_study(study)
    population = PopulationInfo.read(run)
    client = read_npz_client(data, shape=population.shape, classes=population.classes, split=False)
    place = find_device(device)
    net, metanets, client = net.to(place), metanets.to(place), client.to(place)
    inner = study.settings.finetune
    client = inner.final_data(client)
    try:
        personalized = personalize(
            with_compute(net, study.compute),
            metanets,
            client,
            epochs=inner.epochs,
            batch_size=inner.batch_size,
            seed=seed,
            statistics=inner.statistics,
            loss=aim.loss,
            ignore_index=aim.ignore_index,
            metric=aim.metric,
            outputs=aim.outputs,
            optimizer=inner.optimizer,
            momentum=inner.momentum,
            weight_decay=inner.weight_decay,
        )
    except DivergedError as problem:
        raise ValueError(f"{data}: {problem}; look for extreme values in the data") from None
    before = _evaluate(net, aim, client.test)
    after = _evaluate(personalized.model, aim, client.test)
    result = NewClient(
        personalized=personalized,
        num_train=client.train.num,
        num_test=client.test.num if client.test else 0,
        accuracy_before=before and before[1],
        accuracy=after and after[1],
        loss_before=before and before[0],
        loss=after and after[0],
        out=out,
    )
    hyperparams = ClientHyperparams.of(
        data.stem, methods.METANETS, personalized.hyperparams, personalized.profile
    )
    write_personal_files(
        out, personalized.model, hyperparams, scores=result if client.test else None
    )
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
    for name in (layout.POPULATION, layout.GLOBAL_MODEL, *layout.METANETS_FILES):
        if not (run / name).exists():
            raise missing(run / name)
    if not models.is_ours(study.model) and model != study.model:
        raise ValueError(
            f"the run in {run} has the model {study.model!r}, code outside this package; if you "
            f"trust it, name it: --model {study.model}"
        )
    population = PopulationInfo.read(run)
    path = run / layout.GLOBAL_MODEL
    weights = load_tensors(path)
    shape, classes = population.shape, population.classes
    unfit = ValueError(
        f"the weights in {path} do not fit the model {study.model}; give the folder of an "
        "unchanged run"
    )
    if models.is_ours(study.model):
        # Before anything is allocated: a folder may claim any shape.
        with torch.device("meta"):
            claimed = models.load(study.model, shape=shape, classes=classes).state_dict()
        if {k: v.shape for k, v in claimed.items()} != {k: v.shape for k, v in weights.items()}:
            raise unfit
    net = models.load(study.model, shape=shape, classes=classes)
    try:
        load_state_tensors(net, weights)
    except RuntimeError:
        raise unfit from None
    return study, net.eval(), MetaNets.load(run)


def _evaluate(
    model: nn.Module, objective: Objective, test: Examples | None
) -> tuple[float, float | None] | None:
    """Return loss and accuracy on the test examples, if there are any."""
    if test is None:
        return None
    net = FunctionalModel(model, objective)
    mix = torch.zeros(1, len(net.sites.norms), dtype=net.dtype, device=net.device)
    ((loss, accuracy),) = evaluate(net, net.start(1, "global"), mix, [test])
    return loss, None if math.isnan(accuracy) else accuracy
