"""Exit codes of a stage's process that say more than "failed"."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from components.foundation.errors import LabelsAwaited

PREEMPTED_EXIT_CODE = 75
"""EX_TEMPFAIL: the stage was asked to stop, has saved its state, and goes on when it is started again."""

WAITING_EXIT_CODE = 75
"""EX_TEMPFAIL too, of a step and of `saferlhf run`: people's labels are missing, and it can be started again then."""

WAITING_LINE = "waiting for labels: "
"""Start of the line that such a step prints."""


@contextlib.contextmanager
def ends_when_labels_are_awaited() -> Iterator[None]:
    """Around a step: where labels are awaited it ends with a line and an exit code, and no traceback.

    A step that ends so stops what depends on it, in every runner; a step that ended well would let it run.
    """
    try:
        yield
    except LabelsAwaited as waiting:
        print(waiting, flush=True)
        raise SystemExit(WAITING_EXIT_CODE) from None
