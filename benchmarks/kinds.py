"""What is FedL2P worth where clients differ in kind?

Studies on the recipes digits and kinds. Each is a grid of rows x seeds; every seed opens its clients
and pre-trains its global model once, and all rows meet the same clients and batches.

learning  how the meta-nets are learned, one setting changed per row (seeds on which we choose)
final     FedL2P against everything else, and the profile taken apart (seeds opened for it only)
main      the rows of final without the profile taken apart, for recipes that take long

    python benchmarks/kinds.py learning digits --seeds 0-2
    python benchmarks/kinds.py final digits --seeds 200-209
    python benchmarks/kinds.py final digits_early_stopping --seeds 200-202

Results are appended to kinds-RECIPE.jsonl as they come, one line per row and seed with every client's
accuracy; a second call computes what is missing or whose settings have changed. The table is written
beside it.

The row "grid" fine-tunes every client at every point of the grid, once on its training part, judged
on its validation part, and once on what the last fine-tuning reads, judged on its test part. From
it come the best single setting (the point of lowest loss over the validation examples of all seen
clients, as bestfixed has it), grid search per client (the point of lowest loss on the client's
own), and bounds that no method reaches: the point of best test accuracy of all clients, of all
clients of a kind, of each client.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from strategies import (
    META,
    NETS,
    Row,
    clients_of,
    fingerprint,
    given_profiles,
    learned,
    pretrained,
    seeds_of,
)
from torch import nn

from fedl2p import methods
from fedl2p.core.working_copies import working_copies
from fedl2p.data.population import Population
from fedl2p.method import Client, State
from fedl2p.methods.finetuning import FineTuning
from fedl2p.methods.gridsearch import search
from fedl2p.reporting.intervals import mean_interval
from fedl2p.runs.results import TOLERANCE
from fedl2p.study.settings import Study

Result = dict[str, Any]
"""One line of the results file."""

LEARN = "learn."

GROUPS = ("divergences", "moments", "gradients", "loss", "labels", "size")

FEDL2P, GRID = "FedL2P", "grid"

MAIN = (
    Row(GRID),
    Row("fine-tuning, global statistics", "finetuning-global"),
    Row("fine-tuning, client statistics", "finetuning-client"),
    Row("constants instead of nets", "fedl2p-constant"),
    Row(FEDL2P),
    Row("FedL2P, others' profiles", profiles="shuffled"),
    Row("FedL2P, published profile", changes={NETS + "profile": ["published"]}),
)

WITHOUT = tuple(
    Row(
        f"FedL2P, without {group}",
        changes={NETS + "profile": [g for g in GROUPS if g != group]},
    )
    for group in GROUPS
)

LEARNING = (
    Row(FEDL2P),
    Row("bound 0.7", changes={META + "bound": 0.7}),
    Row("bound 1", changes={META + "bound": 1.0}),
    Row("agreement", changes={LEARN + "average_decay": 0.90001}),
    Row("agreement, bound 1", changes={META + "bound": 1.0, LEARN + "average_decay": 0.90001}),
    Row("agreement, bound 0.3", changes={META + "bound": 0.3, LEARN + "average_decay": 0.90001}),
    Row("agreement, mix 0.1", changes={NETS + "initial_mix": 0.1, LEARN + "average_decay": 0.90001}),
    Row("temperature 10", changes={META + "bound": -10.0}),
    Row("temperature 100", changes={META + "bound": -100.0}),
    Row("temperature 10, noise 0.3", changes={META + "bound": -10.0, META + "noise": 0.3}),
    Row("temperature 10, decay 0.1", changes={META + "bound": -10.0, META + "decay": 0.1}),
    Row("temperature 10, 60 rounds of 15", changes={META + "bound": -10.0, LEARN + "rounds": 60, LEARN + "clients_per_round": 15}),
    Row("60 rounds of 15", changes={LEARN + "rounds": 60, LEARN + "clients_per_round": 15}),
    Row("bound 0.3", changes={META + "bound": 0.3}),
    Row("clients the same", changes={LEARN + "weighting": "clients"}),
    Row("60 rounds", changes={LEARN + "rounds": 60}),
    Row("server rate 0.015", changes={LEARN + "server_rate": 0.015}),
    Row("server rate 0.03", changes={LEARN + "server_rate": 0.03}),
    Row("decay 0.01", changes={META + "decay": 0.01}),
    Row("decay 0.1", changes={META + "decay": 0.1}),
    Row("initial mix 0.2", changes={NETS + "initial_mix": 0.2}),
    Row("base rate 0.02", changes={NETS + "base_rate": 0.02}),
)

STUDIES = {"learning": LEARNING, "final": (*MAIN, *WITHOUT), "main": MAIN}


class Seed:
    """What all rows of one recipe share under one seed."""

    def __init__(self, recipe: str, seed: int, cache: Path) -> None:
        self.recipe, self.seed, self.cache = recipe, seed, cache
        study = Row("", base=recipe).study(seed)
        self.population, self.initial, self.model = pretrained(study, cache)
        self.clients = clients_of(self.population, self.population.names, seed)

    def run(self, row: Row) -> Result:
        """Return every client's numbers under one row."""
        study, began = row.study(self.seed), time.process_time()
        if row.name == GRID:
            clients = grid(study, self.model, self.clients, self.population)
        else:
            clients = self._personalized(row, study)
        return {
            "recipe": self.recipe,
            "row": row.name,
            "seed": self.seed,
            "fingerprint": fingerprint(row, self.seed),
            "seconds": round(time.process_time() - began, 1),
            "clients": clients,
        }

    def _personalized(self, row: Row, study: Study) -> dict[str, Any]:
        method = methods.build(row.method, study.settings)
        state: State
        state, _, learning = learned(study, method, self.model, self.population, self.cache)
        given = given_profiles(row, study, self.model, self.population, self.clients)
        outcomes = method.personalize(self.model, state, given)
        return {
            o.client: {
                "kind": self.population.about(o.client).get("kind", ""),
                "n": o.num_train,
                "before": _round(o.accuracy_before),
                "after": _round(o.accuracy),
                "tested": o.num_test,
                "mix": _rounds(o.hyperparams.mix.tolist()) if o.hyperparams else None,
                "rate": _rounds(o.hyperparams.rate.tolist()) if o.hyperparams else None,
                "seconds": round(o.seconds, 5),
                "diverged": o.failure is not None,
            }
            for o in outcomes
        }


