"""Which strategy wins, which defaults earn their place, and does the profile matter?

Studies on the digits_sensors recipe. Each is a grid of rows x seeds; every seed pre-trains one
global model that all its rows share, and all rows meet the same clients, cohorts and batches.

choices        the recipe with one setting changed per row (seeds 0 to 9, on which we choose)
final          FedL2P against everything else (seeds 100 to 109, opened for this table only)
baselines      FedL2P against every method of the package (seeds 100 to 104)
profile        what happens when clients get others' profiles, or parts of a typical one
heterogeneity  the main methods under other label skew, sensors and client sizes
cost           what personalizing one client costs

    python benchmarks/strategies.py choices --seeds 0-9
    python benchmarks/strategies.py final --seeds 100-109
    python benchmarks/strategies.py baselines --seeds 100-104
    python benchmarks/strategies.py cost

Results are appended to strategies-STUDY.jsonl as they come, one line per row and seed with every
client's accuracy and loss; a second call computes what is missing or whose settings have changed.
Tables are written beside it. A difference is taken client by client, averaged over the clients of
a seed, and its 95 % interval is Student's over seeds; the one in brackets is over all pairs of one
client under one seed, which takes the seeds' pre-trained models as given. Clients whose fine-
tuning diverged count with what their model then predicts; the column "diverged" has their number.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedl2p import methods, models, recipes
from fedl2p.core.profiles import Profile
from fedl2p.core.settings import Compute
from fedl2p.core.working_copies import working_copies
from fedl2p.data.population import Population
from fedl2p.explain.attribution import median_profile
from fedl2p.federation.rounds import federate
from fedl2p.federation.settings import Rounds
from fedl2p.method import Client, Method, Outcome, State, Update
from fedl2p.methods.base.personalizing import kept_profile, model_with_state, profile_of
from fedl2p.methods.fedl2p import FedL2P
from fedl2p.reporting.intervals import mean_interval
from fedl2p.runs.validation import from_plain, to_plain
from fedl2p.seeds import derive_seed, generator
from fedl2p.study.settings import Study

Result = dict[str, Any]
"""One line of the results file."""

ONE_ROUND = Rounds(rounds=1, clients_per_round=0, keep="last")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a study.

    Parameters
    ----------
    name
        As it stands in the table.
    method
        The method to run.
    changes
        Fields of the recipe's study, by dotted path, and their values as JSON.
    base
        The recipe that is changed.
    profiles
        What clients are given as their profile when they personalize themselves: own, shuffled
        (another client's of the same pool), or typical divergences / moments / size (the mean over
        the seen clients in place of this group).
    watched
        Whether the loss of every round's state is measured on all seen clients' validation parts.
    cheats
        Whether clients choose on their test part: no method, but a bound of what a choice can give.
    """

    name: str
    method: str = "fedl2p"
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base: str = "digits_sensors"
    profiles: str = "own"
    watched: bool = False
    cheats: bool = False

    def study(self, seed: int) -> Study:
        """Return the study of this row under a seed."""
        plain = to_plain(dataclasses.replace(recipes.get(self.base), seed=seed))
        for path, value in self.changes.items():
            *groups, field = path.split(".")
            target = plain
            for group in groups:
                target = target[group]
            if field not in target:
                raise KeyError(f"row {self.name!r} changes {path!r}, which the study has not")
            target[field] = value
        return from_plain(Study, plain)


NETS, META, INNER, LEARN = "settings.meta.nets.", "settings.meta.", "settings.finetune.", "learn."

LATE = {INNER + "early_stopping": False}

