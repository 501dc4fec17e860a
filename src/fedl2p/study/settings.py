"""The main job: what a study is made of, and how it is run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from fedl2p import methods
from fedl2p.core.settings import Compute
from fedl2p.data.population import Population
from fedl2p.federation.settings import Ray, Rounds
from fedl2p.methods.base.settings import Settings
from fedl2p.runs.config import from_plain
from fedl2p.runs.files import read_config
from fedl2p.version import __version__

METHODS = (
    "fedavg",
    "finetuning-global",
    "finetuning-client",
    "bestfixed",
    "local",
    "gridsearch",
    "l2p",
    "fedl2p",
)
"""What a study runs unless it says otherwise, in this order."""


@runtime_checkable
class Source(Protocol):
    """Where clients come from: settings (a frozen dataclass) that open a population."""

    def open(self, seed: int) -> Population:
        """Return the population under a seed; the same one at every call."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """One main job, completely: equal studies give equal results.

    Parameters
    ----------
    data
        Where the clients come from.
    recipe
        Name of the recipe, for reports.
    model
        The model to personalize, as package.module:callable; the callable takes the shape of one
        example and the number of classes and returns a torch.nn.Module.
    pretrained
        A safetensors file with the weights of the global model, by parameter and buffer name, or
        torchvision's checkpoint of ResNet-18 (.pth), of which the head is left out where the
        number of classes differs; with it nothing is pre-trained. None: pre-train with FedAvg.
    pretrained_by
        The command that gets or makes that file; it is named where the file is missing.
    seed
        The source of all randomness: data, initial weights, cohorts, batches.
    methods
        The methods to compare, by name, in the order of the report; your own by
        package.module:callable.
    pretrain
        The rounds that train the global model.
    learn
        The rounds that learn how to personalize.
    settings
        The settings of the methods.
    engine
        What runs the clients: in-process, or ray (several workers on this machine). The results are
        the same, bit for bit at equal threads.
    device
        Where models and data are: cpu, cuda, or auto (cuda if there is a GPU).
    compute
        Precision, memory layout and stacks of the computations.
    ray
        What each of Ray's workers may use; for engine ray.
    """

    data: Source
    recipe: str = "custom"
    model: str = "fedl2p.models:small_conv"
    pretrained: Path | None = None
    pretrained_by: str = ""
    seed: int = 0
    methods: tuple[str, ...] = METHODS
    pretrain: Rounds = field(default_factory=Rounds)
    learn: Rounds = field(default_factory=Rounds)
    settings: Settings = field(default_factory=Settings)
    engine: Literal["in-process", "ray"] = "in-process"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compute: Compute = field(default_factory=Compute)
    ray: Ray = field(default_factory=Ray)

    def __post_init__(self) -> None:
        if not self.seed >= 0:
            raise ValueError(f"seed is {self.seed}, but must be 0 or more")
        if not self.methods:
            raise ValueError(
                f"there is no method to run; name some of {', '.join(methods.names())}"
            )
        titles = [methods.title(name, self.settings) for name in self.methods]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(f"method {title!r} is named twice; name each once")

    @property
    def stages(self) -> int:
        """How many stages the run has: rounds of pre-training and methods, personalizations."""
        built = [methods.build(name, self.settings) for name in self.methods]
        rounds = [m for m in built if m.rounds != "none" and not m.trained_by_pretraining]
        return (self.pretrained is None) + len(rounds) + len(built)

    @classmethod
    def load(cls, folder: str | Path) -> Study:
        """Return the study of a run's folder, from its config.json.

        Raises
        ------
        ValueError
            If the file is missing or does not fit.
        """
        path = Path(folder) / "config.json"
        plain, made_by = read_config(path)
        try:
            return from_plain(cls, plain)
        except ValueError as problem:
            there = made_by.get("fedl2p", __version__)
            which = f"a study of fedl2p {__version__}, but of {there}"
            which = "a study" if there == __version__ else which
            raise ValueError(f"{path} does not describe {which}: {problem}") from None
