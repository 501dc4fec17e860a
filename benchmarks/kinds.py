"""What is FedL2P worth where clients differ in kind?

Studies on the recipes digits and kinds, and on any other that the package has. Each is a grid of
rows x seeds; every seed opens its clients and pre-trains its global model once, and all rows meet
the same clients and batches.

learning  how the meta-nets are learned, one setting changed per row (seeds on which we choose)
main      FedL2P against everything else (seeds opened for it only)
profile   the profile taken apart, and the bounds

    python benchmarks/kinds.py learning digits --seeds 0-2
    python benchmarks/kinds.py main digits --seeds 200-209
    python benchmarks/kinds.py main fashion --alpha 0.5 --seeds 202-204 --searched 200

Results are appended to kinds-STUDY-RECIPE.jsonl as they come, one line per row and seed with every
client's accuracy; a second call computes what is missing or whose settings have changed. The table
is written beside it. Another machine pre-trains global models that differ a little: below a table
stands which rows began with others than FedL2P's, and then not what a personalization costs.

The row "searches" tries every point of the grid on every client, fine-tuned on its training part
and judged on its validation part. From it come the best single setting (the point of lowest loss
over the validation examples of all seen clients, as bestfixed has it) and grid search per client
(the point of lowest loss on the client's own). Where that takes hours, --searched has so many
clients searched, spread evenly over all: the single setting is chosen on them and used by all, and
the row of the search per client has them alone. The row "bounds" judges every point on the test
parts, after the last fine-tuning: the point of best test accuracy of all clients of a pool, of all
those of a kind, of each client. No method reaches these.

Every client counts the same. A difference has a 95 % interval over seeds, and in brackets that over
all pairs of one client under one seed, which takes the seeds' learned states as given.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from strategies import (
    NETS,
    Row,
    clients_of,
    fingerprint,
    given_profiles,
    learned,
    pretrained,
    seeds_of,
)

from fedl2p import methods
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.settings import InnerLoop
from fedl2p.core.working_copies import working_copies
from fedl2p.method import Client, Method, Outcome, State
from fedl2p.methods.base.personalizing import personalize_with
from fedl2p.methods.gridsearch import search
from fedl2p.reporting.intervals import mean_interval
from fedl2p.runs.results import TOLERANCE
from fedl2p.study.settings import Study

Result = dict[str, Any]
"""One line of the results file."""

LEARN = "learn."

GROUPS = ("divergences", "moments", "gradients", "loss", "labels", "size")

FEDL2P, SEARCHES, BOUNDS = "FedL2P", "searches", "bounds"
OTHERS = "FedL2P, others' profiles"

MAIN = (
    Row(SEARCHES),
    Row(FEDL2P),
    Row("constants instead of nets", "fedl2p-constant"),
    Row("FedL2P, published profile", changes={NETS + "profile": ["published"]}),
    Row(OTHERS, profiles="shuffled"),
    Row("fine-tuning, global statistics", "finetuning-global"),
    Row("fine-tuning, client statistics", "finetuning-client"),
)

PROFILE = (
    Row(FEDL2P),
    Row(BOUNDS),
    *(
        Row(
            f"FedL2P, without {group}",
            changes={NETS + "profile": [g for g in GROUPS if g != group]},
        )
        for group in GROUPS
    ),
)

LEARNING = (
    Row(FEDL2P),
    Row("max rate 0.3", changes={NETS + "max_rate": 0.3}),
    Row("clients the same", changes={LEARN + "weighting": "clients"}),
    Row("base rate 0.01", changes={NETS + "base_rate": 0.01}),
    Row("initial mix 0.1", changes={NETS + "initial_mix": 0.1}),
    Row(
        "60 rounds of half as many",
        changes={LEARN + "rounds": 60, LEARN + "clients_per_round": 15},
    ),
    Row("constants instead of nets", "fedl2p-constant"),
)

STUDIES = {"learning": LEARNING, "main": MAIN, "profile": PROFILE}


class Seed:
    """What all rows of one recipe share under one seed."""

    def __init__(self, base: Row, seed: int, cache: Path, searched: int = 0) -> None:
        self.recipe = " ".join([base.base, *(f"{k}={v:g}" for k, v in base.changes.items())])
        self.seed, self.cache, self.searched = seed, cache, searched
        study = base.study(seed)
        self.population, self.initial, self.model = pretrained(study, cache)
        self.clients = clients_of(self.population, self.population.names, seed)

    def run(self, row: Row) -> Result:
        """Return every client's numbers under one row, and what they cost without learning."""
        study = row.study(self.seed)
        clients: dict[str, Any]
        if row.name in (SEARCHES, BOUNDS):
            began = time.process_time()
            clients = self._searches(study) if row.name == SEARCHES else self._bounds(study)
        else:
            method = methods.build(row.method, study.settings)
            state, _, _ = learned(study, method, self.model, self.population, self.cache)
            began = time.process_time()
            clients = self._personalized(row, study, method, state)
        return {
            "recipe": self.recipe,
            "row": row.name,
            "seed": self.seed,
            "fingerprint": fingerprint(row, self.seed),
            "seconds": round(time.process_time() - began, 1),
            "clients": clients,
        }

    def _personalized(self, row: Row, study: Study, method: Method, state: State) -> dict[str, Any]:
        given = given_profiles(row, study, self.model, self.population, self.clients)
        outcomes = method.personalize(self.model, state, given)
        return {
            o.client: {
                **self._about(o),
                "after": _round(o.accuracy),
                **self._written(o),
            }
            for o in outcomes
        }

    def _written(self, outcome: Outcome) -> dict[str, Any]:
        """Return the settings that a client was given, where the picture has them kind by kind."""
        if outcome.hyperparams is None or not self.population.about(outcome.client).get("kind"):
            return {}
        given = outcome.hyperparams
        return {"mix": _rounds(given.mix.tolist()), "rate": _rounds(given.rate.tolist())}

    def _searches(self, study: Study) -> dict[str, Any]:
        points, inner = study.settings.grid.points, study.settings.finetune
        net = working_copies(self.model).net
        every = len(self.clients) // min(self.searched or len(self.clients), len(self.clients))
        searched = self.clients[::every]
        losses, _ = search(net, searched, study.settings.grid, inner)
        seen = set(self.population.seen)
        judged = [
            (c.data.validation.num, loss)
            for c, loss in zip(searched, losses, strict=True)
            if c.data.validation and c.name in seen
        ]
        total = torch.stack([weight * loss for weight, loss in judged]).sum(0)
        single = points[int(total.argmin())]
        chosen = [points[i] for i in losses.argmin(1).tolist()]
        own = {
            o.client: {"own": _round(o.accuracy), "points": [single, point]}
            for o, point in zip(self._at(searched, chosen, inner), chosen, strict=True)
        }
        return {
            o.client: {
                **self._about(o),
                "single": _round(o.accuracy),
                **own.get(o.client, {"points": [single]}),
            }
            for o in self._at(self.clients, [single] * len(self.clients), inner)
        }

    def _bounds(self, study: Study) -> dict[str, Any]:
        points, inner = study.settings.grid.points, study.settings.finetune
        tried = [self._at(self.clients, [point] * len(self.clients), inner) for point in points]
        return {
            o.client: {**self._about(o), "after": [_round(t[i].accuracy) for t in tried]}
            for i, o in enumerate(tried[0])
        }

    def _at(
        self, clients: Sequence[Client], points: Sequence[tuple[float, float]], inner: InnerLoop
    ) -> list[Outcome]:
        """Return the outcomes of fine-tuning each client at a point of its own."""
        sites = working_copies(self.model).net.sites
        given = {
            c.name: Hyperparams.constant(sites, mix=mix, rate=rate)
            for c, (mix, rate) in zip(clients, points, strict=True)
        }
        return personalize_with(
            self.model,
            clients,
            inner,
            lambda clients: (Hyperparams.stack([given[c.name] for c in clients]), None),
        )

    def _about(self, outcome: Outcome) -> dict[str, Any]:
        return {
            "kind": self.population.about(outcome.client).get("kind", ""),
            "pool": "seen" if outcome.client in self.population.seen else "unseen",
            "n": outcome.num_train,
            "before": _round(outcome.accuracy_before),
            "tested": outcome.num_test,
            "diverged": outcome.failure is not None,
        }