_CHANGES = (
    Row("the recipe, without early stopping", watched=True),
    Row("constants instead of nets", method="fedl2p-constant"),
    Row("best single mix and rate", method="bestfixed"),
    Row(
        "hypergradient: truncated, 5 steps instead of 10", changes={META + "hypergradient.steps": 5}
    ),
    Row("hypergradient: unrolled (exact)", changes={META + "hypergradient.mode": "unrolled"}),
    Row("hypergradient: last-step", changes={META + "hypergradient.mode": "last-step"}),
    Row("running statistics as published", changes={INNER + "statistics": "published"}),
    Row("largest rate 1 instead of 0.3", changes={NETS + "max_rate": 1.0}),
    Row("server rate 0.015 instead of 0.0075", changes={LEARN + "server_rate": 0.015}),
    Row("server rate 0.004", changes={LEARN + "server_rate": 0.004}),
    Row(
        "constant server rate 0.005, average of states",
        changes={
            LEARN + "server_schedule": "constant",
            LEARN + "server_rate": 0.005,
            LEARN + "keep": "average",
        },
        watched=True,
    ),
    Row("server: FedAdagrad", changes={LEARN + "strategy": "fedadagrad"}),
    Row(
        "server: plain average, clients step by SGD 0.01",
        changes={
            LEARN + "strategy": "fedavg",
            META + "rate": 0.01,
            META + "base_rate": 0.01,
        },
    ),
    Row("clip: entries at 1", changes={META + "clip": "value"}),
    Row("clip: none", changes={META + "clip": "none"}),
    Row(
        "three outer steps",
        changes={META + "outer_steps": 3, META + "rate": 0.01, META + "base_rate": 0.01},
    ),
    Row("10 clients a round", changes={LEARN + "clients_per_round": 10}),
    Row("all 40 clients a round", changes={LEARN + "clients_per_round": 0}),
    Row("keep the best round", changes={LEARN + "keep": "best"}),
    Row("average of states", changes={LEARN + "keep": "average"}),
    Row("early stopping per client", changes={INNER + "early_stopping": True}),
    Row("3 epochs", changes={INNER + "epochs": 3}),
    Row("10 epochs", changes={INNER + "epochs": 10}),
    Row("15 epochs", changes={INNER + "epochs": 15}),
    Row("10 epochs, best single", method="bestfixed", changes={INNER + "epochs": 10}),
)

# Made before early stopping came in, and kept without it: what a change does to the nets shows here
# undamped.
CHOICES = tuple(dataclasses.replace(row, changes={**LATE, **row.changes}) for row in _CHANGES)

FINAL = (
    Row("FedL2P", watched=True),
    Row("FedAvg, no fine-tuning", method="fedavg"),
    Row("fine-tuning, global statistics", method="finetuning-global"),
    Row("fine-tuning, client statistics", method="finetuning-client"),
    Row("best single mix and rate", method="bestfixed"),
    Row("constants instead of nets", method="fedl2p-constant"),
    Row("grid search per client", method="gridsearch"),
    Row("L2P", method="l2p"),
    Row("grid search on test data (a bound, no method)", method="gridsearch", cheats=True),
    Row("FedL2P, published settings", base="digits_sensors_published"),
    Row("FedL2P, no early stopping", changes=LATE, watched=True),
    Row("fine-tuning, global statistics, no early stopping", "finetuning-global", LATE),
    Row("fine-tuning, client statistics, no early stopping", "finetuning-client", LATE),
    Row("best single mix and rate, no early stopping", "bestfixed", LATE),
    Row("constants instead of nets, no early stopping", "fedl2p-constant", LATE),
    Row("grid search per client, no early stopping", "gridsearch", LATE),
    Row("L2P, no early stopping", "l2p", LATE),
)

PROFILE = (
    Row("own profile", watched=True),
    Row("shuffled between clients", profiles="shuffled", watched=True),
    Row("typical divergences", profiles="divergence", watched=True),
    Row("typical moments", profiles="moments", watched=True),
    Row("typical gradients", profiles="gradients", watched=True),
    Row("typical loss", profiles="loss", watched=True),
    Row("typical labels", profiles="labels", watched=True),
    Row("typical size", profiles="size", watched=True),
    Row("typical profile", profiles="all", watched=True),
    Row("constants instead of nets", method="fedl2p-constant"),
)

SETTINGS: dict[str, dict[str, Any]] = {
    "alpha 0.1, sensors": {"data.alpha": 0.1},
    "alpha 1, sensors": {},
    "alpha 1000, sensors": {"data.alpha": 1000.0},
    "alpha 0.1, no sensors": {"data.alpha": 0.1, "data.feature_shift": False},
    "alpha 1, no sensors": {"data.feature_shift": False},
    "alpha 1000, no sensors": {"data.alpha": 1000.0, "data.feature_shift": False},
    "5 to 200 samples": {"data.sizes": [5, 10, 20, 40, 80, 200]},
    "160 seen clients": {"data.seen": 160},
}

