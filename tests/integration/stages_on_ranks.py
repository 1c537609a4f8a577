"""Stages as `launch` calls them, with something that happens to one of their ranks."""

from __future__ import annotations

import os
from typing import Any

import pytest

from components.foundation import distributed
from components.foundation.errors import DivergenceError
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


def diverged(run_uri: str, rank: int) -> str:
    """A stage that one rank ends with an error that it can explain, while the others wait for it."""
    if distributed.world().rank == rank:
        raise DivergenceError("step 3: the actor's loss is nan")
    distributed.barrier()
    return "s3://nothing"