def grid(
    study: Study, model: nn.Module, clients: Sequence[Client], population: Population
) -> dict[str, Any]:
    """Return what every client gets at every point of the grid."""
    points, inner = study.settings.grid.points, study.settings.finetune
    net = working_copies(model).net
    began = time.process_time()
    losses, _ = search(net, clients, study.settings.grid, inner)
    searching = (time.process_time() - began) / len(clients)
    tests = [
        FineTuning(name="point", mix=mix, rate=rate, inner=inner).personalize(model, {}, clients)
        for mix, rate in points
    ]
    return {
        c.name: {
            "kind": population.about(c.name).get("kind", ""),
            "before": _round(tests[0][i].accuracy_before),
            "tested": tests[0][i].num_test,
            "weight": c.data.validation.num if c.data.validation else 0,
            "losses": _rounds(losses[i].tolist()),
            "after": [_round(test[i].accuracy) for test in tests],
            "seconds": round(searching + tests[0][i].seconds, 5),
        }
        for i, c in enumerate(clients)
    }


def _round(value: float) -> float:
    return round(value, 5)


def _rounds(values: Sequence[float]) -> list[float]:
    return [float(f"{v:.4g}") for v in values]


# --- what a row of the table is ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Judged:
    """One client under one row: kind, accuracy before and after, number of test examples."""

    kind: str
    before: float
    after: float
    tested: int

    @property
    def worse(self) -> bool:
        """As in :func:`fedl2p.runs.results.made_worse`."""
        return self.before - self.after > max(TOLERANCE, 1 / self.tested) + 1e-9


def judged(result: Result) -> dict[str, Judged]:
    """Return the clients of a row."""
    return {
        name: Judged(c["kind"], c["before"], c["after"], c["tested"])
        for name, c in result["clients"].items()
    }


def from_grid(result: Result) -> dict[str, dict[str, Judged]]:
    """Return the rows that the grid of one seed has in it."""
    clients = result["clients"]
    points = range(len(next(iter(clients.values()))["after"]))
    seen = [c for name, c in clients.items() if name.startswith("seen")]
    kinds = sorted({c["kind"] for c in clients.values()})

    def best(members: Sequence[Mapping[str, Any]]) -> int:
        return max(points, key=lambda p: statistics.fmean(c["after"][p] for c in members))

    single = min(points, key=lambda p: sum(c["weight"] * c["losses"][p] for c in seen))
    own = {k: min(points, key=lambda p: clients[k]["losses"][p]) for k in clients}
    pools = {k: k.split("-")[0] for k in clients}
    of = {
        (pool, kind): best(
            [c for k, c in clients.items() if pools[k] == pool and kind in ("", c["kind"])]
        )
        for pool in set(pools.values())
        for kind in ("", *kinds)
    }
    chosen = {
        "best single mix and rate": dict.fromkeys(clients, single),
        "grid search per client": own,
        "bound: best single on test data": {k: of[pools[k], ""] for k in clients},
        "bound: best per kind on test data": {k: of[pools[k], clients[k]["kind"]] for k in clients},
        "bound: best per client on test data": {k: best([clients[k]]) for k in clients},
    }
    rows = {
        name: {
            k: Judged(c["kind"], c["before"], c["after"][choice[k]], c["tested"])
            for k, c in clients.items()
        }
        for name, choice in chosen.items()
    }
    none = {k: Judged(c["kind"], c["before"], c["before"], c["tested"]) for k, c in clients.items()}
    return {"global model": none, **rows}


