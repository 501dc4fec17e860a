"""The meta-nets: from a client's profile to its fine-tuning hyperparameters.

BNNet writes a mix per norm layer, LRNet a rate per parameter tensor (Lee et al., "FedL2P", NeurIPS
2023, section 3.2, equations 2 and 3). :class:`~fedl2p.core.settings.MetaNetsConfig` chooses between
two forms:

published
    The paper's. BNNet reads the divergences, LRNet the moments, as they are.
    ``mix = clamp(BNNet, 0, 1)`` and ``rate = base clamp(LRNet, 0, 1000)`` with a learnable base
    rate per tensor, straight-through (gradient 1 everywhere). Weights start Xavier-normal with gain
    0.1, biases at 0.5 (BNNet) and 1 (LRNet), under which the output hardly depends on the client. A
    base rate may turn negative; the rate is then cut at 0.
default
    Ours. Both nets read all groups of the profile that are chosen, as one vector: a shift that
    leaves the moments of whole tensors as they are, such as a rotated image, shows in the
    divergences only, wrong labels in loss and gradients only. Entries enter as
    :mod:`fedl2p.core.profile_groups` has it, what varies over orders of magnitude as its logarithm.
    A learnable shift and scale per entry follows. (What a server can compute from an update:
    ``docs/security.md``.) ``mix = clamp(base_mix + BNNet, 0, 1)`` and
    ``rate = exp(clamp(log base + LRNet, log min_rate, log max_rate))``; the gradient of a clamp is
    0 where a descent step would lead further outside, so that no entry winds up behind its bound.
    Hidden layers start Kaiming-normal, the last ones scaled by 0.1.

``docs/choices.md`` has the measurements behind each departure. Shapes: C clients, B norms,
L layers, P parameter tensors, E profile entries that are read.
"""

from __future__ import annotations

import json
import math
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedl2p.atomic_files import check_regular, read_text, write_tensors, write_text
from fedl2p.core.card import Card
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.profile_groups import GROUPS
from fedl2p.core.profiles import Profile
from fedl2p.core.settings import MetaNetsConfig
from fedl2p.core.sites import Sites
from fedl2p.text_table import Words, html_table, short_repr

WEIGHTS, DESCRIPTION, README = "metanets.safetensors", "metanets.json", "README.md"
"""The files of saved meta-nets: weights; sites, configuration and card; the card for people."""

LAST_LAYER_SCALE = 0.1
"""Factor on the last layers' initial weights (default form)."""

SHARED_LR_SCALE = 3.0
"""Learning-rate multiplier, under Adam, of the parameters that all clients share: log base rates
and mix offsets (default form). They are stored divided by it."""

LARGEST_FACTOR = 1000.0
"""Largest factor that LRNet puts on a base rate (published form)."""

_SWAPPING = threading.Lock()
"""Held while functional_call has other tensors in a module: stacks of clients run in threads."""


def clamp_straight_through(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp with gradient 1 everywhere."""
    return x.clamp(low, high).detach() + (x - x.detach())


class _ClampInward(torch.autograd.Function):
    """Clamp whose gradient is 0 where descent would lead further outside, else 1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, low: float, high: float) -> Tensor:
        return x.clamp(low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, float], output: Tensor) -> None:
        x, ctx.low, ctx.high = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        outward = ((x >= ctx.high) & (grad < 0)) | ((x <= ctx.low) & (grad > 0))
        return torch.where(outward, torch.zeros_like(grad), grad), None, None


def clamp_inward(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp with gradient 1, but 0 where a descent step would lead further outside."""
    result: Tensor = _ClampInward.apply(x, low, high)  # type: ignore[no-untyped-call]
    return result


class _Mlp(nn.Module):
    """inputs -> hidden -> hidden -> outputs with ReLU, as published."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        # torch's own initialisation, replaced later, draws from the caller's global generator
        with torch.random.fork_rng(devices=[]):
            self.hidden1 = nn.Linear(inputs, hidden)
            self.hidden2 = nn.Linear(hidden, hidden)
            self.out = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.hidden1(x))
        return self.out(torch.relu(self.hidden2(x)))  # type: ignore[no-any-return]


