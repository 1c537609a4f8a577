"""torchrun that keeps the meaning of exit code 75.

    python -m components.foundation.torchrun <what torchrun takes>

torchrun itself ends with 1 whatever its ranks end with, and also when it gets SIGTERM. Who started it could then not
tell a node that was taken away, with the state saved, from a bug.

When torchrun gets SIGTERM it passes it on to its ranks, and kills those that have not ended in time. A checkpoint of a
large model takes longer than its 30 s, so here it waits; how long a pod may take to end is for Kubernetes to say
(`terminationGracePeriodSeconds`).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from components.foundation.exit_codes import PREEMPTED_EXIT_CODE

_PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Environment variable: seconds that torchrun gives its ranks to end after SIGTERM."""


def main(arguments: Sequence[str]) -> None:
    """Start the ranks, wait for them, and raise SystemExit(75) where they were asked to stop.

    The first rank that ended badly decides: once it has, torchrun stops the others with SIGTERM, and they may well end
    with 75 too.

    Raises:
        SystemExit: ranks saved their state and ended because they, or torchrun, got SIGTERM.
        ChildFailedError: a rank failed.
    """
    os.environ.setdefault(_PATIENCE, "3600")
    try:
        run.main(list(arguments))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode == PREEMPTED_EXIT_CODE:
            raise SystemExit(PREEMPTED_EXIT_CODE) from error
        raise
    except SignalException as stop:
        if stop.sigval == signal.SIGTERM:
            raise SystemExit(PREEMPTED_EXIT_CODE) from stop
        raise


if __name__ == "__main__":
    main(sys.argv[1:])
