"""A machine of its own: which client it is, where its data lie, and what is written there.

A SuperNode says so by ``--node-config``, and nobody else can: the paths are the node's own. What a
node writes stays on it:

- ``received/``: what it was sent, the global model and the meta-nets, in the form of a run's
  folder, so that ``fedl2p personalize --run received`` works there at any time;
- ``<method>/``: the personalized model, its hyperparameters, the accuracy before and after;
- ``models/``: the global models that it has, so that each travels once;
- ``log.txt``.
"""

from __future__ import annotations

import os
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from fedl2p import methods, models
from fedl2p.atomic_files import write_tensors
from fedl2p.core.card import Card, shapes_of
from fedl2p.core.functional.state_tensors import state_tensors
from fedl2p.core.metanets import MetaNets
from fedl2p.data.remote import NodePopulation, Remote, RemotePopulation
from fedl2p.federation.clients.node import ClientNode
from fedl2p.method import Outcome, State
from fedl2p.runs import layout
from fedl2p.runs.client_files import ClientHyperparams, write_personal_files
from fedl2p.runs.folder import RunWriter
from fedl2p.runs.population import PopulationInfo
from fedl2p.study.engines import find_device, node_of
from fedl2p.study.settings import Study

RECEIVED = "received"


@dataclass(frozen=True, kw_only=True)
class Node:
    """What a SuperNode's configuration says.

    Parameters
    ----------
    client
        The client's name.
    data
        Its .npz file.
    out
        Folder on the node for everything that is written there.
    device
        Where it computes, auto, cpu or cuda; None as the study says.
    model
        A model outside :mod:`fedl2p.models.registry` that the node agrees to build, as
        package.module:callable. To build it is to run that code, so the study cannot name it alone.
    code
        The same of a study's loss, metric and outputs.
    """

    client: str
    data: Path
    out: Path
    device: str | None = None
    model: str | None = None
    code: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, bool | int | float | str]) -> Node | None:
        """Read ``Context.node_config``; None if it names no data, as in a simulation.

        ``data`` is an .npz file, or a folder that holds ``<client>.npz`` or a single .npz file;
        ``client`` is by default the file's name without its suffix.

        Raises
        ------
        ValueError
            If ``out`` is missing, or the file cannot be told.
        """
        if "data" not in config:
            return None
        name = str(config["client"]) if "client" in config else None
        if "out" not in config:
            raise ValueError(
                "the node has data but no folder to write into; start its SuperNode with "
                '--node-config \'data="FILE.npz" out="DIR"\''
            )
        file = _find_file(Path(str(config["data"])).expanduser(), name)
        return cls(
            client=name or file.stem,
            data=file,
            out=Path(str(config["out"])).expanduser(),
            device=str(config["device"]) if "device" in config else None,
            model=str(config["model"]) if "model" in config else None,
            code=tuple(str(config.get("code", "")).split()),
        )

    def client_node(self, study: Study, *, split: bool = True) -> ClientNode:
        """Return what answers for this machine's client.

        Parameters
        ----------
        study
            What it takes part in.
        split
            Whether a file without a validation part gives up a fifth of its training part, which
            learning needs and personalization alone does not.

        Raises
        ------
        ValueError
            If the study's clients are not on nodes, its model is code that the node has not agreed
            to, or the device is not available.
        """
        source = study.data
        if not isinstance(source, Remote):
            raise ValueError(
                f"the recipe {study.recipe!r} brings clients of its own, but this node has its own "
                "data; use the recipe 'federation'"
            )
        source.check()
        for name in study.objective_code:
            if name not in self.code:
                raise ValueError(
                    f"the study has {name!r} in its loss, metric or outputs, code outside this "
                    f"package; a node that trusts it says so: --node-config 'code=\"{name}\" ...'"
                )
        if not models.is_ours(study.model) and study.model != self.model:
            raise ValueError(
                f"the study has the model {study.model!r}, code outside this package; a node that "
                f"trusts it says so: --node-config 'model=\"{study.model}\" ...'"
            )

        def write(method: str, model: nn.Module, state: State, outcome: Outcome) -> None:
            nets = methods.build(method, study.settings).final_metanets(model, state)
            if nets is not None:
                self._keep_received(study, model, nets)
            _write_personal_files(self.out / layout.as_file_name(method), method, outcome)

        # Before a model of that shape is made: a server may claim any.
        if (shape := _shape_in(self.data)) is not None and shape != source.shape:
            raise ValueError(
                f"client {self.client!r} has examples of shape {shape}, the study of {source.shape}"
            )
        return node_of(
            study,
            NodePopulation(
                self.client, self.data, shape=source.shape, classes=source.classes, split=split
            ),
            device=find_device(self.device or study.device),
            received=self.out / "models",
            on_personalized=write,
            wants_models=True,
        )

    def _keep_received(self, study: Study, model: nn.Module, nets: MetaNets) -> None:
        """Write what ``fedl2p personalize`` needs, all files or none."""
        assert isinstance(study.data, Remote)
        place = self.out / RECEIVED
        # A process that was killed or found the disk full has left one; a node has one at a time.
        for left in self.out.glob(f".{RECEIVED}.*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        unfinished = self.out / f".{RECEIVED}.{os.getpid()}.tmp"
        population = RemotePopulation((), shape=study.data.shape, classes=study.data.classes)
        try:
            RunWriter(unfinished).describe(study, PopulationInfo.of(population))
            write_tensors(unfinished / layout.GLOBAL_MODEL, state_tensors(model))
            nets.card = Card(model=type(model).__name__, shapes=shapes_of(model))
            nets.save(unfinished)
            shutil.rmtree(place, ignore_errors=True)
            os.replace(unfinished, place)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _shape_in(file: Path) -> tuple[int, ...] | None:
    """Return the shape of one example by the file's header, or None if it has none to be read.

    What is wrong with the file is said where its data are read.
    """
    try:
        with zipfile.ZipFile(file) as archive, archive.open("x_train.npy") as array:
            version = np.lib.format.read_magic(array)
            read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
                version, np.lib.format.read_array_header_2_0
            )
            shape: tuple[int, ...] = read(array)[0]
    except (OSError, ValueError, LookupError, zipfile.BadZipFile, zlib.error, NotImplementedError):
        return None
    return shape[1:]


def _write_personal_files(out: Path, method: str, outcome: Outcome) -> None:
    """Write a client's personalized model, and its hyperparameters and scores if it has such."""
    assert outcome.model is not None, "clients on nodes ask for the personalized model"
    hyperparams = None
    if outcome.hyperparams is not None:
        hyperparams = ClientHyperparams.of(
            outcome.client, method, outcome.hyperparams, outcome.profile
        )
    scores = outcome if outcome.num_test else None
    write_personal_files(out, outcome.model, hyperparams, scores)


def _find_file(data: Path, client: str | None) -> Path:
    """Return the client's file: ``data`` itself, or the one that it holds."""
    if data.suffix == ".npz" and not data.is_dir():
        return data
    if not data.is_dir():
        raise ValueError("the node's data is neither an .npz file nor a folder that holds one")
    if client is not None and (data / f"{client}.npz").is_file():
        return data / f"{client}.npz"
    files = sorted(data.glob("*.npz"))
    if len(files) != 1:
        raise ValueError(
            f"the node's data folder holds {len(files)} .npz files; name one, or name the client "
            "like its file"
        )
    return files[0]