class _InputScale(nn.Module):
    """A learnable shift and scale per profile entry."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(entries))
        self.scale = nn.Parameter(torch.ones(entries))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) * self.scale


class MetaNets(nn.Module):
    """BNNet, LRNet and the parameters that all clients share: base rates, mix offsets.

    Parameters
    ----------
    sites
        Of the model whose fine-tuning they steer. Without norm layers only rates are learned.
    config
        Their form; None for the defaults.
    seed
        Of the initial weights.

    Attributes
    ----------
    card
        What is known of how they were learned: :class:`~fedl2p.core.card.Card`.
    """

    card: Card

    def __init__(
        self, sites: Sites, *, config: MetaNetsConfig | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.sites = sites
        self.config = config or MetaNetsConfig()
        self.card = Card()
        self._published = self.config.form == "published"
        self._shared_scale = 1.0 if self._published else SHARED_LR_SCALE
        norms, layers, params = len(sites.norms), len(sites.layers), len(sites.params)
        if not self.config.constant:
            entries, hidden = len(self.entry_names), self.config.hidden
            if norms:
                self.bnnet = _Mlp(norms if self._published else entries, hidden, norms)
            self.lrnet = _Mlp(2 * layers if self._published else entries, hidden, params)
            if not self._published:
                self.input_scale = _InputScale(entries)
            self._initialise(torch.Generator().manual_seed(seed))
        base = self.config.base_rate if self._published else math.log(self.config.base_rate)
        self.base = nn.Parameter(torch.full((params,), base / self._shared_scale))
        if self.config.constant or not self._published:
            offset = self.config.initial_mix / self._shared_scale
            self.base_mix = nn.Parameter(torch.full((norms,), offset))

    def _initialise(self, generator: torch.Generator) -> None:
        for name, net in self.named_children():
            if not isinstance(net, _Mlp):
                continue
            for layer in (net.hidden1, net.hidden2, net.out):
                if self._published:
                    nn.init.xavier_normal_(layer.weight, gain=0.1, generator=generator)
                    nn.init.constant_(layer.bias, 1.0 if name == "lrnet" else 0.5)
                else:
                    nn.init.kaiming_normal_(layer.weight, generator=generator)
                    nn.init.zeros_(layer.bias)
            if not self._published:
                with torch.no_grad():
                    net.out.weight.mul_(LAST_LAYER_SCALE)

    def forward(self, profile: Profile) -> Hyperparams:
        """Return hyperparameters for a profile, or for C clients' with a leading dimension C."""
        mix, rate = self._raw(self.prepared(profile))
        shared = self._shared_scale * self.base
        if self._published:
            mix = clamp_straight_through(mix, 0.0, 1.0)
            rate = shared * clamp_straight_through(rate, 0.0, LARGEST_FACTOR)
            rate = clamp_straight_through(rate, 0.0, math.inf)
        else:
            mix = clamp_inward(mix, 0.0, 1.0)
            low, high = math.log(self.config.min_rate), math.log(self.config.max_rate)
            rate = clamp_inward(shared + rate, low, high).exp()
        return Hyperparams(mix, rate, self.sites, check=False)

    def __rich_repr__(self) -> Iterator[tuple[str, object]]:
        card = self.card
        yield "form", self.config.form
        yield "reads", Words(f"[{len(self.entry_names)} entries of a profile]")
        yield "writes", Words(f"[{len(self.sites.norms)} mixes, {len(self.sites.params)} rates]")
        if card.model:
            yield "model", card.model
        if card.clients is not None:
            yield "clients", card.clients

    def __repr__(self) -> str:
        return short_repr(self)

    def _repr_html_(self) -> str:
        rows = [(str(name), str(part)) for name, part in self.__rich_repr__()]
        return html_table([("meta-nets", ""), *rows])

    @property
    def entry_names(self) -> list[str]:
        """The names of the profile's entries that the nets read, E in all, in their order."""
        return [name for g in self.config.groups for name in GROUPS[g].names(self.sites)]

    def prepared(self, profile: Profile) -> Tensor:
        """Return what the nets read, shape (..., E), in the order of :attr:`entry_names`.

        Every entry is changed by itself, so each still stands for one entry of the profile.

        Raises
        ------
        ValueError
            If the profile belongs to another model, or lacks a group.
        """
        if profile.sites != self.sites:
            raise ValueError(
                "the profile belongs to another model than the meta-nets: names of layers or "
                "parameters differ; profile with the model that the meta-nets were learned for"
            )
        if self.config.constant:
            return profile.divergence.to(self.base)[..., :0]
        groups = {g: profile.entries(g).to(self.base) for g in self.config.groups}
        if self._published:
            return torch.cat(list(groups.values()), -1)
        read = torch.cat([GROUPS[g].as_read(x) for g, x in groups.items()], -1)
        scaled: Tensor = self.input_scale(read)
        return scaled

    def unbounded(self, prepared: Tensor) -> tuple[Tensor, Tensor]:
        """Return mix (..., B) and rate (..., P) before their bounds, for :meth:`prepared` inputs.

        In the default form the rate is its logarithm. Differentiable without the special gradients
        that the bounds have in learning.
        """
        mix, rate = self._raw(prepared)
        shared = self._shared_scale * self.base
        return mix, shared * rate if self._published else shared + rate

    def _raw(self, prepared: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mix before its bounds and what LRNet writes, for prepared inputs."""
        norms = len(self.sites.norms)
        if self.config.constant:
            front = prepared.shape[:-1]
            mix = self.base_mix.new_zeros(*front, norms)
            neutral = torch.ones_like if self._published else torch.zeros_like
            rate = neutral(self.base).expand(*front, -1)
        elif self._published:
            mix = self.bnnet(prepared[..., :norms]) if norms else prepared[..., :0]
            rate = self.lrnet(prepared[..., norms:])
        else:
            mix = self.bnnet(prepared) if norms else prepared[..., :0]
            rate = self.lrnet(prepared)
        if hasattr(self, "base_mix"):
            mix = self._shared_scale * self.base_mix + mix
        return mix, rate

    def per_client(self, weights: Mapping[str, Tensor], profile: Profile) -> Hyperparams:
        """Return hyperparameters of C clients, each by its own weights, of shape (C, ...)."""

        def one(weights: dict[str, Tensor], tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            one_profile = Profile(**tensors, num_examples=profile.num_examples, sites=profile.sites)
            written: Hyperparams = functional_call(self, weights, (one_profile,))
            return written.mix, written.rate

        with _SWAPPING:
            mix, rate = vmap(one)(dict(weights), profile.tensors())
        return Hyperparams(mix, rate, self.sites, check=False)

    def save(self, folder: str | Path) -> None:
        """Write weights, description and card into a folder, which is made if there is none.

        These are ``metanets.safetensors``, ``metanets.json`` (sites, configuration, card) and the
        card for people, ``README.md``: what the Hugging Face hub takes. Each file is replaced as a
        whole: a reader never finds a part of one. A README.md that is no card of meta-nets is left
        as it is.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        description = {name: asdict(getattr(self, name)) for name in ("config", "sites", "card")}
        write_tensors(folder / WEIGHTS, self.state_dict())
        write_text(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")
        if _may_write_readme(folder / README):
            form = f"{self.config.form}, reads {', '.join(self.config.groups) or 'nothing'}"
            write_text(folder / README, self.card.readme(self.sites, form))

    @classmethod
    def load(cls, folder: str | Path) -> MetaNets:
        """Read what :meth:`save` wrote, e.g. into the folder of a run.

        Raises
        ------
        ValueError
            If a file is missing, damaged, or does not fit the other.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        weights, about = Path(folder) / WEIGHTS, Path(folder) / DESCRIPTION
        try:
            description = json.loads(read_text(about))
            names = {k: _names(v) for k, v in description["sites"].items()}
            config = MetaNetsConfig(**description["config"])
            card = Card(**description["card"])
            check_regular(weights.stat())
            # On the meta device: a description may claim any size, and nothing is allocated before
            # the weights, which are as large as their file, agree with it in every name and shape.
            with torch.device("meta"):
                nets = cls(Sites(**names), config=config)
            _refuse_other_sizes(weights, nets)
            tensors = load_file(weights)
            nets.to(tensors["base"].dtype).load_state_dict(tensors, assign=True)
            for parameter in nets.parameters():
                parameter.requires_grad_()
            if not all(bool(t.isfinite().all()) for t in tensors.values()):
                raise ValueError("a weight is NaN or infinite")
        except (
            *(OSError, LookupError, TypeError, AttributeError, RuntimeError, ValueError),
            ArithmeticError,
        ) as error:
            raise _unreadable(folder, error) from error
        except SafetensorError as error:
            raise _unreadable(folder, error) from error
        nets.card = card
        return nets

    def push_to_hub(self, repository: str, *, private: bool | None = None) -> str:
        """Save into a repository of the Hugging Face hub, made if there is none; return its URL.

        Parameters
        ----------
        repository
            ``user/name``; who writes is whom ``hf auth login`` or HF_TOKEN names.
        private
            Whether a new repository is private; None for the account's default. The card holds the
            smallest and largest entries of clients' profiles: see :class:`~fedl2p.core.card.Card`.

        Raises
        ------
        ModuleNotFoundError
            If huggingface_hub is not installed; the message names the extra that brings it.
        """
        hub = _hub()
        with tempfile.TemporaryDirectory(prefix="fedl2p-") as folder:
            self.save(folder)
            api = hub.HfApi()
            url = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message="Meta-nets of fedl2p"
            )
        return str(url)

    @classmethod
    def from_hub(cls, repository: str, *, revision: str | None = None) -> MetaNets:
        """Read meta-nets from a repository of the Hugging Face hub.

        Parameters
        ----------
        repository
            ``user/name``.
        revision
            A commit, branch or tag; None for the newest commit.

        Raises
        ------
        ValueError
            If a file is missing or damaged.
        ModuleNotFoundError
            If huggingface_hub is not installed; the message names the extra that brings it.
        """
        folder = _hub().snapshot_download(
            repository, revision=revision, allow_patterns=[WEIGHTS, DESCRIPTION]
        )
        return cls.load(folder)


def _hub() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "huggingface_hub is not installed; run pip install 'fedl2p[hub]'", name=error.name
        ) from None
    return huggingface_hub


def _may_write_readme(path: Path) -> bool:
    """Tell whether there is no README.md, or one that is a card."""
    try:
        return "library_name: fedl2p" in read_text(path)
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False


def _refuse_other_sizes(weights: Path, nets: MetaNets) -> None:
    """Raise ValueError if a file's tensors have other names or shapes than the nets."""
    from safetensors import safe_open

    wanted = {name: list(t.shape) for name, t in nets.state_dict().items()}
    with safe_open(weights, framework="pt") as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    if different := sorted(k for k in found.keys() | wanted if found.get(k) != wanted.get(k)):
        name = different[0]
        there, here = found.get(name, "missing"), wanted.get(name, "not wanted")
        raise ValueError(f"{name} is {there} in the weights and {here} by the description")


def _names(value: object) -> tuple[str, ...]:
    if not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise TypeError("a list of names is something else")
    return tuple(value)


def _unreadable(folder: str | Path, error: Exception) -> ValueError:
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(
        f"meta-nets at {folder} cannot be read ({line}); give the folder that save() wrote"
    )