WITH_CONSTANTS = ("alpha 1, sensors", "5 to 200 samples", "160 seen clients")

HETEROGENEITY = tuple(
    Row(f"{setting} | {name}", method=method, changes={**changes, **further})
    for setting, changes in SETTINGS.items()
    for name, method, further in (
        ("FedL2P", "fedl2p", {}),
        ("global statistics", "finetuning-global", {}),
        ("client statistics", "finetuning-client", {}),
        ("best single", "bestfixed", {}),
        ("constants", "fedl2p-constant", {}),
        ("FedL2P, no early stopping", "fedl2p", LATE),
        ("best single, no early stopping", "bestfixed", LATE),
    )
    if method != "fedl2p-constant" or setting in WITH_CONSTANTS
)

BASELINES = (
    Row("FedL2P", watched=True),
    Row("grid search per client", "gridsearch"),
    Row("best single mix and rate", "bestfixed"),
    *(
        Row(name, name)
        for name in methods.names()
        if name not in ("fedl2p", "gridsearch", "bestfixed", "fedl2p-constant")
    ),
)

STUDIES: dict[str, tuple[Row, ...]] = {
    "baselines": BASELINES,
    "choices": CHOICES,
    "final": FINAL,
    "profile": PROFILE,
    "heterogeneity": HETEROGENEITY,
}


