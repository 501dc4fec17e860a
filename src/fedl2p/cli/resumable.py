"""Long commands: how to go on after an interruption."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

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
