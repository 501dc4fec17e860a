"""Clients that differ in kind, on Fashion-MNIST or on scikit-learn's handwritten digits.

Every client is of one kind; each kind has equally many clients:

- ``clean``: the plain images, all classes, true labels;
- ``sensor``: the images as a simulated sensor of the client records them
  (:mod:`fedl2p.data.pools.sensors`); two sensors occur among the unseen clients only;
- ``two-classes``: images of two classes, drawn per client;
- ``tiny``: as clean, with a handful of labelled images;
- ``swapped-codes``: classes are exchanged in pairs, drawn per client: what the others call 3 is 5
  here. The client's codes are its true labels, in its test part too;
- ``noisy-labels``: a share of the labels is wrong, of the training and validation parts only.

Within every kind but ``tiny`` clients have different numbers of images, each size equally often.

The global model is pre-trained on clean images that no client has. The others are split once per
seed, class by class, into pools for training, validation and test; no image crosses parts. A client
draws its images from each pool; clients share images, within a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch

from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.data import digits, fashion
from fedl2p.data.digits import HIDDEN_SENSORS, SEEN_SENSORS
from fedl2p.data.files.folders import root_of
from fedl2p.data.pools.client_cache import ClientCache
from fedl2p.data.pools.client_indices import PARTS, check_counts, client_names
from fedl2p.data.pools.in_memory import InMemory
from fedl2p.data.pools.partition import draw, label_entropy, stratified_split
from fedl2p.data.pools.sensors import apply_sensor
from fedl2p.data.population import Population
from fedl2p.seeds import generator

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["clean", "sensor", "two-classes", "tiny", "swapped-codes", "noisy-labels"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Dataset = Literal["fashion", "digits"]

NAME = "kinds"  # part of every draw
VALIDATION_SHARE = 1 / 3
"""Of a client's labelled images; at least one image is left on either side."""


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """Clients of different kinds.

    Parameters
    ----------
    dataset
        fashion (Fashion-MNIST) or digits (scikit-learn's).
    root
        Folder of Fashion-MNIST's files; None for $FEDL2P_DATA/fashion or data/fashion, or where
        these are not there that of Debian's package dataset-fashion-mnist.
    seen
        Number of clients that take part in training.
    unseen
        Number of clients that only come afterwards.
    kinds
        The kinds, of clean, sensor, two-classes, tiny, swapped-codes and noisy-labels.
    sizes
        Labelled images of a client, training and validation part together; each size equally often
        within a kind. A third is the validation part.
    tiny
        The same of the kind tiny.
    test
        Images in a client's test part.
    severity
        Smallest and largest severity of a sensor, each in [0, 1], drawn uniformly.
    swapped
        Classes whose codes are exchanged in pairs in the kind swapped-codes.
    wrong
        Share of wrong labels in the kind noisy-labels.
    clean
        Clean images that the global model is pre-trained on; rounded class by class.
    """

    dataset: Dataset = "fashion"
    root: Path | None = None
    seen: int = 120
    unseen: int = 90
    kinds: tuple[Kind, ...] = KINDS
    sizes: tuple[int, ...] = (6, 12, 25, 50, 100, 200)
    tiny: int = 6
    test: int = 300
    severity: tuple[float, float] = (0.5, 1.0)
    swapped: int = 6
    wrong: float = 0.4
    clean: int = 20_000

    def __post_init__(self) -> None:
        check_counts(self, at_least_one=("seen", "test", "clean"), or_none="unseen")
        if self.dataset not in get_args(Dataset):
            raise ValueError(f"dataset must be fashion or digits, got {self.dataset!r}")
        if not self.kinds or len(set(self.kinds)) != len(self.kinds):
            raise ValueError(f"kinds must be different names, at least one, got {self.kinds}")
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"there is no kind {kind!r}; there are {', '.join(KINDS)}")
        if not self.sizes or min(*self.sizes, self.tiny) < 2:
            raise ValueError(
                f"sizes and tiny must all be at least 2, a training and a validation image, got "
                f"{self.sizes} and {self.tiny}"
            )
        if not 0 <= self.severity[0] <= self.severity[1] <= 1:
            raise ValueError(
                f"severity must be two numbers with 0 <= smallest <= largest <= 1, "
                f"got {self.severity}"
            )
        if self.swapped < 2 or self.swapped % 2:
            raise ValueError(f"swapped must be an even number from 2 on, got {self.swapped}")
        if not 0 < self.wrong < 1:
            raise ValueError(f"wrong must be above 0 and below 1, got {self.wrong}")

    @property
    def licence(self) -> str | None:
        """Licence of the data, for the card of what is learned on them; None if not known."""
        return digits.LICENCE if self.dataset == "digits" else None

    def open(self, seed: int) -> KindsPopulation:
        """Return the population under a seed; a client's data are made when it is opened.

        Raises
        ------
        ValueError
            If the data is missing or damaged, or has too few images or classes.
        """
        return KindsPopulation(self, seed)


