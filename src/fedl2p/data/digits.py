"""Handwritten digits with a simulated sensor per client: the data set that needs no download.

The images are scikit-learn's copy of the UCI set "Optical Recognition of Handwritten Digits"
(E. Alpaydin and C. Kaynak 1998, https://doi.org/10.24432/C50P49): 1,797 images of 8 x 8 pixels,
written by people, part of the installed package.

A client's data are made as follows; each step has a generator named by the seed and the client:

1. The images are split once per seed, class by class, into three disjoint pools for training,
   validation and test, in proportion to the sizes of a client's parts. No image crosses parts.
2. The client draws a class distribution from Dirichlet(alpha) and, from each pool, its images by
   that distribution (:func:`fedl2p.data.pools.partition.draw`). Clients share images, within a
   part.
3. Each of its images gets a separate small rotation and shift.
4. The client's sensor records them (:mod:`fedl2p.data.pools.sensors`). Every kind of sensor has
   equally many clients; two kinds occur among the unseen clients only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedl2p.core.clientdata import ClientData, Examples
from fedl2p.data.pools.client_cache import ClientCache
from fedl2p.data.pools.client_indices import PARTS, check_counts, client_names
from fedl2p.data.pools.partition import class_distribution, draw, label_entropy, stratified_split
from fedl2p.data.pools.sensors import SENSORS, apply_sensor, rotations, warp
from fedl2p.data.population import Population
from fedl2p.seeds import generator

if TYPE_CHECKING:
    from torch import Tensor

HIDDEN_SENSORS = ("illumination", "slant")
"""Kinds of sensor that occur among the unseen clients only."""

SEEN_SENSORS = tuple(kind for kind in SENSORS if kind not in HIDDEN_SENSORS)
"""Kinds of sensor that occur among the seen and the unseen clients."""

LICENCE = "CC BY 4.0"

# Mean and standard deviation of all pixels of the 1,797 images, after division by 16.
MEAN, SD = 0.3053, 0.3760


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Handwritten digits with label skew and a sensor per client.

    Parameters
    ----------
    seen
        Number of clients that take part in training.
    unseen
        Number of clients that only come afterwards.
    alpha
        Concentration of the Dirichlet distribution that each client's class distribution is drawn
        from: 0.1 is strong label skew, 1000 is none.
    train
        Images in a client's training part.
    validation
        Images in a client's validation part.
    test
        Images in a client's test part.
    sizes
        Images in the training parts of clients of different sizes, e.g. (5, 20, 80, 200): each
        size for equally many clients, at random. The ratio of a client's validation part to its
        training part is that of validation to train, but it has at least 2. Empty: all clients
        alike.
    rotation
        Largest random rotation of a single image, degrees to either side.
    shift
        Largest random shift of a single image, pixels along each axis to either side.
    feature_shift
        Whether clients have sensors of different kinds; if not, all have the plain images.
    severity
        Smallest and largest severity of a client's sensor, each in [0, 1], drawn uniformly.
    """

    seen: int = 40
    unseen: int = 20
    alpha: float = 1.0
    train: int = 96
    validation: int = 64
    test: int = 128
    sizes: tuple[int, ...] = ()
    rotation: float = 10.0
    shift: float = 0.5
    feature_shift: bool = True
    severity: tuple[float, float] = (0.3, 1.0)

    def __post_init__(self) -> None:
        check_counts(self, at_least_one=("seen", *PARTS), or_none="unseen")
        if self.sizes and min(self.sizes) < 1:
            raise ValueError(f"sizes must all be at least 1, got {self.sizes}")
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"rotation must be 0 to 180 degrees, got {self.rotation}")
        if not 0 <= self.shift <= 4:
            raise ValueError(f"shift must be 0 to 4 pixels, got {self.shift}")
        if not 0 <= self.severity[0] <= self.severity[1] <= 1:
            raise ValueError(
                f"severity must be two numbers with 0 <= smallest <= largest <= 1, "
                f"got {self.severity}"
            )

    @property
    def licence(self) -> str:
        """Licence of the data, for the card of what is learned on them."""
        return LICENCE

    def open(self, seed: int) -> DigitsPopulation:
        """Return the population under a seed; a client's data are made when it is opened."""
        return DigitsPopulation(self, seed)


