"""The settings of a study: all that its results depend on.

Without torch, so that the command line can describe them before it is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, runtime_checkable

from fedl2p import user_code
from fedl2p.core.settings import WITH_ACCURACY, Compute, check_ignore_index, check_loss
from fedl2p.federation.settings import Ray, Rounds
from fedl2p.methods.base.settings import Settings
from fedl2p.runs import layout
from fedl2p.runs.config import AnyKind, read_config
from fedl2p.runs.validation import from_plain
from fedl2p.version import __version__

if TYPE_CHECKING:
    from fedl2p.data.population import Population

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
"""The methods that a study compares by default, in this order; ``all`` stands for them."""


@runtime_checkable
class Source(Protocol):
    """A data set of clients: settings, a frozen dataclass, that open a population.

    One that has the attribute ``licence``, text, has it written on the card of the meta-nets.
    """

    def open(self, seed: int) -> Population:
        """Return the population under a seed; the same one at every call."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Settings of one run: equal studies give equal results.

    Names of methods, and what a model needs of them, are checked where a run is prepared.

    Parameters
    ----------
    data
        Where the clients come from.
    recipe
        Name of the recipe, for reports.
    model
        The model to personalize, as package.module:callable; the callable takes the shape of one
        example and the number of classes and returns a torch.nn.Module.
    loss
        What every client's model is trained and evaluated on: cross-entropy, bce (several labels
        per example, targets in [0, 1]), mse, or package.module:callable of outputs and targets that
        returns one number per example.
    ignore_index
        Label that does not count, for cross-entropy; None for none.
    metric
        In place of the accuracy: package.module:callable of outputs and targets that returns one
        number in [0, 1] per example, higher is better. None: the accuracy where the loss has one.
    outputs
        Picks the outputs of what the model returns: package.module:callable. None: the tensor, its
        .logits or "logits", or the first of a tuple.
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
        package.module:callable; all for the usual ones.
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

    data: Annotated[Source, AnyKind()]
    recipe: str = "custom"
    model: str = "fedl2p.models:small_conv"
    loss: str = "cross-entropy"
    ignore_index: int | None = None
    metric: str | None = None
    outputs: str | None = None
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
            raise ValueError("there is no method to run; name at least one, e.g. fedl2p")
        if "all" in self.methods:
            named = [m for name in self.methods for m in (METHODS if name == "all" else (name,))]
            object.__setattr__(self, "methods", tuple(named))
        for name in ("loss", "metric", "outputs"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(
                    f"{name} of a study is {value!r}, but must be text, package.module:callable"
                )
        for name in ("metric", "outputs"):
            if getattr(self, name) is not None and ":" not in getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but must be package.module:callable"
                )
        if ":" not in self.loss:
            check_loss(self.loss)
        check_ignore_index(self.ignore_index, self.loss)
        if self.settings.grid.criterion == "accuracy" and not self.has_accuracy:
            raise ValueError(
                f"settings.grid.criterion is accuracy, which the loss {self.loss!r} does not have; "
                "take the criterion loss, or give a metric"
            )

    @property
    def has_accuracy(self) -> bool:
        """Whether results hold an accuracy, or a metric in its place."""
        return self.metric is not None or self.loss in WITH_ACCURACY

    @property
    def objective_code(self) -> tuple[str, ...]:
        """Names of code outside this package that the objective is made of."""
        names = (self.loss, self.metric, self.outputs)
        return tuple(name for name in names if name and user_code.is_user_code(name))

    @classmethod
    def load(cls, folder: str | Path) -> Study:
        """Return the study of a run's folder, from its config.json.

        Raises
        ------
        ValueError
            If the file is missing or does not fit.
        """
        path = Path(folder) / layout.CONFIG
        plain, made_by = read_config(path)
        try:
            study = from_plain(cls, plain)
            for name in filter(user_code.is_user_code, study.methods):  # no file has code imported
                wanted = "the function that the run was made with"
                user_code.find_callable(name, what="method", wanted=wanted, takes=(study.settings,))
        except ValueError as problem:
            version = made_by.get("fedl2p", __version__)
            other = "" if version == __version__ else f" of fedl2p {__version__}, but of {version}"
            raise ValueError(f"{path} does not describe a study{other}: {problem}") from None
        return study
