"""Which hypergradient mode is worth its cost? The study behind the default.

On the digits_sensors recipe, for every seed: the pre-trained model is shared, then meta-nets are
learned once per mode, with two meta-optimizers, and every client is personalized.

published  published meta-nets and outer loop: 3 passes over the validation part in batches of 32,
           entries clamped to [-1, 1], the client's own SGD steps of 1e-3 (nets) and 1e-4 (base
           rates), the server averages
fast       the recipe's own: rates in log space, logarithmic profile, one outer step whose
           hypergradient is clipped to norm 1, the server takes an Adam step on their mean

Both draw the same cohorts. Cost is measured beside plain inner steps of the same clients in the
same process: one hypergradient in units of one plain step (the K steps of the inner loop included).

    python benchmarks/hypergradients.py --seeds 5 --workers 2 --out benchmarks/results

Results are appended to hypergradients.jsonl as they come; a second call computes what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedl2p import methods, models
from fedl2p.core.finetuning.batches import StackBatch
from fedl2p.core.finetuning.inner_loop import inner_batches, run_inner_loop
from fedl2p.core.hypergradients.estimators import stack_hypergradient
from fedl2p.core.hypergradients.problem import Problem
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.settings import MODES, HypergradientConfig, Mode
from fedl2p.core.working_copies import working_copies
from fedl2p.data.population import Population
from fedl2p.federation.personalizing import personalize_all
from fedl2p.federation.rounds import federate
from fedl2p.federation.settings import Rounds
from fedl2p.methods.base.personalizing import model_with_state
from fedl2p.methods.base.settings import MetaLearning
from fedl2p.recipes import digits_sensors
from fedl2p.reporting.intervals import mean_interval
from fedl2p.study.settings import Study

FAST, PUBLISHED = "fast", "published"

Result = dict[str, Any]
"""One line of the results file: a trial and what came of it."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One cell of the study under one seed."""

    meta: str
    mode: Mode
    seed: int


def study_of(trial: Trial, rounds: int, clients: int) -> Study:
    """Return the digits_sensors recipe with the trial's outer loop."""
    study = digits_sensors()
    nets = dataclasses.replace(study.settings.meta.nets, base_rate=0.05, max_rate=1.0)
    meta = dataclasses.replace(study.settings.meta, nets=nets)
    learn = dataclasses.replace(
        study.learn,
        rounds=rounds,
        clients_per_round=clients,
        server_rate=0.005,
        server_schedule="constant",
        keep="average",
    )
    if trial.meta == PUBLISHED:
        meta = MetaLearning.published(base_rate=meta.nets.base_rate)
        learn = Rounds(rounds=rounds, clients_per_round=clients)
    # The recorded results came before the recipe's later choices (benchmarks/strategies.py): base
    # rate 0.05, rates up to 1, five exact steps, a constant server rate, averaged states, no early
    # stopping.
    config = dataclasses.replace(meta.hypergradient, mode=trial.mode, steps=5)
    settings = dataclasses.replace(
        study.settings,
        meta=dataclasses.replace(meta, hypergradient=config),
        finetune=dataclasses.replace(study.settings.finetune, early_stopping=False),
    )
    return dataclasses.replace(study, seed=trial.seed, learn=learn, settings=settings)


@lru_cache(maxsize=2)
def pretrained(seed: int, cache: Path) -> tuple[Population, nn.Module]:
    """Return population and pre-trained model of a seed, from the cache if it was made before."""
    study = dataclasses.replace(digits_sensors(), seed=seed)
    population = study.data.open(seed)
    initial = models.build(
        study.model, shape=population.shape, classes=population.classes, seed=seed
    )
    path = cache / f"pretrained-{seed}.pt"
    if not path.exists():
        fedavg = methods.build("fedavg", study.settings)
        # The recipe now keeps the last round; the recorded results are on the best one's models.
        rounds = dataclasses.replace(study.pretrain, keep="best")
        done = federate(fedavg, initial, population, rounds=rounds, seed=seed, stage="pretrain")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(done.state, path)
    state = torch.load(path, weights_only=True)
    return population, model_with_state(initial, state)


