"""run_study: pre-train a global model, learn every method, personalize every client, report."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fedl2p.federation.listeners import Listener, progress_bar
from fedl2p.federation.messages import Clients
from fedl2p.runs.results import Report
from fedl2p.study import stages
from fedl2p.study.preparation import count_stages, prepare
from fedl2p.study.settings import Study


def run_study(
    study: Study,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
    listeners: Sequence[Listener] = (),
    clients: Clients | None = None,
) -> Report:
    """Run a study: pre-train a global model, learn every method, personalize every client.

    Parameters
    ----------
    study
        What to do.
    out
        Folder for the results and checkpoints; None to keep nothing.
    resume
        Go on with the run in ``out`` after the last round or method that it finished; start it if
        there is none.
    progress
        Whether to show a progress bar, see :func:`fedl2p.federation.listeners.progress_bar`.
    listeners
        Called after every round.
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
        bar = stack.enter_context(progress_bar(progress, stages=count_stages(study)))
        listeners = [*bar, *listeners]
        # Everything that can be refused is refused here, before anything is written.
        run = prepare(study, Path(out), resume=resume, listeners=listeners, clients=clients)
        stack.callback(run.close)
        stack.enter_context(run.folder.running(study, run.info))
        # The global model, the same for all methods and frozen from here on.
        pretrained = stages.pretrain(run)
        learned, personalized = [], []
        for method in run.methods:
            # A method learns from the seen clients, then personalizes every client, also unseen.
            model = run.initial if method.starts_from == "scratch" else pretrained.model
            learned.append(stages.learn(run, method, model, pretrained))
            personalized.append(stages.personalize(run, method, model, learned[-1].state))
        report = stages.report(run, pretrained, learned, personalized)
        report.save(run.folder.path)
    return report
