"""Training on two ranks, started by torchrun with gloo on the CPU, against training on one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import DivergenceError, TrainingError
from components.foundation.launch import launch
from components.foundation.results import PpoTrace, read_record
from components.foundation.run_context import RunContext, open_run
from components.foundation.tracking import STAGE_TAG
from components.foundation.training_checkpoints import PREEMPTED_EXIT_CODE
from components.prepare_data.prepare_data import run_prepare_data
from components.prepare_data.start_run import run_start_run
from pipelines.local.services import Endpoints
from tests.integration.training_on_ranks import KINDS, Results

pytestmark = pytest.mark.xdist_group("distributed")

# Each ZeRO stage with adapters and with full copies; each training with both. More buys little: what reward model and
# cost model share is nearly all. ZeRO-3 comes last: with it DeepSpeed puts a linear map of its own into torch, for the
# rest of the process.
CASES = [
    ("ppo", "lora", 0),
    ("sft", "full", 0),
    ("sft", "lora", 1),
    ("reward_model", "lora", 1),
    ("ppo", "lora", 1),
    ("optimizer_state", "lora", 1),
    ("cost_model", "full", 1),
    ("cost_model", "lora", 2),
    ("ppo", "lora", 2),
    ("prepared", "lora", 2),
    ("optimizer_state", "full", 2),
    ("ppo", "full", 2),
    ("sft", "lora", 3),
    ("sft_layers_again", "lora", 3),
    ("cost_model", "lora", 3),
    ("ppo_heads", "lora", 3),
    ("generation", "lora", 3),
    ("prepared", "lora", 3),
    ("sft", "full", 3),
    ("sft_layers_again", "full", 3),
    ("optimizer_state", "full", 3),
    ("reward_model", "full", 3),
    ("ppo", "full", 3),
    ("generation", "full", 3),
]
SFT, REWARD, COST = (f"components.{name}.{name}:run_{name}" for name in ("sft", "reward_model", "cost_model"))
PPO = "components.ppo_lagrangian.ppo_lagrangian:run_from_uris"
STRUCK = "tests.integration.stages_on_ranks:struck"


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what all cases gave on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    cases = ["-m", "tests.integration.training_on_ranks", str(folder), json.dumps(CASES)]
    done = subprocess.run([*torchrun, *cases], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@cache
def on_one_rank(kind: str, finetune: str) -> Results:
    return KINDS[kind](finetune)


@pytest.mark.parametrize(("kind", "finetune", "stage"), CASES)
def test_two_ranks_train_what_one_trains(on_two_ranks: Path, kind: str, finetune: str, stage: int) -> None:
    """What every step reports to 0.1 %, weights to 1e-4 (Adam divides small gradients by their own size)."""
    steps, weights = on_one_rank(kind, finetune)
    first, second = (
        json.loads((on_two_ranks / f"{kind}-{finetune}-{stage}-{rank}.json").read_text()) for rank in range(2)
    )
    assert first == second  # lambda among it, to the last bit
    for found, expected in zip(first, steps, strict=True):
        assert {**found, "gathers": 0} == pytest.approx({**expected, "gathers": 0}, rel=1e-3, abs=1e-5)
    found = load_file(on_two_ranks / f"{kind}-{finetune}-{stage}.safetensors")
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_partitioned_weights_are_gathered_once_a_rollout_not_once_a_token(on_two_ranks: Path, finetune: str) -> None:
    short, long = json.loads((on_two_ranks / f"generation-{finetune}-3-0.json").read_text())
    assert len(long) > len(short)  # more tokens
    assert short["gathers"] == long["gathers"] > 0


@pytest.mark.fault
@pytest.mark.parametrize("what", ["stage", "inputs", "settings"])
def test_ranks_that_were_started_with_different_things_are_refused(on_two_ranks: Path, what: str) -> None:
    first, second = (json.loads((on_two_ranks / f"refusals-{rank}.json").read_text())[what] for rank in range(2))
    assert first == second
    assert first.startswith(f"the ranks of this stage were started with different {what} (digests: rank 0: ")


class Runs:
    """Two runs with the same seed: one on one rank, in peace; the other on several, with interruptions."""

    def __init__(self) -> None:
        self._root = f"s3://saferlhf-test/{uuid.uuid4().hex}"
        self.peaceful, self.other = (self.start(name) for name in ("one-rank", "several-ranks"))
        self.data = run_prepare_data(self.peaceful)
        self.sft = launch(SFT, self.peaceful, self.data)

    def start(self, name: str, *more: str, **distributed: int) -> str:
        """Start a run, or go on with it on another number of ranks."""
        chosen = [*more, *(f"distributed.{key}={value}" for key, value in distributed.items())]
        settings = [f"store.uri={self._root}", "sft.batch_size=8", "reward_model.batch_size=8"]
        settings += [
            "ppo.steps=3",
            "ppo.ptx_coefficient=0.5",
            "ppo.ptx_demonstrations=safe",
            "ppo.average_steps=2",
            "checkpoint.every_steps=1",
        ]
        return run_start_run(
            f"{self._root}/runs/{name}",
            name,
            "tiny",
            0,
            json.dumps([*settings, *chosen]),
            1,
        )

    def stopped(self, stage: str, step: int, rank: int, *arguments: str | int) -> None:
        """Let one rank of the other run get SIGTERM: all of them save the same step and end."""
        with pytest.raises(SystemExit) as end:
            launch(STRUCK, self.other, step, rank, int(signal.SIGTERM), stage, *arguments)
        assert end.value.code == PREEMPTED_EXIT_CODE

    def saved_step(self, stage: str) -> str:
        """Step of the newest checkpoint, every file of which has the digest in its manifest."""
        latest = self.context.store.latest(f"{self.context.stage_uri(*_placed(stage))}/checkpoints")
        assert latest is not None
        self.context.store.fetch(latest)
        return latest.rpartition("-")[2]

    @property
    def context(self) -> RunContext:
        return open_run(self.other)

    def commits(self, run: str, stage: str) -> set[str]:
        context = open_run(run)
        uri = context.stage_uri(*_placed(stage))
        return {found.removeprefix(f"{uri}/").partition("/")[0] for found in context.store._s3.list(f"{uri}/")}

    def mlflow_steps(self, run: str, stage: str, metric: str) -> list[int]:
        """Steps of a metric that the stage's only MLflow run holds."""
        context = open_run(run)
        client: Any = context.tracker._client
        parent = client.get_run(context.mlflow_run_id)
        found = client.search_runs(
            [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{context.mlflow_run_id}'"
        )
        (of_stage,) = [nested for nested in found if nested.data.tags[STAGE_TAG] == stage]
        return [entry.step for entry in client.get_metric_history(of_stage.info.run_id, metric)]


def _placed(stage: str) -> tuple[str, int]:
    return stage, 0 if stage == "sft" else 1


@pytest.fixture(scope="module")
def runs(services: Endpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFERLHF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Runs()


@pytest.mark.fault
def test_an_error_that_one_rank_can_explain_is_the_error_of_the_stage(runs: Runs) -> None:
    run = runs.start("diverges", processes=2)
    with pytest.raises(DivergenceError, match=r"^step 3: the actor's loss is nan$"):
        launch("tests.integration.stages_on_ranks:diverged", run, 1)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("stage", "number", "end", "said", "saved"),
    [
        (SFT, signal.SIGKILL, TrainingError, r"a rank of .* died", "3"),  # the last whole one
        (REWARD, signal.SIGTERM, SystemExit, str(PREEMPTED_EXIT_CODE), "4"),
    ],
    ids=["sft", "reward_model"],
)
def test_row_07_a_stage_goes_on_with_two_ranks_and_again_with_one(
    runs: Runs, stage: str, number: int, end: type[BaseException], said: str, saved: str
) -> None:
    name, inputs = ("sft", (runs.data,)) if stage == SFT else ("reward_model", (1, runs.sft, runs.data))
    expected = runs.sft if stage == SFT else launch(stage, runs.peaceful, *inputs)
    runs.stopped(stage, 2, 0, *inputs)
    assert runs.saved_step(name) == "2"
    runs.start("several-ranks", processes=2)
    with pytest.raises(end, match=said):
        launch(STRUCK, runs.other, 4, 1, int(number), stage, *inputs)
    assert runs.saved_step(name) == saved
    assert runs.commits(runs.other, name) == {"checkpoints"}
    runs.start("several-ranks", processes=1)
    uri = launch(stage, runs.other, *inputs)
    assert runs.commits(runs.other, name) == {"LATEST", uri.rpartition("/")[2]}
    steps, expected_steps = (runs.mlflow_steps(run, name, f"{name}/loss") for run in (runs.other, runs.peaceful))
    assert sorted(set(steps)) == expected_steps
    assert max(expected_steps) > 5
    same_models(runs.context.store, expected, uri)


def test_a_whole_stage_on_two_ranks_is_committed_and_logged_once(runs: Runs) -> None:
    """With ZeRO-3 and full copies, no rank ever holds the model that it exports."""
    alone = runs.start("full-alone", "finetune=full", "sft.learning_rate=1e-4")
    together = runs.start("full-together", "finetune=full", "sft.learning_rate=1e-4", processes=2, zero_stage=3)
    expected, uri = (launch(SFT, run, runs.data) for run in (alone, together))
    assert runs.commits(together, "sft") == {"LATEST", "step-6"}
    assert runs.mlflow_steps(together, "sft", "sft/loss") == [1, 2, 3, 4, 5, 6]
    same_models(runs.context.store, expected, uri)


def same_models(store: CheckpointStore, expected: str, found: str) -> None:
    """Of each, the only file of weights."""
    (first,), (second,) = (map(load_file, store.fetch(uri).glob("*.safetensors")) for uri in (expected, found))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.fault
def test_row_07_ppo_with_zero_3_stops_on_two_ranks_and_ends_on_one(runs: Runs) -> None:
    models = [launch(stage, runs.peaceful, 1, runs.sft, runs.data) for stage in (REWARD, COST)]
    inputs = (1, runs.data, runs.sft, runs.sft, *models)
    expected = launch(PPO, runs.peaceful, *inputs)
    runs.start("several-ranks", processes=2, zero_stage=3)
    runs.stopped(PPO, 2, 1, *inputs)
    assert runs.saved_step("ppo_lagrangian") == "2"
    runs.start("several-ranks", processes=1)
    store = runs.context.store
    first, second = (store.fetch(uri) for uri in (expected, launch(PPO, runs.other, *inputs)))
    traces = [read_record(PpoTrace, folder / "trace.json") for folder in (first, second)]
    assert traces[1].cost == pytest.approx(traces[0].cost, rel=1e-3, abs=1e-4)
    assert traces[1].multiplier == pytest.approx(traces[0].multiplier, rel=1e-4)
    for name, tensor in load_file(first / "model" / "model.safetensors").items():
        torch.testing.assert_close(
            load_file(second / "model" / "model.safetensors")[name], tensor, rtol=1e-3, atol=1e-3
        )
