"""Exit codes of a stage's process that say more than "failed"."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

from components.foundation.errors import LabelsAwaited, OutOfMemoryError

PREEMPTED_EXIT_CODE = 75
"""EX_TEMPFAIL: the stage was asked to stop, has saved its state, and goes on when it is started again."""

WAITING_EXIT_CODE = 75
"""EX_TEMPFAIL too, of a step and of `saferlhf run`: people's labels are missing, and it can be started again then."""

WAITING_LINE = "waiting for labels: "
"""Start of the line that such a step prints."""

NOTHING_NEW_EXIT_CODE = 3
"""Of `saferlhf run`: there is too little new data to train on. Not 1: nothing failed."""

OUT_OF_MEMORY_EXIT_CODE = 71
"""EX_OSERR: a stage that holds a model needs more memory than there is, and would again."""

NOTHING_NEW = "nothing new"
"""What a step returns instead of its data's URI where there is too little new data. The pipeline skips all that would
follow, in every runner, for this word alone: a step that failed would have stopped it too, but the run would count as
failed."""

NOTHING_NEW_LINE = f"{NOTHING_NEW}: "
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


@contextlib.contextmanager
def ends_when_memory_is_out() -> Iterator[None]:
    """Around a stage that holds a model: where its memory did not suffice it ends with an exit code of its own.

    The error is printed as Python would: who runs the step looks for it there.
    """
    try:
        yield
    except OutOfMemoryError:
        traceback.print_exc()
        raise SystemExit(OUT_OF_MEMORY_EXIT_CODE) from None