def fingerprint(row: Row, seed: int) -> str:
    """Return a name of everything that determines a result, so that a changed row runs again.

    What changes a result by rounding alone (engine, cohorts, held graphs) is left out.
    """
    plain = to_plain(dataclasses.replace(row.study(seed), methods=(row.method,)))
    for field in ("engine", "device", "ray"):
        del plain[field]
    del plain["compute"]["stack_size"]
    del plain["settings"]["meta"]["hypergradient"]["segment"]
    if row.study(seed).compute == Compute():  # results from before there was a choice
        del plain["compute"]
    key = [plain, row.profiles, row.watched, *([True] if row.cheats else [])]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def pretrained(study: Study, cache: Path) -> tuple[Population, nn.Module, nn.Module]:
    """Return population, initial and pre-trained model, the latter from the cache if it is there.

    Unseen clients and what is learned later do not enter the cache's key.
    """
    population = study.data.open(study.seed)
    initial = models.build(
        study.model, shape=population.shape, classes=population.classes, seed=study.seed
    )
    plain = to_plain(study)
    plain["data"]["unseen"] = 0
    key = [plain[k] for k in ("data", "model", "seed", "pretrain")] + [plain["settings"]["local"]]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / f"{name}.pt"
    if not path.exists():
        fedavg = methods.build(methods.PRETRAINING, study.settings)
        rounds, seed = study.pretrain, study.seed
        trained_on = population.pretraining() or population
        done = federate(fedavg, initial, trained_on, rounds=rounds, seed=seed, stage="pretrain")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(done.state, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    return population, initial, model_with_state(initial, torch.load(path, weights_only=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watched(FedL2P):
    """FedL2P that remembers the state of every round."""

    states: list[State] = dataclasses.field(default_factory=list, compare=False)

    def train(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        """Remember the received state, then train."""
        self.states.append({k: v.clone() for k, v in state.items()})
        return super().train(model, state, clients)


def learned(
    study: Study, method: Method, model: nn.Module, population: Population, cache: Path
) -> tuple[State, list[float], float]:
    """Return :func:`learn`'s result, from the cache if rows before had the same study."""
    if method.rounds == "none":
        return learn(study, method, model, population)
    plain = to_plain(dataclasses.replace(study, methods=(method.name,)))
    if isinstance(method, FedL2P):  # its learning is not stopped early
        plain["settings"]["finetune"]["early_stopping"] = False
    key = [plain, isinstance(method, Watched)]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / f"learned-{name}.pt"
    if not path.exists():
        state, losses, seconds = learn(study, method, model, population)
        rounds = method.states if isinstance(method, Watched) else []
        torch.save((state, losses, seconds, rounds), path)
    state, losses, seconds, rounds = torch.load(path, weights_only=True)
    if isinstance(method, Watched):
        method.states[:] = rounds
    return state, losses, seconds


def learn(
    study: Study, method: Method, model: nn.Module, population: Population
) -> tuple[State, list[float], float]:
    """Return what the method learned, the rounds' losses, and the seconds it took."""
    seed, began = study.seed, time.perf_counter()
    if method.rounds == "none":
        state = method.start(model, seed=derive_seed(seed, "start", method.name))
        return state, [], time.perf_counter() - began
    rounds = {"one": ONE_ROUND, "pretrain": study.pretrain, "learn": study.learn}[method.rounds]
    done = federate(method, model, population, rounds=rounds, seed=seed, stage=method.stage)
    return done.state, [r.loss for r in done.records], time.perf_counter() - began


def clients_of(population: Population, names: Sequence[str], seed: int) -> list[Client]:
    """Return clients as :func:`fedl2p.federation.personalize_all` makes them."""
    return [Client(n, population.open(n), seed=derive_seed(seed, "personalize", n)) for n in names]


def given_profiles(
    row: Row, study: Study, model: nn.Module, population: Population, clients: Sequence[Client]
) -> list[Client]:
    """Return the clients with the profiles that the row gives them."""
    if row.profiles == "own":
        return list(clients)
    work = working_copies(model)
    groups = study.settings.meta.nets.groups
    own = {c.name: profile_of(work, c, groups) for c in clients}
    seen = [own[n] for n in population.seen]
    typical = median_profile(seen)
    given = {}
    for pool in filter(len, (population.seen, population.unseen)):
        rng = generator("shuffle", len(pool), pool[0])
        order = torch.randperm(len(pool), generator=rng).tolist()
        # a cycle through the shuffled clients: nobody keeps the own profile
        neighbour = {pool[a]: pool[b] for a, b in zip(order, order[1:] + order[:1], strict=True)}
        for name in pool:
            mine = own[name]
            given[name] = {
                "shuffled": own[neighbour[name]],
                "all": typical,
                **{
                    field: dataclasses.replace(mine, **{field: value})
                    for field, value in typical.tensors().items()
                },
            }[row.profiles]
    return [dataclasses.replace(c, kept=kept_profile(given[c.name])) for c in clients]


def watch(
    study: Study, states: Sequence[State], model: nn.Module, population: Population
) -> list[float]:
    """Return the mean validation loss of each state over all seen clients, in the same order of
    batches for every state.
    """
    method = methods.build("fedl2p", study.settings)
    clients = [
        Client(n, population.open(n), seed=derive_seed(study.seed, "watch", n))
        for n in population.seen
    ]
    losses = []
    for state in states:
        judged = method.validate(model, state, clients)
        losses.append(statistics.fmean(u.metrics["loss"] for u in judged))
    return losses


def run(row: Row, seed: int, cache: Path) -> Result:
    """Learn and personalize under one seed; return every client's accuracy and loss."""
    torch.set_num_threads(1)
    study = row.study(seed)
    population, initial, tuned = pretrained(study, cache)
    method = methods.build(row.method, study.settings)
    if row.watched and isinstance(method, FedL2P):
        method = Watched(name=method.name, meta=method.meta, inner=method.inner)
    if method.trained_by_pretraining:
        state: State = {k: v for k, v in tuned.state_dict().items() if v.is_floating_point()}
        losses, seconds = list[float](), 0.0
    else:
        start = initial if method.starts_from == "scratch" else tuned
        state, losses, seconds = learned(study, method, start, population, cache)
    model = initial if method.starts_from == "scratch" else tuned
    clients = clients_of(population, population.names, seed)
    clients = given_profiles(row, study, model, population, clients)
    if row.cheats:
        clients = [
            dataclasses.replace(c, data=dataclasses.replace(c.data, validation=c.data.test))
            for c in clients
        ]
    outcomes = method.personalize(model, state, clients)
    result: Result = {
        "row": row.name,
        "seed": seed,
        "fingerprint": fingerprint(row, seed),
        "learn_seconds": round(seconds, 2),
        "client_seconds": statistics.fmean(o.seconds for o in outcomes),
        "round_losses": losses,
        "diverged": sum(o.failure is not None for o in outcomes),
        "clients": {o.client: _numbers(o, population) for o in outcomes},
    }
    if isinstance(method, Watched) and row.profiles == "own":
        result["watched"] = watch(study, method.states, model, population)
    return result


def _numbers(outcome: Outcome, population: Population) -> list[Any]:
    """Return accuracy, loss, sensor, label entropy, examples, mean mix, mean log rate and mean log
    divergence.
    """
    about, h = population.about(outcome.client), outcome.hyperparams
    loss = outcome.loss if math.isfinite(outcome.loss) else None
    mix = None if h is None or not h.mix.numel() else round(float(h.mix.mean()), 4)
    rates: Tensor | None = None if h is None else h.rate.clamp_min(1e-9).log()
    log_rate = None if rates is None else round(float(rates.mean()), 4)
    sensor, entropy = about.get("sensor"), about.get("label_entropy")
    profile = outcome.profile
    far = None if profile is None else round(float((profile.divergence + 1e-3).log().mean()), 4)
    return [outcome.accuracy, loss, sensor, entropy, outcome.num_train, mix, log_rate, far]


def cost(cache: Path, repeats: int = 5) -> str:
    """Return what a client's personalization costs, in plain fine-tunings, interleaved.

    A plain fine-tuning is that of finetuning-client: the same steps with given hyperparameters.
    """
    torch.set_num_threads(1)
    study = Row("cost").study(0)
    population, _, model = pretrained(study, cache)
    clients = clients_of(population, population.names[:20], 0)
    names = ("finetuning-client", "fedl2p", "gridsearch")
    seconds: dict[str, list[float]] = {name: [] for name in (*names, "choosing")}
    work = working_copies(model)
    for repeat in range(repeats + 1):
        for name in names:
            method = methods.build(name, study.settings)
            outcomes = method.personalize(model, method.start(model, seed=0), clients)
            if repeat:  # the first is a warm-up
                seconds[name].append(statistics.fmean(o.seconds for o in outcomes))
        fedl2p = methods.build("fedl2p", study.settings)
        assert isinstance(fedl2p, FedL2P)
        nets, began = fedl2p.build_metanets(work.net.sites), time.perf_counter()
        with torch.no_grad():
            groups = fedl2p.meta.nets.groups
            nets(Profile.stack([profile_of(work, c, groups) for c in clients]))
        if repeat:
            seconds["choosing"].append((time.perf_counter() - began) / len(clients))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    floor = medians["finetuning-client"]
    words = {
        "finetuning-client": "fine-tuning with given hyperparameters",
        "choosing": "FedL2P's choice alone (profile, one forward pass)",
        "fedl2p": "FedL2P, fine-tuning included",
        "gridsearch": f"grid search over {len(study.settings.grid.points)} points",
    }
    lines = [
        "| per client | seconds | in plain fine-tunings | of grid search |",
        "|---|---|---|---|",
    ]
    for name, what in words.items():
        share = medians[name] / medians["gridsearch"]
        lines.append(
            f"| {what} | {medians[name]:.4f} | {medians[name] / floor:.2f} | {100 * share:.2f} % |"
        )
    return "\n".join(lines)


# --- tables -----------------------------------------------------------------------------------


def _mean(result: Result, pool: str, column: int) -> float:
    values = [v[column] for name, v in result["clients"].items() if name.startswith(pool)]
    return statistics.fmean(v for v in values if v is not None)


def _interval(values: Sequence[float], form: str) -> str:
    interval = mean_interval(list(values))
    return f"{interval.mean:{form}} ± {interval.half or 0.0:{form.strip('+')}}"


def _pairs(
    own: Mapping[int, Result], other: Mapping[int, Result], seeds: Sequence[int], pool: str
) -> list[float]:
    """Return the difference in accuracy of every client of a pool under every seed, points."""
    return [
        100 * (numbers[0] - other[s]["clients"][name][0])
        for s in seeds
        for name, numbers in own[s]["clients"].items()
        if name.startswith(pool)
    ]


def table(rows: Sequence[Row], results: Sequence[Result], reference: Callable[[Row], str]) -> str:
    """Return a study as Markdown; differences are row minus its reference, in points."""
    lines = [
        "| row | seeds | seen | unseen | minus reference, seen | minus reference, unseen "
        "| above in | loss, unseen | diverged | learning, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    by = {row.name: {r["seed"]: r for r in results if r["row"] == row.name} for row in rows}
    for row in rows:
        own = by[row.name]
        if not own:
            continue
        other = by.get(reference(row), {})
        both = sorted(own.keys() & other.keys()) if reference(row) != row.name else []
        gaps = {
            pool: [100 * (_mean(own[s], pool, 0) - _mean(other[s], pool, 0)) for s in both]
            for pool in ("seen", "unseen")
        }
        pairs = {pool: _pairs(own, other, both, pool) for pool in gaps}
        cells = [
            row.name,
            str(len(own)),
            *(
                _interval([100 * _mean(r, pool, 0) for r in own.values()], ".1f")
                for pool in ("seen", "unseen")
            ),
            *(
                f"{_interval(gaps[p], '+.2f')} (± {mean_interval(pairs[p]).half or 0.0:.2f})"
                if both
                else ""
                for p in ("seen", "unseen")
            ),
            f"{sum(g > 0 for g in gaps['unseen'])} of {len(both)}" if both else "",
            _interval([_mean(r, "unseen", 1) for r in own.values()], ".3f"),
            str(sum(r["diverged"] for r in own.values())),
            f"{statistics.fmean(r['learn_seconds'] for r in own.values()):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def stability(results: Sequence[Result]) -> str:
    """Say by how much a round after the tenth lies above the best one before it, worst case."""
    lines = []
    for name in dict.fromkeys(r["row"] for r in results if "watched" in r):
        above = []
        for r in results:
            if r["row"] != name or "watched" not in r:
                continue
            losses = r["watched"]
            above.append(
                max((losses[i] / min(losses[:i]) - 1 for i in range(10, len(losses))), default=0.0)
            )
        worst = ", ".join(f"{100 * a:.1f}" for a in above)
        lines.append(
            f"{name}: rounds after the tenth lie at most {100 * max(above):.1f} % above the best "
            f"round before them in validation loss over all seen clients (by seed: {worst} %)"
        )
    return "\n".join(lines)


def reference_of(study: str) -> Callable[[Row], str]:
    """Return which row each row is compared with."""
    if study == "heterogeneity":
        return lambda row: row.name.split(" | ")[0] + " | best single"
    first = STUDIES[study][0].name
    return lambda row: first


def seeds_of(text: str) -> list[int]:
    """Read "0-9" or "0,3,7"."""
    if "-" in text:
        first, last = map(int, text.split("-"))
        return list(range(first, last + 1))
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Run what is missing of a study and write its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=(*STUDIES, "cost"))
    parser.add_argument("--seeds", type=seeds_of, default=seeds_of("0-9"), help="0-9 or 0,3,7")
    parser.add_argument("--rows", nargs="*", help="names of rows; all by default")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--cache", type=Path, default=Path("runs/strategies"))
    options = parser.parse_args()
    if options.study == "cost":
        text = cost(options.cache)
        (options.out / "strategies-cost.md").write_text(text + "\n")
        print(text)
        return
    rows = [r for r in STUDIES[options.study] if not options.rows or r.name in options.rows]
    path = options.out / f"strategies-{options.study}.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(r["row"], r["seed"], r["fingerprint"]): r for r in known}
    wanted = [(row, seed, (row.name, seed, fingerprint(row, seed))) for seed in options.seeds
              for row in rows]  # fmt: skip
    missing = [(row, seed) for row, seed, key in wanted if key not in done]
    # One pre-training per seed and setting, before workers that need the same one start.
    with ProcessPoolExecutor(options.workers) as pool:
        firsts = {(row.study(s).data, s): row.study(s) for row, s in missing}
        list(pool.map(_pretrain, firsts.values(), [options.cache] * len(firsts)))
        jobs = [pool.submit(run, row, seed, options.cache) for row, seed in missing]
        for job in jobs:
            result = job.result()
            done[result["row"], result["seed"], result["fingerprint"]] = result
            with path.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{result['row']}, seed {result['seed']}: "
                  f"{100 * _mean(result, 'unseen', 0):.1f} % unseen", flush=True)  # fmt: skip
    results = [done[key] for _, _, key in wanted if key in done]
    text = table(rows, results, reference_of(options.study))
    text += "\n\n" + stability(results) if any("watched" in r for r in results) else ""
    (options.out / f"strategies-{options.study}.md").write_text(text + "\n")
    print(text)


def _pretrain(study: Study, cache: Path) -> None:
    torch.set_num_threads(1)
    pretrained(copy.deepcopy(study), cache)


if __name__ == "__main__":
    main()