def _round(value: float) -> float:
    return round(value, 5)


def _rounds(values: Sequence[float]) -> list[float]:
    return [float(f"{v:.4g}") for v in values]


# --- what a row of the table is ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Judged:
    """One client under one row: pool, kind, accuracy before and after, number of test examples."""

    pool: str
    kind: str
    before: float
    after: float
    tested: int

    @property
    def worse(self) -> bool:
        """As in :func:`fedl2p.runs.results.made_worse`."""
        return self.before - self.after > max(TOLERANCE, 1 / self.tested) + 1e-9


def rows_of(result: Result) -> dict[str, dict[str, Judged]]:
    """Return the rows of the table that a line of the results file has in it."""
    clients = result["clients"]

    def pool(name: str) -> str:
        return clients[name].get("pool", name.split("-")[0])

    def row(after: Mapping[str, float]) -> dict[str, Judged]:
        return {
            k: Judged(pool(k), c["kind"], c["before"], after[k], c["tested"])
            for k, c in clients.items()
            if k in after
        }

    if result["row"] == SEARCHES:
        return {
            "global model": row({k: c["before"] for k, c in clients.items()}),
            "best single mix and rate": row({k: c["single"] for k, c in clients.items()}),
            "grid search per client": row({k: c["own"] for k, c in clients.items() if "own" in c}),
        }
    if result["row"] != BOUNDS:
        return {result["row"]: row({k: c["after"] for k, c in clients.items()})}

    def bound(group: Callable[[str], object]) -> dict[str, Judged]:
        groups: dict[object, list[str]] = {}
        for k in clients:
            groups.setdefault(group(k), []).append(k)
        points = range(len(next(iter(clients.values()))["after"]))
        best = {
            g: max(points, key=lambda p: sum(clients[k]["after"][p] for k in members))
            for g, members in groups.items()
        }
        return row({k: c["after"][best[group(k)]] for k, c in clients.items()})

    return {
        "bound: best single on test data": bound(pool),
        "bound: best per kind on test data": bound(lambda k: (pool(k), clients[k]["kind"])),
        "bound: best per client on test data": bound(lambda k: k),
    }


