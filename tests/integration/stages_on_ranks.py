"""Stages as `launch` calls them, with something that happens to one of their ranks."""

from __future__ import annotations

import os
from typing import Any

import pytest

from components.foundation import distributed
from components.foundation.launch import _function
from components.foundation.training_checkpoints import TrainingCheckpoints


def struck(run_uri: str, step: int, rank: int, number: int, stage: str, *arguments: str | int) -> str:
    """A stage of which one rank sends itself a signal when a step is done, before the checkpoint."""
    original = TrainingCheckpoints.after_step

    def after_step(self: TrainingCheckpoints, done: int, *args: Any) -> None:
        if (done, distributed.world().rank) == (step, rank):
            os.kill(os.getpid(), number)
        original(self, done, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingCheckpoints, "after_step", after_step)
        return _function(stage)(run_uri, *arguments)
