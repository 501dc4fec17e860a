"""Does it pay on these clients? FedL2P and what it must beat, by cross-validation over clients."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fedl2p.atomic_files import write_text
from fedl2p.data.population import Population
from fedl2p.federation.settings import Rounds
from fedl2p.methods import AUDITED
from fedl2p.reporting.verdict import Verdict, verdict
from fedl2p.runs import layout
from fedl2p.runs.folder import RunWriter
from fedl2p.study.held_out import HeldOut
from fedl2p.study.run import run_study
from fedl2p.study.settings import Study

PAGE = "audit.md"


def run_audit(study: Study, out: str | Path, *, folds: int) -> Verdict:
    """Learn on all folds of the seen clients but one, try on that one; for each fold in turn.

    Parameters
    ----------
    study
        Whose clients, which model, how it is learned. Its methods are those that an audit must
        have (:data:`~fedl2p.methods.AUDITED`), and others. Rounds with more clients than
        the other folds have are rounds with all of these.
    out
        Folder of the folds' runs and of audit.md. Finished folds are kept, interrupted ones are
        resumed.
    folds
        Number of folds, 2 or more.

    Raises
    ------
    ValueError
        If there are too few clients, the study cannot be run, or a folder holds another run.
    """
    out = Path(out)
    if missing := [name for name in AUDITED if name not in study.methods]:
        raise ValueError(
            f"methods lack {', '.join(missing)}, which an audit compares; name them too, or leave "
            "methods out"
        )
    folded = [HeldOut(of=study.data, fold=fold, folds=folds) for fold in range(folds)]
    fewest = min(len(data.open(study.seed).seen) for data in folded)
    _check_test_parts(folded[0].open(study.seed))
    planned = {
        out / f"fold-{data.fold + 1}": dataclasses.replace(
            study,
            data=data,
            pretrain=_at_most(study.pretrain, fewest),
            learn=_at_most(study.learn, fewest),
        )
        for data in folded
    }
    for folder, one in planned.items():
        RunWriter(folder).check(one, resume=True)
    for folder, one in planned.items():
        if not (folder / layout.RESULTS).exists():
            run_study(one, folder, resume=True)
    found = verdict(list(planned))
    write_text(out / PAGE, found.markdown())
    return found


def _check_test_parts(population: Population) -> None:
    """Refuse a client without a test part now, not after the hours that learning takes."""
    for name in population.names:
        if population.open(name).test is None:
            raise ValueError(
                f"client {name!r} has no test part, by which an audit judges; give it one"
            )


def _at_most(rounds: Rounds, clients: int) -> Rounds:
    """Return rounds that draw no more clients than there are."""
    return dataclasses.replace(rounds, clients_per_round=min(rounds.clients_per_round, clients))