class DigitsPopulation(Population):
    """The clients of :class:`Digits` under one seed; ``seen-00``, ..., ``unseen-00``, ..."""

    def __init__(self, source: Digits, seed: int) -> None:
        self.source = source
        self.seed = seed
        self.classes = 10
        self.shape = (1, 8, 8)
        self.seen = client_names("seen", source.seen)
        self.unseen = client_names("unseen", source.unseen)
        self._images, self._labels = load_digits()
        shares = [getattr(source, part) for part in PARTS]
        pools = stratified_split(self._labels, shares, generator=self._generator("pools"))
        self._pools = dict(zip(PARTS, pools, strict=True))
        self._sensors = self._assign_sensors()
        self._sizes = self._assign_sizes()
        self._cache = ClientCache(self._make)

    def open(self, name: str) -> ClientData:
        """Return the data of one client: images of shape (n, 1, 8, 8), standardised, float32."""
        self._check(name)
        return self._cache(name)

    def about(self, name: str) -> Mapping[str, str | float]:
        """Return the client's sensor, its severity, and entropy (nats) and mode of its labels."""
        self._check(name)
        labels = self._labels[self.indices(name)["train"]]
        return {
            "sensor": self._sensors[name],
            "severity": round(self._severity(name), 4),
            "label_entropy": round(label_entropy(labels), 4),
            "top_label": int(torch.bincount(labels).argmax()),
        }

    def indices(self, name: str) -> dict[str, Tensor]:
        """Return the client's positions among the original images, by part.

        :meth:`open` reads exactly these, in this order; with ``rotation=0``, ``shift=0`` and
        ``feature_shift=False`` it changes nothing but the standardisation.
        """
        self._check(name)
        labels = self._labels
        distribution = class_distribution(
            self.classes, alpha=self.source.alpha, generator=self._generator(name, "labels")
        )
        indices = {}
        for part, pool in self._pools.items():
            rng = self._generator(name, part)
            count = self._sizes[name][part]
            indices[part] = pool[draw(labels[pool], distribution, count, generator=rng)]
        return indices

    def _make(self, name: str) -> ClientData:
        indices = self.indices(name)
        # One call for all three parts: they have the same sensor.
        positions = torch.cat([indices[part] for part in PARTS])
        images = self._jitter(self._images[positions], self._generator(name, "jitter"))
        images = apply_sensor(
            self._sensors[name],
            images,
            severity=self._severity(name),
            generator=self._generator(name, "sensor"),
        )
        sizes = [len(indices[part]) for part in PARTS]
        x = torch.split((images - MEAN) / SD, sizes)
        y = torch.split(self._labels[positions], sizes)
        train, validation, test = map(Examples, x, y)
        return ClientData(train, validation, test)

    def _jitter(self, images: Tensor, rng: torch.Generator) -> Tensor:
        if self.source.rotation == 0 and self.source.shift == 0:
            return images
        degrees = self.source.rotation * (2 * torch.rand(len(images), generator=rng) - 1)
        shift = self.source.shift * (2 * torch.rand(len(images), 2, generator=rng) - 1)
        return warp(images, rotations(degrees), shift)

    def _severity(self, name: str) -> float:
        if self._sensors[name] == "none":
            return 0.0
        low, high = self.source.severity
        share = torch.rand((), generator=self._generator(name, "severity"), dtype=torch.float64)
        return low + (high - low) * float(share)

    def _assign_sensors(self) -> dict[str, str]:
        """Return each client's kind: every kind equally often in each pool, at random."""
        if not self.source.feature_shift:
            return dict.fromkeys(self.names, "none")
        sensors: dict[str, str] = {}
        for pool, names in (("seen", self.seen), ("unseen", self.unseen)):
            rng = self._generator("sensors", pool)
            kinds = [SEEN_SENSORS[i] for i in torch.randperm(len(SEEN_SENSORS), generator=rng)]
            if pool == "unseen":
                # First, so that even a few unseen clients include the hidden kinds.
                kinds = [*HIDDEN_SENSORS, *kinds]
            order = torch.randperm(len(names), generator=rng).tolist()
            sensors |= {names[at]: kinds[i % len(kinds)] for i, at in enumerate(order)}
        return sensors

    def _assign_sizes(self) -> dict[str, dict[str, int]]:
        """Return the sizes of each client's parts: every size equally often, at random."""
        source = self.source
        default = {part: getattr(source, part) for part in PARTS}
        if not source.sizes:
            return dict.fromkeys(self.names, default)
        sizes: dict[str, dict[str, int]] = {}
        for pool, names in (("seen", self.seen), ("unseen", self.unseen)):
            order = torch.randperm(len(names), generator=self._generator("sizes", pool)).tolist()
            for i, at in enumerate(order):
                train = source.sizes[i % len(source.sizes)]
                validation = max(2, round(train * source.validation / source.train))
                sizes[names[at]] = default | {"train": train, "validation": validation}
        return sizes

    def _generator(self, *parts: str) -> torch.Generator:
        return generator(self.seed, "digits", *parts)

    def _check(self, name: str) -> None:
        if name not in self._sensors:
            raise KeyError(
                f"there is no client {name!r}; their names are {self.names[0]} to {self.names[-1]}"
            )


@lru_cache(maxsize=1)
def load_digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits: images (1797, 1, 8, 8) in [0, 1], float32, and int64 labels.

    They are read from the installed package's file; importing the package would take seconds.

    Raises
    ------
    ModuleNotFoundError
        If scikit-learn is not installed.
    """
    package = find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError(
            "the digits come with scikit-learn, which is not installed; pip install 'fedl2p[data]'"
        )
    file = Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    rows = torch.from_numpy(np.loadtxt(file, dtype=np.float32, delimiter=","))
    return rows[:, :-1].reshape(-1, 1, 8, 8) / 16, rows[:, -1].long()
