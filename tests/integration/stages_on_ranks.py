"""Stages as `launch` and torchrun call them, with something that happens to one of their ranks."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pytest

from components.foundation import distributed
from components.foundation.launch import _function, run_rank
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


if __name__ == "__main__":  # each rank is asked for other inputs
    run_rank(sys.argv[1], [*json.loads(sys.argv[2]), f"s3://data/of-rank-{os.environ['RANK']}"])
