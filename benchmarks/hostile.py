"""What do hostile clients cost, under every way of combining answers?

The digits_sensors recipe in small (20 seen clients, all in every round). A share of the seen
clients is hostile in every round, in pre-training and in learning the meta-nets: each trains as
told and then sends

flip     its state minus 3 x its update (the sign turned, and stronger)
scale    its state plus 100 x its update

And one hostile node joins the 20, which sends flipped updates

as 1     under one client's name, which is all that a federation admits of a node
as 20    under 20 names, as it could if nodes were free to say which clients they have

What is reported is the accuracy of FedL2P on the unseen clients, who are all honest, and that of
the plain global model. The rules are set to bear 30 % (Krum, Multi-Krum, the trimmed mean) or as
many as their theory allows among 20 clients (Bulyan: 4); norm clipping takes the median norm of
each round. Setting them by the true number would give away what nobody knows.

    python benchmarks/hostile.py --seeds 2 --workers 1

Results are appended to results/hostile.jsonl as they come; a second call computes what is missing
and writes the table, results/hostile.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from fedl2p import methods, models
from fedl2p.core.clientdata import ClientData
from fedl2p.data.digits import Digits
from fedl2p.data.population import Population
from fedl2p.federation.messages import FederationError
from fedl2p.federation.personalizing import personalize_all
from fedl2p.federation.rounds import federate
from fedl2p.federation.settings import Robust, Rounds
from fedl2p.method import Client, Method, Outcome, State, Update
from fedl2p.methods.base.personalizing import model_with_state
from fedl2p.recipes import digits_sensors
from fedl2p.seeds import generator
from fedl2p.study.settings import Study

SHARES = (0.0, 0.1, 0.2, 0.3)
FACTORS = {"flip": -3.0, "scale": 100.0}
NODE = "a node"
"""The attack of one node that joins, under as many names as the share says."""
CELLS = [
    ("none", 0.0),
    *((attack, share) for attack in FACTORS for share in SHARES[1:]),
    *((NODE, float(names)) for names in (1, 20)),
]
HOSTILE = {"krum": 6, "multikrum": 6, "bulyan": 4}
ROUNDS = {"pretrain": 40, "learn": 8}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One cell of the table under one seed."""

    rule: Robust
    attack: str
    share: float  # of the 20 clients; of NODE, the number of names
    seed: int


