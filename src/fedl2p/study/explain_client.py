"""Why a client of a finished run got its hyperparameters, from the files of the run's folder."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import nn

from fedl2p import methods
from fedl2p.core.metanets import MetaNets
from fedl2p.core.profiles import Profile, Profiler
from fedl2p.core.sites import Sites
from fedl2p.data.npz import read_npz_client
from fedl2p.data.population import Population
from fedl2p.explain.attribution import TOLERANCE, attribute, median_profile
from fedl2p.explain.explanation import Explanation, entries_of, mean_of, moved_of
from fedl2p.explain.page import render_explanation
from fedl2p.explain.sentences import text
from fedl2p.runs.files import damaged, read_json, write_atomically
from fedl2p.study.engines import find_device
from fedl2p.study.new_client import load_run
from fedl2p.study.settings import Study

METHOD = methods.METANETS
FOLDER = "explain"
BATCH = 256
READS = {
    "published": "the profile as it is",
    "default": "log(0.001 + divergence) and the moments",
}
"""In what the path is straight, by the form of the meta-nets."""


@dataclass(frozen=True)
class Explained:
    """An explanation and the files that were written."""

    explanation: Explanation
    page: Path
    numbers: Path

    def __str__(self) -> str:
        """Return everything for a terminal."""
        return f"{text(self.explanation)}\n\nnumbers: {self.numbers}\npicture: {self.page}"


def explain_client(
    run: str | Path,
    *,
    client: str | None = None,
    data: str | Path | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    model: str | None = None,
    tolerance: float = TOLERANCE,
) -> Explained:
    """Explain the hyperparameters of one client, and write a page and the numbers.

    The client is compared with a typical one, whose profile is the median, entry by entry, of the
    seen clients' profiles. Divergence 0, a client exactly like the global model, would be the other
    choice; but a few dozen examples of the global distribution itself diverge from it, so the nets
    have never been asked about such a client, and its moments are not known.

    This reads the profiles of all seen clients, so it is for whoever holds the run's folder or its
    data. In a federation of many machines profiles stay with their clients.

    Parameters
    ----------
    run
        Folder of a finished run of the method fedl2p.
    client
        Name of one of its clients, or:
    data
        A new client's .npz file (see :mod:`fedl2p.data.npz`); all of ``x_train`` is profiled.
    out
        Folder to write into; made if there is none. By default the folder explain of the run, for
        a new client explain/new. An explanation of the same client is replaced.
    device
        Where profiles are computed that the run did not record: auto, cpu or cuda.
    model
        The run's model, if it is none of :mod:`fedl2p.models.registry`: see
        :func:`fedl2p.study.new_client.load_run`.
    tolerance
        How far the parts may fail to add up, as a fraction of all movement of a hyperparameter.

    Returns
    -------
    Explained
        Its ``page`` and ``numbers`` are ``NAME.html`` and ``NAME.json``.

    Raises
    ------
    ValueError
        If not exactly one of ``client`` and ``data`` is given, the run has no such client, or its
        meta-nets read no profiles, or a file is missing, damaged or does not fit; nothing is
        written then.
    """
    run = Path(run)
    if (client is None) == (data is None):
        raise ValueError(
            "give one of --client NAME, a client of the run, and --data FILE.npz, a new client"
        )
    where = find_device(device)
    _check_learned(run, Study.load(run))
    study, net, metanets = load_run(run, model=model)
    if metanets.config.constant:
        raise ValueError(
            f"the meta-nets of {run} are constant: every client gets the same hyperparameters, no "
            "profile moves them; explain a run whose nets read profiles"
        )
    world = _World(run, study, net.to(where), metanets.sites)
    if client is not None:
        world.check_client(client)
    # The new client's file is read before the profiles of many others are looked at.
    profile = world.profile(client) if client is not None else world.new_profile(Path(str(data)))
    name = client if client is not None else Path(str(data)).stem
    explanation = _explain(world, metanets, profile, name, client is None, tolerance)
    # A new client may be called like one of the run.
    usual = run / FOLDER if client is not None else run / FOLDER / "new"
    return _write(explanation, usual if out is None else Path(out))


class _World:
    """The clients of a run: who they are, and their profiles."""

    def __init__(self, run: Path, study: Study, model: nn.Module, sites: Sites) -> None:
        self.run, self.study, self.model, self.sites = run, study, model, sites
        path = run / "population.json"
        content = read_json(path)
        try:
            self.shape = tuple(int(n) for n in content["shape"])
            self.classes = int(content["classes"])
            self.pools = {n: str(c["pool"]) for n, c in content["clients"].items()}
            self.about: dict[str, Mapping[str, Any]] = {
                n: dict(c.get("about", {})) for n, c in content["clients"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise damaged(path, f"it lacks or misstates a field ({problem!r})") from None

    @property
    def seen(self) -> list[str]:
        """Names of the clients that took part in learning."""
        return [name for name, pool in self.pools.items() if pool == "seen"]

    def check_client(self, name: str) -> None:
        """Refuse the name of no client, and suggest similar ones."""
        if name in self.pools:
            return
        close = difflib.get_close_matches(name, self.pools, n=3)
        some = close or list(self.pools)[:3]
        more = f" and {len(self.pools) - len(some)} more" if len(self.pools) > len(some) else ""
        raise ValueError(
            f"{self.run} has no client {name!r}; there are {', '.join(some)}{more}; for a new "
            "client give its file by --data"
        )

    def profile(self, name: str) -> Profile:
        """Return what the client recorded when it was personalized, or profile its data again.

        The run's folder has no record where clients live on machines of their own.
        """
        path = self.run / "clients" / METHOD / f"{quote(name, safe=' ')}.json"
        if path.exists():
            return _recorded(path, self.sites)
        try:
            data = self.population.open(name)
        except KeyError:
            raise ValueError(
                f"the run's data have no client {name!r} any more, and {path} does not exist; "
                "restore the data that the run was made with"
            ) from None
        return self.profiler(data.train.x.split(BATCH))

    def new_profile(self, file: Path) -> Profile:
        """Profile a new client's own file."""
        data = read_npz_client(file, shape=self.shape, classes=self.classes, split=False)
        return self.profiler(data.train.x.split(BATCH))

    @cached_property
    def population(self) -> Population:
        """The run's clients with their data."""
        return self.study.data.open(self.study.seed)

    @cached_property
    def profiler(self) -> Profiler:
        """One copy of the global model for all clients."""
        return Profiler(self.model)


