"""Exit codes of a stage's process that say more than "failed"."""

from __future__ import annotations

PREEMPTED_EXIT_CODE = 75
"""EX_TEMPFAIL: the stage was asked to stop, has saved its state, and goes on when it is started again."""