Table = Mapping[str, Mapping[int, Mapping[str, Judged]]]
"""By row, seed and client."""


def table_of(results: Sequence[Result]) -> Table:
    """Return all rows of one recipe."""
    rows: dict[str, dict[int, dict[str, Judged]]] = {}
    for result in results:
        found = from_grid(result) if result["row"] == GRID else {result["row"]: judged(result)}
        for name, clients in found.items():
            rows.setdefault(name, {})[result["seed"]] = clients
    return rows


def accuracy(clients: Mapping[str, Judged], pool: str, kind: str = "") -> float:
    """Return the mean accuracy of a pool's clients, in percent."""
    return 100 * statistics.fmean(
        c.after for k, c in clients.items() if k.startswith(pool) and kind in ("", c.kind)
    )


def worse(clients: Mapping[str, Judged], pool: str) -> float:
    """Return the share of a pool's clients that are made worse, in percent."""
    return 100 * statistics.fmean(c.worse for k, c in clients.items() if k.startswith(pool))


def interval(values: Sequence[float], form: str = ".1f") -> str:
    """Return mean and 95 % interval."""
    found = mean_interval(list(values))
    half = "" if found.half is None else f" ± {found.half:{form.strip('+')}}"
    return f"{found.mean:{form}}{half}"


def markdown(rows: Table, reference: str = FEDL2P) -> str:
    """Return the table of a recipe."""
    kinds = sorted({c.kind for own in rows.values() for seed in own.values() for c in seed.values()})
    head = ["method", "seeds", "seen", "unseen", f"{reference} minus it, unseen", "above it in",
            "unseen made worse", *(k for k in kinds if k)]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    main = rows.get(reference, {})
    for name, own in rows.items():
        both = sorted(own.keys() & main.keys()) if name != reference else []
        gaps = [accuracy(main[s], "unseen") - accuracy(own[s], "unseen") for s in both]
        cells = [
            name,
            str(len(own)),
            *(interval([accuracy(c, pool) for c in own.values()]) for pool in ("seen", "unseen")),
            interval(gaps, "+.2f") if gaps else "",
            f"{sum(g > 0 for g in gaps)} of {len(both)}" if both else "",
            interval([worse(c, "unseen") for c in own.values()], ".0f") + " %",
            *(
                f"{statistics.fmean(accuracy(c, 'unseen', k) for c in own.values()):.1f}"
                for k in kinds
                if k
            ),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cost(results: Sequence[Result]) -> str:
    """Say what a client's personalization costs, against a search of its own."""
    seconds = {
        row: statistics.fmean(
            c["seconds"] for r in results if r["row"] == row for c in r["clients"].values()
        )
        for row in (FEDL2P, GRID)
        if any(r["row"] == row for r in results)
    }
    if len(seconds) < 2:
        return ""
    return (
        f"A client's personalization takes {seconds[FEDL2P]:.4f} s by FedL2P, fine-tuning included, "
        f"and {seconds[GRID]:.4f} s by grid search: {100 * seconds[FEDL2P] / seconds[GRID]:.1f} %."
    )


def read(path: Path) -> list[Result]:
    """Return the lines of a results file; none if there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    """Run what is missing of a study and write its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=seeds_of, default=seeds_of("0-2"), help="0-9 or 0,3,7")
    parser.add_argument("--rows", nargs="*", help="names of rows; all by default")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--cache", type=Path, default=Path("runs/kinds"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.cache.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"kinds-{options.recipe}.jsonl"
    rows = [
        dataclasses.replace(row, base=options.recipe)
        for row in STUDIES[options.study]
        if not options.rows or row.name in options.rows
    ]
    done = {(r["row"], r["seed"], r["fingerprint"]): r for r in read(path)}
    wanted = [(row, s, (row.name, s, fingerprint(row, s))) for s in options.seeds for row in rows]
    opened: Seed | None = None
    for row, seed, key in wanted:
        if key in done:
            continue
        if opened is None or opened.seed != seed:
            opened = Seed(options.recipe, seed, options.cache)
        done[key] = opened.run(row)
        with path.open("a") as file:
            file.write(json.dumps(done[key]) + "\n")
        found = done[key]
        print(f"{row.name}, seed {seed}: {found['seconds']:.0f} s", flush=True)
    results = [done[key] for _, _, key in wanted]
    text = markdown(table_of(results)) + "\n\n" + cost(results)
    (options.out / f"kinds-{options.study}-{options.recipe}.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
