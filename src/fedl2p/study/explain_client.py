"""Why a client of a finished run got its hyperparameters, from the files of the run's folder."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from fedl2p import methods
from fedl2p.atomic_files import refuse_special_files
from fedl2p.core.metanets import MetaNets
from fedl2p.core.profiles import READS_TARGETS, Profile, Profiler
from fedl2p.data.files.npz_client import read_npz_client
from fedl2p.data.population import Population
from fedl2p.explain.attribution import attribute, median_profile
from fedl2p.explain.explanation import Explanation
from fedl2p.explain.page import render_explanation
from fedl2p.explain.sentences import text
from fedl2p.runs import layout
from fedl2p.runs.client_files import ClientHyperparams
from fedl2p.runs.files import damaged, write_atomically
from fedl2p.runs.population import PopulationInfo
from fedl2p.study.engines import find_device, objective_of_study
from fedl2p.study.new_client import load_run
from fedl2p.study.settings import Study

METHOD = methods.METANETS
BATCH = 256


@dataclass(frozen=True)
class ClientExplanation:
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
) -> ClientExplanation:
    """Explain the hyperparameters of one client, and write a page and the numbers.

    The baseline of the attribution is the median, entry by entry, of the seen clients' profiles.
    (Divergence 0 is none: a few dozen examples of the global distribution itself diverge from it.)
    So this needs the profiles of all seen clients: the run's folder, or its data. In a federation
    of many machines profiles stay with their clients.

    Parameters
    ----------
    run
        Folder of a finished run of the method fedl2p.
    client
        Name of one of its clients, or:
    data
        A new client's file (:mod:`fedl2p.data.files.npz_client`); all of ``x_train`` is profiled.
    out
        Folder to write into; made if there is none. By default the folder explain of the run, for
        a new client explain/new. An explanation of the same client is replaced.
    device
        Where profiles are computed that the run did not record: auto, cpu or cuda.
    model
        The run's model, if it is none of :mod:`fedl2p.models.registry`: see
        :func:`fedl2p.study.new_client.load_run`.

    Returns
    -------
    ClientExplanation
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
    if METHOD not in (names := Study.load(run).methods):
        raise ValueError(
            f"{run} learned no meta-nets that read profiles: its methods are {', '.join(names)}; "
            f"explain a run of the method {METHOD}"
        )
    study, net, metanets = load_run(run, model=model)
    world = _World(run, study, net.to(where), metanets)
    if client is not None:
        world.check_client(client)
    # The new client's file is read before the profiles of many others are looked at.
    profile = world.profile(client) if client is not None else world.new_profile(Path(str(data)))
    name = client if client is not None else Path(str(data)).stem
    explanation = _explain(world, metanets, profile, name, client is None)
    # A new client may be called like one of the run.
    if out is None:
        refuse_special_files(run / layout.EXPLAIN)
        out = run / layout.EXPLAIN if client is not None else run / layout.EXPLAIN / "new"
    return _write(explanation, Path(out))


class _World:
    """The clients of a run: who they are, and their profiles."""

    def __init__(self, run: Path, study: Study, model: nn.Module, metanets: MetaNets) -> None:
        self.run, self.study, self.model = run, study, model
        self.sites, self.groups = metanets.sites, metanets.config.groups
        info = PopulationInfo.read(run)
        self.shape, self.classes = info.shape, info.classes
        self.pools = {name: known.pool for name, known in info.clients.items()}
        self.about = {name: known.about for name, known in info.clients.items()}

    @property
    def seen(self) -> list[str]:
        """Names of the clients that took part in learning."""
        return [name for name, pool in self.pools.items() if pool == "seen"]

    def check_client(self, name: str) -> None:
        """Refuse the name of no client, and suggest similar ones."""
        if name in self.pools:
            return
        some = difflib.get_close_matches(name, self.pools, n=3) or list(self.pools)[:3]
        raise ValueError(
            f"{self.run} has no client {name!r}; among its {len(self.pools)} clients are "
            f"{', '.join(some)}; for a new client give its file by --data"
        )

    def profile(self, name: str) -> Profile:
        """Return what the client recorded when it was personalized, or profile its data again.

        The run's folder has no record where clients live on machines of their own.
        """
        path = layout.client_file(self.run, METHOD, name)
        if path.exists():
            return ClientHyperparams.read(path).profile(self.sites, path, self.groups)
        try:
            data = self.population.open(name)
        except KeyError:
            raise ValueError(
                f"the run's data have no client {name!r} any more, and {path} does not exist; "
                "restore the data that the run was made with"
            ) from None
        return self.profiler(data.train.batches(BATCH), self.groups)

    def new_profile(self, file: Path) -> Profile:
        """Profile a new client's own file."""
        data = read_npz_client(file, shape=self.shape, classes=self.classes, split=False)
        return self.profiler(data.train.batches(BATCH), self.groups)

    @cached_property
    def population(self) -> Population:
        """The run's clients with their data."""
        return self.study.data.open(self.study.seed)

    @cached_property
    def profiler(self) -> Profiler:
        """One copy of the global model for all clients."""
        if READS_TARGETS.isdisjoint(self.groups):
            return Profiler(self.model)  # what the loss is does not matter
        return Profiler(self.model, objective_of_study(self.study))


def _explain(
    world: _World, metanets: MetaNets, profile: Profile, name: str, new: bool
) -> Explanation:
    seen = world.seen
    if not seen:
        raise damaged(world.run / layout.POPULATION, "it names no seen client to compare with")
    typical = median_profile([world.profile(one) for one in seen])
    return Explanation(
        client=name,
        pool="new" if new else "seen" if world.pools[name] == "seen" else "unseen",
        about={} if new else world.about[name],
        recipe=world.study.recipe,
        seed=world.study.seed,
        num_typical=len(seen),
        attribution=attribute(metanets, profile, typical),
    )


def _write(explanation: Explanation, out: Path) -> ClientExplanation:
    # A client may be called anything; its files stay inside the folder.
    stem = layout.as_file_name(explanation.client)
    done = ClientExplanation(explanation, out / f"{stem}.html", out / f"{stem}.json")
    # Both are made before either is written.
    page = render_explanation(explanation)
    numbers = json.dumps(explanation.to_dict(), indent=1, ensure_ascii=False) + "\n"
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(done.numbers, numbers)
        write_atomically(done.page, page)
    except OSError as problem:
        raise ValueError(
            f"cannot write into {out} ({problem.strerror}); give another folder by --out"
        ) from None
    return done
