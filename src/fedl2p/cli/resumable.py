"""Long commands: progress for a person who looks, and how to go on after an interruption."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedl2p.federation.listeners import Listener
    from fedl2p.study.settings import Study

WRONG_PATH = {
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EACCES, errno.EPERM),
    *(errno.ELOOP, errno.EINVAL, errno.EEXIST),
}
"""System errors that mean a wrong path; others, e.g. a full disk, are not the user's mistake."""


def resumable(work: Callable[[], None], *, again: str) -> int:
    """Do the work and return the exit status; where it stops, print the command that resumes it."""
    from fedl2p.federation.messages import FederationError

    try:
        work()
    except KeyboardInterrupt:
        sys.stderr.write(f"\nfedl2p: interrupted; go on with: {again}\n")
        return 130
    except (FederationError, OSError) as problem:
        if isinstance(problem, OSError) and problem.errno in WRONG_PATH:
            raise
        sys.stderr.write(f"fedl2p: error: {problem}; go on with: {again}\n")
        return 1
    return 0


@contextlib.contextmanager
def progress_bar(study: Study) -> Iterator[list[Listener]]:
    """Yield a progress bar as the only listener if stderr is a terminal, else no listener."""
    from fedl2p.federation.listeners import ProgressListener
    from fedl2p.study.preparation import count_stages

    if not sys.stderr.isatty():
        yield []
        return
    with ProgressListener(stages=count_stages(study)) as bar:
        yield [bar]