Table = Mapping[str, Mapping[int, Mapping[str, Judged]]]
"""By row, seed and client."""


def table_of(results: Sequence[Result]) -> Table:
    """Return all rows of one recipe."""
    rows: dict[str, dict[int, dict[str, Judged]]] = {}
    for result in results:
        for name, clients in rows_of(result).items():
            rows.setdefault(name, {})[result["seed"]] = clients
    return rows


def accuracy(clients: Mapping[str, Judged], pool: str, kind: str = "") -> float:
    """Return the mean accuracy of a pool's clients, in percent."""
    return 100 * statistics.fmean(
        c.after for c in clients.values() if c.pool == pool and kind in ("", c.kind)
    )


def worse(clients: Mapping[str, Judged], pool: str) -> float:
    """Return the share of a pool's clients that are made worse, in percent."""
    return 100 * statistics.fmean(c.worse for c in clients.values() if c.pool == pool)


def interval(values: Sequence[float], form: str = ".1f") -> str:
    """Return mean and 95 % interval."""
    found = mean_interval(list(values))
    half = "" if found.half is None else f" ± {found.half:{form.strip('+')}}"
    return f"{found.mean:{form}}{half}"


def markdown(rows: Table, reference: str = FEDL2P) -> str:
    """Return the table of a recipe, by its unseen clients; by its seen ones if it has no others."""
    kinds = sorted(
        {c.kind for own in rows.values() for seed in own.values() for c in seed.values()}
    )
    found = {c.pool for own in rows.values() for seed in own.values() for c in seed.values()}
    pools = [pool for pool in ("seen", "unseen") if pool in found]
    judged = pools[-1]
    head = ["method", "seeds", *pools, f"{reference} minus it, {judged}", "above it in",
            f"{judged} made worse", *(k for k in kinds if k)]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    main = rows.get(reference, {})
    for name, own in rows.items():
        both = sorted(own.keys() & main.keys()) if name != reference else []
        differences = [
            [100 * (main[s][k].after - c.after) for k, c in own[s].items() if c.pool == judged]
            for s in both
        ]
        gaps = [statistics.fmean(of_seed) for of_seed in differences]
        pairs = [pair for of_seed in differences for pair in of_seed]
        cells = [
            name,
            str(len(own)),
            *(interval([accuracy(c, pool) for c in own.values()]) for pool in pools),
            f"{interval(gaps, '+.1f')} (± {mean_interval(pairs).half:.1f})" if gaps else "",
            f"{sum(g > 0 for g in gaps)} of {len(both)}" if both else "",
            interval([worse(c, judged) for c in own.values()], ".0f") + " %",
            *(
                f"{statistics.fmean(accuracy(c, judged, k) for c in own.values()):.1f}"
                for k in kinds
                if k
            ),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def other_global_models(rows: Table, reference: str = FEDL2P) -> str:
    """Say which rows began with other global models than the reference; nothing if none did."""
    apart: dict[str, float] = {}
    for name, own in rows.items():
        for seed in own.keys() & rows.get(reference, {}).keys():
            begun = rows[reference][seed]
            gap = statistics.fmean(c.before - begun[k].before for k, c in own[seed].items())
            apart[name] = max(apart.get(name, 0.0), 100 * abs(gap))
    apart = {name: gap for name, gap in apart.items() if gap >= 0.005}
    if not apart:
        return ""
    return (
        f"Begun with global models that another machine pre-trained (accuracy up to "
        f"{max(apart.values()):.2f} points from that of {reference}'s): {'; '.join(apart)}."
    )


def cost(results: Sequence[Result]) -> str:
    """Say what a client's personalization costs, against a search of its own.

    By their processor seconds; evaluation before and after is included.
    """

    def seconds(row: str) -> float:
        found = [r for r in results if r["row"] == row]
        if not found:
            return math.nan
        return statistics.fmean(r["seconds"] / len(r["clients"]) for r in found)

    own = seconds(OTHERS)
    if any("own" not in c for r in results if r["row"] == SEARCHES for c in r["clients"].values()):
        return ""
    search = seconds(SEARCHES) - seconds("fine-tuning, client statistics")  # it has two of these
    if math.isnan(own + search):
        return ""
    return (
        f"A client's personalization takes {own:.4f} processor seconds by FedL2P, fine-tuning "
        f"included, and {search:.4f} by grid search: {100 * own / search:.1f} %."
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
    parser.add_argument("--searched", type=int, default=0, help="clients to search; 0 for all")
    parser.add_argument("--alpha", type=float, help="label skew of fashion and fashionc")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--cache", type=Path, default=Path("runs/kinds"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.cache.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"kinds-{options.study}-{options.recipe}.jsonl"
    skew = {} if options.alpha is None else {"data.alpha": options.alpha}
    base = Row("", base=options.recipe, changes=skew)
    rows = [
        dataclasses.replace(row, base=options.recipe, changes={**skew, **row.changes})
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
            opened = Seed(base, seed, options.cache, options.searched)
        done[key] = opened.run(row)
        with path.open("a") as file:
            file.write(json.dumps(done[key]) + "\n")
        found = done[key]
        print(f"{row.name}, seed {seed}: {found['seconds']:.0f} s", flush=True)
    results = [done[key] for _, _, key in wanted]
    table = table_of(results)
    below = other_global_models(table) or cost(results)  # no costs across machines
    text = markdown(table) + (f"\n\n{below}" if below else "")
    name = options.recipe + ("" if options.alpha is None else f"-alpha-{options.alpha:g}")
    (options.out / f"kinds-{options.study}-{name}.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