class WithNode(Population):
    """A population that a node has joined under some names; its data are those of a client."""

    def __init__(self, population: Population, names: int) -> None:
        self._population = population
        self.joined = tuple(f"joined-{i:02d}" for i in range(names))
        self.seen = (*population.seen, *self.joined)
        self.unseen = population.unseen
        self.shape, self.classes = population.shape, population.classes

    def open(self, name: str) -> ClientData:
        return self._population.open(self.seen[0] if name in self.joined else name)

    def about(self, name: str) -> Mapping[str, str | float]:
        return self._population.about(self.seen[0] if name in self.joined else name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attacked(Method):
    """A method some of whose clients answer with another multiple of their update."""

    inner: Method
    hostile: frozenset[str]
    factor: float

    def start(self, model: nn.Module, *, seed: int = 0) -> State:
        return self.inner.start(model, seed=seed)

    def train(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        return [self._sent(state, u) for u in self.inner.train(model, state, clients)]

    def validate(self, model: nn.Module, state: State, clients: Sequence[Client]) -> list[Update]:
        return self.inner.validate(model, state, clients)

    def personalize(
        self, model: nn.Module, state: State, clients: Sequence[Client]
    ) -> list[Outcome]:
        return self.inner.personalize(model, state, clients)

    def _sent(self, state: State, update: Update) -> Update:
        if update.client not in self.hostile or update.failure is not None:
            return update
        shared = {
            name: state[name] + self.factor * (tensor - state[name])
            for name, tensor in update.shared.items()
        }
        return dataclasses.replace(update, shared=shared)


def study_of(seed: int) -> Study:
    """Return the digits_sensors recipe in small."""
    full = digits_sensors()
    inner = dataclasses.replace(full.settings.finetune, epochs=3, batch_size=48)
    return dataclasses.replace(
        full,
        seed=seed,
        learn=dataclasses.replace(full.learn, server_rate=0.01),
        data=Digits(seen=20, unseen=20, train=48, validation=32, test=64),
        settings=dataclasses.replace(full.settings, finetune=inner),
    )


def attacked(name: str, study: Study, trial: Trial, seen: Sequence[str]) -> Attacked:
    """Return a method with the trial's hostile clients, the same ones under every rule."""
    order = torch.randperm(len(seen), generator=generator(trial.seed, "hostile")).tolist()
    hostile = frozenset(seen[i] for i in order[: round(trial.share * len(seen))])
    if trial.attack == NODE:
        hostile = frozenset(name for name in seen if name.startswith("joined"))
    inner = methods.build(name, study.settings)
    factor = FACTORS.get("flip" if trial.attack == NODE else trial.attack, 1.0)
    return Attacked(name=name, inner=inner, hostile=hostile, factor=factor)


def rounds_of(stage: str, study: Study, rule: Robust) -> Rounds:
    """Return the recipe's rounds of a stage with everybody in each of them, under a rule."""
    own: Rounds = getattr(study, stage)
    return dataclasses.replace(
        own,
        rounds=ROUNDS[stage],
        clients_per_round=0,
        robust=rule,
        hostile=HOSTILE.get(rule, 1),
        trim=0.3,
    )


def run(trial: Trial) -> dict[str, Any]:
    """Pre-train and learn under attack, personalize; return accuracies on the unseen clients."""
    torch.set_num_threads(1)
    began = time.process_time()
    study = study_of(trial.seed)
    population: Population = study.data.open(trial.seed)
    if trial.attack == NODE:
        population = WithNode(population, round(trial.share))
    model = models.build(
        study.model, shape=population.shape, classes=population.classes, seed=trial.seed
    )
    row: dict[str, Any] = dataclasses.asdict(trial)
    stopped = []
    fedavg = attacked("fedavg", study, trial, population.seen)
    rounds = rounds_of("pretrain", study, trial.rule)
    try:
        done = federate(fedavg, model, population, rounds=rounds, seed=trial.seed, stage="pretrain")
        model = model_with_state(model, done.state)
    except FederationError as error:  # nobody has a good answer any more: the model is ruined
        stopped.append(str(error))
    fedl2p = attacked("fedl2p", study, trial, population.seen)
    state = fedl2p.start(model, seed=trial.seed)
    rounds = rounds_of("learn", study, trial.rule)
    try:
        if not stopped:
            state = federate(
                fedl2p, model, population, rounds=rounds, seed=trial.seed, stage="learn"
            ).state
    except FederationError as error:
        stopped.append(str(error))
    chosen = population.unseen
    out = [] if stopped else personalize_all(
        fedl2p, model, state, population, seed=trial.seed, names=chosen
    )  # fmt: skip
    # A client without a usable strategy has no model: that counts as nothing right, not as absent.
    row["accuracy"] = _mean([o.accuracy if o.failure is None else 0.0 for o in out])
    row["global"] = _mean([o.accuracy_before if o.failure is None else 0.0 for o in out])
    row |= {"stopped": stopped, "failed": sum(o.failure is not None for o in out)}
    return {**row, "seconds": time.process_time() - began}


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def trials(seeds: int) -> list[Trial]:
    """Return all cells; with nobody hostile the attack does not matter."""
    rules = get_args(Robust)
    return [Trial(r, a, s, seed) for seed in range(seeds) for a, s in CELLS for r in rules]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return one Markdown table: a rule per line, an attack and share per column."""
    seeds = len({row["seed"] for row in rows})
    heads = ["nobody hostile"] + [
        f"{a} as {s:.0f}" if a == NODE else f"{a}, {100 * s:.0f} %" for a, s in CELLS[1:]
    ]
    lines = [
        "# Hostile clients",
        "",
        "Accuracy in percent on 20 unseen clients, "
        + ("one seed:" if seeds == 1 else f"mean over {seeds} seeds (lowest to highest):"),
        "FedL2P, then in brackets the global model as it is. 20 seen clients, all in every round; "
        "flip: the hostile send -3 x their update, scale: 100 x, in pre-training and in learning; "
        "a node: one more node sends flipped updates as 1 client, which is all that a federation "
        "admits, or as 20. "
        "The rules are set as `benchmarks/hostile.py` says, which makes this table. A run that "
        "stops because no client has a usable answer any more counts 0.",
        "",
        f"| robust | {' | '.join(heads)} |",
        f"|---|{'---:|' * len(heads)}",
    ]
    for rule in get_args(Robust):
        line = []
        for attack, share in CELLS:
            own = [
                row
                for row in rows
                if (row["rule"], row["attack"], row["share"]) == (rule, attack, share)
            ]
            line.append(_cell(own))
        lines.append(f"| {rule} | {' | '.join(line)} |")
    return "\n".join(lines) + "\n"


def _cell(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "-"
    values = sorted(100 * row["accuracy"] for row in rows)
    plain = 100 * statistics.fmean(row["global"] for row in rows)
    spread = f"({values[0]:.0f}-{values[-1]:.0f}) " if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f} {spread}[{plain:.0f}]"


def main() -> None:
    """Compute what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "hostile.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    names = [field.name for field in dataclasses.fields(Trial)]
    done = {Trial(**{name: row[name] for name in names}) for row in rows}
    missing = [trial for trial in trials(options.seeds) if trial not in done]
    with ProcessPoolExecutor(options.workers) as pool, path.open("a") as file:
        for row in pool.map(run, missing):
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            cell = f"{row['rule']}, {row['attack']} {row['share']:g}, seed {row['seed']}"
            print(f"{cell}: {row['accuracy']:.3f} in {row['seconds']:.1f} s", flush=True)
    (options.out / "hostile.md").write_text(table(rows))


if __name__ == "__main__":
    main()