def _check_learned(run: Path, study: Study) -> None:
    if METHOD in study.methods:
        return
    if f"{METHOD}-constant" in study.methods:
        raise ValueError(
            f"{run} learned one strategy for all clients ({METHOD}-constant), which no profile "
            f"moves; explain a run of the method {METHOD}"
        )
    raise ValueError(
        f"{run} learned no meta-nets: its methods are {', '.join(study.methods)}; explain a run of "
        f"the method {METHOD}"
    )


def _recorded(path: Path, sites: Sites) -> Profile:
    content = read_json(path)
    try:
        nats = [float(content["divergence"][name]) for name in sites.norms]
        pairs = [[float(x) for x in content["moments"][name]] for name in sites.layers]
        divergence = torch.tensor(nats, dtype=torch.float64)
        moments = torch.tensor(pairs, dtype=torch.float64).reshape(len(sites.layers), 2)
    except (KeyError, TypeError, ValueError, RuntimeError) as problem:
        raise damaged(
            path, f"it lacks the profile, or a part of it, of the run's model ({problem!r})"
        ) from None
    # How many examples the profile was made of was not recorded, and nothing here depends on it.
    return Profile(divergence, moments, 0, sites)


def _explain(
    world: _World, metanets: MetaNets, profile: Profile, name: str, new: bool, tolerance: float
) -> Explanation:
    seen = world.seen
    if not seen:
        raise damaged(world.run / "population.json", "it names no seen client to compare with")
    typical = median_profile([world.profile(one) for one in seen])
    found = attribute(metanets, profile, typical, tolerance=tolerance)
    mixes, rates = moved_of(found)
    mean_rate = mean_of(rates)
    assert mean_rate is not None, "a model without parameters has no sites"
    return Explanation(
        client=name,
        pool="new" if new else "seen" if world.pools[name] == "seen" else "unseen",
        about={} if new else world.about[name],
        recipe=world.study.recipe,
        seed=world.study.seed,
        compared=len(seen),
        reads=READS[metanets.config.form],
        entries=entries_of(profile, typical),
        mixes=mixes,
        rates=rates,
        mean_mix=mean_of(mixes),
        mean_rate=mean_rate,
        points=found.points,
        gap=found.gap,
        tolerance=tolerance,
    )


def _write(explanation: Explanation, out: Path) -> Explained:
    # A client may be called anything; its files stay inside the folder.
    stem = quote(explanation.client, safe=" ")
    done = Explained(explanation, out / f"{stem}.html", out / f"{stem}.json")
    # Both are made before either is written.
    page = render_explanation(explanation)
    numbers = json.dumps(explanation.as_json(), indent=1, ensure_ascii=False) + "\n"
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(done.numbers, numbers)
        write_atomically(done.page, page)
    except OSError as problem:
        raise ValueError(
            f"cannot write into {out} ({problem.strerror}); give another folder by --out"
        ) from None
    return done