@dataclass(frozen=True, kw_only=True)
class _Images:
    """All images of a data set: the pool of the clean ones and of each part, by position.

    ``pixels(positions)`` returns images (n, 1, h, w) in [0, 1]; ``standardise`` is what a model
    reads of them.
    """

    pixels: Callable[[Tensor], Tensor]
    standardise: Callable[[Tensor], Tensor]
    labels: Tensor
    pools: Mapping[str, Tensor]
    shape: tuple[int, ...]
    classes: int


@dataclass(frozen=True, kw_only=True)
class _Client:
    """What makes a client what it is, but for its images."""

    kind: Kind
    labelled: int
    sensor: str = "none"


class KindsPopulation(Population):
    """The clients of :class:`Kinds` under one seed; ``seen-000``, ..., ``unseen-00``, ..."""

    def __init__(self, source: Kinds, seed: int) -> None:
        self.source, self.seed = source, seed
        self._images = self._open_images()
        self.classes, self.shape = self._images.classes, self._images.shape
        if self.classes < source.swapped:
            raise ValueError(
                f"swapped is {source.swapped}, but there are only {self.classes} classes; swap "
                "fewer"
            )
        self.seen = client_names("seen", source.seen)
        self.unseen = client_names("unseen", source.unseen)
        self._clients = {
            **self._assign("seen", self.seen, SEEN_SENSORS),
            # The hidden ones first, so that even a few unseen clients include them.
            **self._assign("unseen", self.unseen, (*HIDDEN_SENSORS, *SEEN_SENSORS)),
        }
        self._cache = ClientCache(self._make)

    def open(self, name: str) -> ClientData:
        """Return the data of one client: images of shape (n, 1, h, w), standardised, float32."""
        self._check(name)
        return self._cache(name)

    def about(self, name: str) -> Mapping[str, str | float]:
        """Return the client's kind, sensor and severity, and entropy and mode of its labels.

        The entropy is in nats; both are those of the training part as the client sees it.
        """
        client = self._clients[self._check(name)]
        labels = self._labels(name, self.indices(name))["train"]
        return {
            "kind": client.kind,
            "sensor": client.sensor,
            "severity": round(self._severity(name), 4),
            "label_entropy": round(label_entropy(labels), 4),
            "top_label": int(torch.bincount(labels).argmax()),
        }

    def pretraining(self) -> InMemory:
        """Return one client, ``clean``, with the clean images that no other client has."""
        positions = self._images.pools["clean"]
        x = self._images.standardise(self._images.pixels(positions))
        return InMemory({"clean": ClientData(Examples(x, self._images.labels[positions]))})

    def indices(self, name: str) -> dict[str, Tensor]:
        """Return the client's positions among the data set's images, by part."""
        client = self._clients[self._check(name)]
        chosen = torch.arange(self.classes)
        if client.kind == "two-classes":
            rng = self._generator(name, "classes")
            chosen = torch.randperm(self.classes, generator=rng)[:2]
        validation = min(max(1, round(client.labelled * VALIDATION_SHARE)), client.labelled - 1)
        counts = (client.labelled - validation, validation, self.source.test)
        indices = {}
        for part, count in zip(PARTS, counts, strict=True):
            pool = self._images.pools[part]
            labels = self._images.labels[pool]
            pool, labels = (t[torch.isin(labels, chosen)] for t in (pool, labels))
            equal = torch.zeros(self.classes).index_fill_(0, chosen, 1.0)
            rng = self._generator(name, part)
            indices[part] = pool[draw(labels, equal, count, generator=rng)]
        return indices

    def _make(self, name: str) -> ClientData:
        indices, client = self.indices(name), self._clients[name]
        # One call for all three parts: they have the same sensor.
        pixels = apply_sensor(
            client.sensor,
            self._images.pixels(torch.cat([indices[part] for part in PARTS])),
            severity=self._severity(name),
            generator=self._generator(name, "sensor"),
        )
        x = torch.split(self._images.standardise(pixels), [len(indices[part]) for part in PARTS])
        y = self._labels(name, indices)
        train, validation, test = (
            Examples(inputs, y[part]) for inputs, part in zip(x, PARTS, strict=True)
        )
        return ClientData(train, validation, test)

    def _labels(self, name: str, indices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the client's labels by part, as it sees them."""
        kind = self._clients[name].kind
        labels = {part: self._images.labels[positions] for part, positions in indices.items()}
        if kind == "swapped-codes":
            rng = self._generator(name, "codes")
            one, other = torch.randperm(self.classes, generator=rng)[: self.source.swapped].chunk(2)
            codes = torch.arange(self.classes)
            codes[one], codes[other] = other, one
            return {part: codes[true] for part, true in labels.items()}
        if kind == "noisy-labels":
            labelled = torch.cat([labels["train"], labels["validation"]])
            rng = self._generator(name, "noise")
            order = torch.randperm(len(labelled), generator=rng)
            wrong = order[: round(self.source.wrong * len(labelled))]
            shift = torch.randint(1, self.classes, (len(wrong),), generator=rng)
            labelled[wrong] = (labelled[wrong] + shift) % self.classes
            train, validation = labelled.split([len(labels["train"]), len(labels["validation"])])
            return {"train": train, "validation": validation, "test": labels["test"]}
        return labels

    def _severity(self, name: str) -> float:
        if self._clients[name].sensor == "none":
            return 0.0
        low, high = self.source.severity
        share = torch.rand((), generator=self._generator(name, "severity"), dtype=torch.float64)
        return low + (high - low) * float(share)

    def _assign(
        self, pool: str, names: Sequence[str], sensors: Sequence[str]
    ) -> dict[str, _Client]:
        """Return what each client is: kinds, and sizes and sensors within a kind, go round."""
        source = self.source
        sensors = [sensor for sensor in sensors if sensor != "none"]
        order = torch.randperm(len(names), generator=self._generator("kinds", pool)).tolist()
        clients = {}
        for position, kind in enumerate(source.kinds):
            members = [names[i] for i in order[position :: len(source.kinds)]]
            sizes = self._go_round(pool, kind, source.sizes, len(members))
            for i, name in enumerate(members):
                clients[name] = _Client(
                    kind=kind,
                    labelled=source.tiny if kind == "tiny" else sizes[i],
                    sensor=sensors[i % len(sensors)] if kind == "sensor" else "none",
                )
        return clients

    def _go_round(self, pool: str, kind: str, sizes: Sequence[int], count: int) -> list[int]:
        """Return so many sizes, each equally often, in random order."""
        rounds = [sizes[i % len(sizes)] for i in range(count)]
        rng = self._generator("sizes", pool, kind)
        return [rounds[i] for i in torch.randperm(count, generator=rng)]

    def _open_images(self) -> _Images:
        if self.source.dataset == "digits":
            images, labels = digits.load_digits()
            pools = self._split(labels, torch.arange(len(labels)), self.source.clean, test=0.4)
            return _Images(
                pixels=lambda positions: images[positions],
                standardise=lambda x: (x - digits.MEAN) / digits.SD,
                labels=labels,
                pools=pools,
                shape=tuple(images.shape[1:]),
                classes=10,
            )
        loaded = fashion.load(root_of(fashion.NAME, self.source.root))
        x = torch.from_numpy(loaded.x)
        pools = self._split(loaded.labels, torch.arange(loaded.train), self.source.clean)
        pools["test"] = loaded.is_test.nonzero().flatten()
        mean, sd = fashion.NORMALISE.mean[0], fashion.NORMALISE.sd[0]
        return _Images(
            pixels=lambda positions: x[positions].to(torch.float32) / 255,
            standardise=lambda x: (x - mean) / sd,
            labels=loaded.labels,
            pools=pools,
            shape=tuple(x.shape[1:]),
            classes=loaded.classes,
        )

    def _split(
        self, labels: Tensor, positions: Tensor, clean: int, *, test: float = 0.0
    ) -> dict[str, Tensor]:
        """Split images into the pools: so many clean ones, and of the others a share for test."""
        left = len(positions) - clean
        if left < len(PARTS) * 10:
            raise ValueError(
                f"clean is {clean}, but there are only {len(positions)} images that are not for "
                "test, and clients need some; use fewer"
            )
        shares = {"clean": float(clean)}
        shares["train"] = left * (1 - test) * (1 - VALIDATION_SHARE)
        shares["validation"] = left * (1 - test) * VALIDATION_SHARE
        if test:
            shares["test"] = left * test
        pools = stratified_split(
            labels[positions], list(shares.values()), generator=self._generator("pools")
        )
        return {name: positions[pool] for name, pool in zip(shares, pools, strict=True)}

    def _generator(self, *parts: str) -> torch.Generator:
        return generator(self.seed, NAME, *parts)

    def _check(self, name: str) -> str:
        if name not in self._clients:
            raise KeyError(
                f"there is no client {name!r}; their names are {self.names[0]} to {self.names[-1]}"
            )
        return name