def run(trial: Trial, rounds: int, clients: int, cache: Path) -> Result:
    """Learn and personalize; return accuracies, losses and seconds."""
    torch.set_num_threads(1)
    population, model = pretrained(trial.seed, cache)
    study = study_of(trial, rounds, clients)
    method = methods.build("fedl2p", study.settings)
    began = time.perf_counter()
    done = federate(method, model, population, rounds=study.learn, seed=trial.seed, stage="learn")
    seconds = time.perf_counter() - began
    outcomes = personalize_all(method, model, done.state, population, seed=trial.seed)
    row: Result = {**dataclasses.asdict(trial), "seconds": seconds}
    row["best_round"] = done.best_round
    for pool, names in (("seen", population.seen), ("unseen", population.unseen)):
        of = [o for o in outcomes if o.client in set(names)]
        good = [o for o in of if o.failure is None]
        row[f"{pool}_failed"] = len(of) - len(good)
        row[f"{pool}_accuracy"] = statistics.fmean(o.accuracy for o in good)
        row[f"{pool}_loss"] = statistics.fmean(o.loss for o in good)
    return row


def cost_in_steps(repeats: int = 3) -> dict[str, tuple[int, float]]:
    """Return for each mode K and the cost of one hypergradient in plain steps, interleaved."""
    torch.set_num_threads(1)
    study = digits_sensors()
    population = study.data.open(0)
    model = models.build(study.model, shape=population.shape, classes=population.classes, seed=0)
    net = working_copies(model).net
    data = [population.open(name) for name in population.seen[:20]]
    inner = study.settings.finetune
    batches = inner_batches(net, data, list(range(len(data))), inner)
    validation = StackBatch(
        torch.stack([d.validation.x for d in data if d.validation]),
        torch.stack([d.validation.y for d in data if d.validation]),
    )
    h = Hyperparams.stack([Hyperparams.constant(net.sites, mix=0.5, rate=0.03)] * len(data))

    problem = Problem(
        net=net,
        mix=h.mix,
        rate=h.rate,
        batches=batches,
        validation=[validation],
        following=batches[len(batches)],
    )

    def plain() -> None:
        run_inner_loop(net, h, batches, statistics="corrected")

    ratios: dict[str, list[float]] = {mode: [] for mode in MODES}
    for repeat in range(repeats + 1):
        for mode in MODES:
            config = HypergradientConfig(mode=mode, steps=5)
            seconds = []
            for work in (
                plain,
                lambda c=config: stack_hypergradient(problem, c),
            ):
                began = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - began)
            if repeat:  # the first is a warm-up
                ratios[mode].append(seconds[1] / seconds[0] * len(batches))
    return {mode: (len(batches), statistics.median(r)) for mode, r in ratios.items()}


def table(rows: list[Result], cost: dict[str, tuple[int, float]]) -> str:
    """Return the study as Markdown."""
    lines = [
        "| meta-optimizer | mode | seeds | unseen accuracy | seen accuracy | unseen loss "
        "| failed | one hypergradient, plain steps (K) | learning, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for meta in (PUBLISHED, FAST):
        for mode in MODES:
            own = [r for r in rows if r["meta"] == meta and r["mode"] == mode]
            if not own:
                continue
            cells = [_interval(own, k) for k in ("unseen_accuracy", "seen_accuracy", "unseen_loss")]
            failed = sum(int(r["seen_failed"]) + int(r["unseen_failed"]) for r in own)
            steps, ratio = cost[mode]
            seconds = statistics.fmean(float(r["seconds"]) for r in own)
            lines.append(
                f"| {meta} | {mode} | {len(own)} | {' | '.join(cells)} | {failed} | "
                f"{ratio:.1f} ({steps}) | {seconds:.0f} |"
            )
    return "\n".join(lines)


def _interval(rows: list[Result], key: str) -> str:
    interval = mean_interval([float(r[key]) for r in rows])
    return f"{interval.mean:.3f} ± {interval.half or 0.0:.3f}"


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0")
    parser.add_argument("--rounds", type=int, default=20, help="learning rounds")
    parser.add_argument("--clients", type=int, default=10, help="clients per round")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--cache", type=Path, default=Path("runs/hypergradients"))
    options = parser.parse_args()
    trials = [
        Trial(meta, mode, seed)
        for seed in range(options.seeds)
        for meta in (FAST, PUBLISHED)
        for mode in MODES
    ]
    path = options.out / "hypergradients.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(r["meta"], r["mode"], r["seed"]) for r in rows}
    missing = [t for t in trials if dataclasses.astuple(t) not in known]
    for seed in sorted({t.seed for t in missing}):
        pretrained(seed, options.cache)
    with ProcessPoolExecutor(options.workers) as pool:
        jobs = [
            pool.submit(run, t, options.rounds, options.clients, options.cache) for t in missing
        ]
        for job in jobs:
            rows.append(job.result())
            with path.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(json.dumps(rows[-1]), flush=True)
    text = table(rows, cost_in_steps())
    (options.out / "hypergradients.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
