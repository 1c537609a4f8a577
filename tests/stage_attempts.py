"""Attempts at a stage, each in a process of its own that may be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import uuid
from collections.abc import Callable, Mapping

from components.foundation.run_context import finished_uri, open_run

STAGES = ("sft", "reward_model", "cost_model", "ppo_lagrangian")
"""Those that train, each in need of those before it."""
NEEDS: dict[str, tuple[str, ...]] = {
    "prepare_data": (),
    "collect": ("sft",),
    "annotate": ("sft", "collect"),
    "evaluate": ("sft",),
}
"""The others, and what each needs beside the data."""
SETTINGS = (
    "ppo.steps=4",
    "ppo.critics=head",
    "ppo.ptx_coefficient=0.5",
    "ppo.ptx_demonstrations=safe",
    "checkpoint.every_steps=1",
)

# Without threads there is nothing that a fork could break; the modules are imported once, for all attempts.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    [
        *(f"components.{stage}.{stage}" for stage in (*STAGES, *NEEDS)),
        "components.foundation.tracking",
        "mlflow",
        "peft",
    ]
)


class TrainingRun:
    """A run of profile tiny whose data are prepared, and which saves its state after every training step.

    Attributes:
        uri: of the run.
    """

    def __init__(self, environment: Mapping[str, str], *settings: str) -> None:
        """`settings` count beside SETTINGS, and before them."""
        from components.prepare_data.prepare_data import run_prepare_data
        from components.prepare_data.start_run import run_start_run

        self._environment = dict(environment)
        run_id = uuid.uuid4().hex  # MLflow knows a run by it
        root = f"s3://saferlhf-test/{run_id}"
        overrides = json.dumps([f"store.uri={root}", *SETTINGS, *settings])
        self.uri = run_start_run(f"{root}/runs/{run_id}", run_id, "tiny", 0, overrides, 1)
        run_prepare_data(self.uri)

    def attempt(
        self,
        stage: str,
        round_number: int = 1,
        *,
        environment: Mapping[str, str] | None = None,
        started: Callable[[int], None] = lambda pid: None,
    ) -> int | None:
        """Exit code of one attempt; minus the signal's number where it was killed.

        Args:
            environment: beside that of the run, for this attempt alone.
            started: is given the id of the process.
        """
        variables = self._environment | dict(environment or {})
        process = _PROCESSES.Process(target=_attempt, args=(self.uri, stage, variables, round_number))
        process.start()
        assert process.pid is not None
        started(process.pid)
        process.join()
        return process.exitcode

    def bring_to(self, stage: str) -> None:
        """Let what comes before a stage finish in peace."""
        for earlier in NEEDS[stage] if stage in NEEDS else STAGES[: STAGES.index(stage)]:
            if self.committed(earlier) is None:
                assert self.attempt(earlier) == 0

    def committed(self, stage: str) -> str | None:
        """URI of what a stage committed."""
        return open_run(self.uri).store.latest(self.stage_uri(stage))

    def digests(self, stage: str) -> dict[str, str]:
        """SHA-256 of each file that a stage committed."""
        uri = self.committed(stage)
        assert uri is not None
        return {file.path: file.sha256 for file in open_run(self.uri).store.manifest(uri).files}

    def checkpoints(self, stage: str) -> list[str]:
        """Names of the objects that a stage keeps while it trains."""
        uri = f"{self.stage_uri(stage)}/checkpoints/"
        return [found.removeprefix(uri) for found in open_run(self.uri).store.list(uri)]

    def forget(self, stage: str) -> None:
        """Delete all that a stage left, as if it had never been started."""
        open_run(self.uri).store.prune(self.stage_uri(stage), keep=None)

    def stage_uri(self, stage: str) -> str:
        return open_run(self.uri).stage_uri(stage, round_of(stage))


def round_of(stage: str) -> int:
    return 0 if stage in {"prepare_data", "sft", "evaluate"} else 1


def _attempt(run_uri: str, stage: str, environment: Mapping[str, str], round_number: int) -> None:
    """A later round's models need nothing but those before them."""
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    from components.annotate.annotate import run_annotate
    from components.collect.collect import run_collect
    from components.cost_model.cost_model import run_cost_model
    from components.evaluate.evaluate import EvaluationInputs, run_evaluate
    from components.ppo_lagrangian.ppo_lagrangian import PpoInputs, run_ppo_lagrangian
    from components.prepare_data.prepare_data import run_prepare_data
    from components.reward_model.reward_model import run_reward_model
    from components.sft.sft import run_sft

    context = open_run(run_uri)
    if stage == "prepare_data":
        run_prepare_data(run_uri)
        return
    data = finished_uri(context, "prepare_data", 0)
    if stage == "sft":
        run_sft(run_uri, data)
        return
    sft = finished_uri(context, "sft", 0)
    if stage == "reward_model":
        run_reward_model(run_uri, round_number, sft, data)
    elif stage == "cost_model":
        run_cost_model(run_uri, round_number, sft, data)
    elif stage == "collect":
        run_collect(run_uri, 1, data, sft, sft, data)
    elif stage == "annotate":
        run_annotate(run_uri, 1, finished_uri(context, "collect", 1), data)
    elif stage == "evaluate":
        run_evaluate(run_uri, 0, EvaluationInputs(data, sft, sft))
    else:
        models = (finished_uri(context, name, 1) for name in ("reward_model", "cost_model"))
        run_ppo_lagrangian(run_uri, 1, PpoInputs(data, sft, sft, *models))
