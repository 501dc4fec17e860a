"""The main job: a global model, every method's learning, every client personalized."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fedl2p.federation.listeners import Listener
from fedl2p.federation.messages import Clients
from fedl2p.runs.results import Report
from fedl2p.study import stages
from fedl2p.study.settings import Study


def run_study(
    study: Study,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    listeners: Sequence[Listener] = (),
    clients: Clients | None = None,
) -> Report:
    """Do the main job: a global model, every method's learning, every client personalized.

    Parameters
    ----------
    study
        What to do.
    out
        Folder for the results and checkpoints; None to keep nothing.
    resume
        Go on with the run in ``out`` after the last round or method that it finished; start it if
        there is none.
    listeners
        Called after every round, e.g. a progress bar.
    clients
        Where the clients are; None for the engine that the study names.

    Returns
    -------
    Report
        One row per method and client.

    Raises
    ------
    ValueError
        If the folder holds another run, or a part of the study cannot be used; nothing is written
        then.
    """
    with contextlib.ExitStack() as stack:
        if out is None:
            out = stack.enter_context(tempfile.TemporaryDirectory(prefix="fedl2p-"))
            resume = False
        # Everything that can be refused is refused here, before anything is written.
        job = stages.prepare(study, Path(out), resume=resume, listeners=listeners, clients=clients)
        stack.callback(job.close)
        stack.enter_context(job.folder.logging())
        # The global model, the same for all methods and frozen from here on.
        pretrained = stages.pretrain(job)
        learned, outcomes = [], []
        for method in job.methods:
            # A method learns from the seen clients, then personalizes every client, also unseen.
            model = job.initial if method.starts_from == "scratch" else pretrained.model
            learned.append(stages.learn(job, method, model, pretrained))
            outcomes.append(stages.personalize(job, method, model, learned[-1].state))
        report = stages.report(job, pretrained, learned, outcomes)
        report.save(job.folder.path)
    return report
