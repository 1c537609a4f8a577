"""Every stage, killed at every point of what it saves, goes on and ends with the bits of one that never was.

The processes are real, and so is SIGKILL: a proxy in front of S3 sends it when it sees the given request.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from components.foundation.exit_codes import PREEMPTED_EXIT_CODE
from components.foundation.run_context import open_run
from components.foundation.s3 import split_uri
from components.foundation.tracking import STAGE_TAG
from pipelines.local.services import Endpoints
from tests.faults.killing_proxy import KillingProxy, Trap, killing_proxy
from tests.stage_attempts import NEEDS, STAGES, TrainingRun

pytestmark = [pytest.mark.fault, pytest.mark.xdist_group("resume")]

BEFORE_SAVE, POINTER = "checkpoints/step-{}/MANIFEST.json", "checkpoints/LATEST"
POINTS = {
    "before the save": (Trap("HEAD", BEFORE_SAVE.format(2)), []),
    "in the middle of an object": (
        Trap("PUT", "checkpoints/step-2/state.safetensors", in_the_middle=True),
        ["step-2/state.json"],
    ),
    "before the manifest": (
        Trap("PUT", "checkpoints/step-2/MANIFEST.json"),
        ["step-2/state.json", "step-2/state.safetensors"],
    ),
    "before the pointer": (
        Trap("PUT", POINTER, occurrence=2),
        ["step-2/MANIFEST.json", "step-2/state.json", "step-2/state.safetensors"],
    ),
}
"""Where the second checkpoint is cut off, and what of it can be in the store then."""
COMMIT_POINTS = ("before the commit", "in the middle of an object", "before the manifest", "before the pointer")
"""Where a stage's result is cut off. A training stage has all but the last in its checkpoints already."""
COMMITS = [(stage, point) for stage in NEEDS for point in COMMIT_POINTS] + [(s, COMMIT_POINTS[-1]) for s in STAGES]
PLANTED = "sk-planted-for-a-judge"
FIRST = ["LATEST", "step-1/MANIFEST.json", "step-1/state.json", "step-1/state.safetensors"]


class Victim:
    """A run, and what each of its stages ends with when nobody disturbs it (made once a stage)."""

    def __init__(self, endpoints: Endpoints, folder: Path) -> None:
        planted = {"SAFERLHF_CACHE": str(folder), "SAFERLHF_JUDGE_KEY": PLANTED}
        self.run = TrainingRun({**endpoints.environment, **planted})
        self._s3_url = endpoints.s3_url
        self._folder = folder
        self._in_peace: dict[str, dict[str, str]] = {}
        self._commits: dict[str, str] = {}
        self._caches = 0

    def in_peace(self, stage: str) -> dict[str, str]:
        """Digests after an attempt that nobody disturbed; then the stage is forgotten."""
        self.run.bring_to(stage)
        if stage not in self._in_peace:
            assert self.run.attempt(stage) == 0
            self._in_peace[stage] = self.run.digests(stage)
            self._commits[stage] = str(self.run.committed(stage))
        self.run.forget(stage)
        return self._in_peace[stage]

    def commit_trap(self, stage: str, point: str) -> Trap:
        """At a point of the commit of a stage whose digests are known."""
        commit = split_uri(self._commits[stage])[1]
        return {
            "before the commit": Trap("HEAD", f"{commit}/MANIFEST.json"),
            "in the middle of an object": Trap("PUT", f"{commit}/{min(self._in_peace[stage])}", in_the_middle=True),
            "before the manifest": Trap("PUT", f"{commit}/MANIFEST.json"),
            "before the pointer": Trap("PUT", f"{commit.rpartition('/')[0]}/LATEST"),
        }[point]

    def finish(self) -> None:
        """Let all stages finish that have not."""
        self.run.bring_to(STAGES[-1])
        if self.run.committed(STAGES[-1]) is None:
            assert self.run.attempt(STAGES[-1]) == 0

    def attempt(self, stage: str, trap: Trap | None = None) -> tuple[int | None, KillingProxy]:
        """Exit code, and the proxy that saw all requests. The cache is a new one: what is read comes from S3."""
        self._caches += 1
        with killing_proxy(self._s3_url, trap) as proxy:
            environment = {"AWS_ENDPOINT_URL": proxy.url, "SAFERLHF_CACHE": str(self._folder / str(self._caches))}
            return self.run.attempt(stage, environment=environment, started=proxy.aim_at), proxy


@pytest.fixture(scope="module")
def victim(services: Endpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFERLHF_CACHE", str(folder))
        yield Victim(services, folder)


@pytest.mark.parametrize(("stage", "point"), [(stage, point) for stage in STAGES for point in POINTS])
def test_row_01_a_stage_killed_at_a_point_of_its_checkpoint_ends_bit_for_bit_the_same(
    victim: Victim, stage: str, point: str
) -> None:
    """The checkpoint before is what it goes on from; what was cut off is swept away before anything is trained."""
    expected = victim.in_peace(stage)
    trap, remains = POINTS[point]
    code, _ = victim.attempt(stage, trap)
    assert code == -signal.SIGKILL
    stored = set(victim.run.checkpoints(stage))
    assert stored.issuperset(FIRST)
    found = sorted(stored.difference(FIRST))
    if trap.in_the_middle:  # files travel beside each other: the rest may have arrived or not
        assert set(found) <= set(remains)
    else:
        assert found == remains
    code, proxy = victim.attempt(stage)
    assert code == 0
    assert any(r == "GET" and path.endswith("checkpoints/step-1/state.safetensors") for r, path in proxy.requests)
    deleted = [path.partition("/checkpoints/")[2] for method, path in proxy.requests if method == "DELETE"]
    assert sorted(deleted[: len(found)]) == found
    assert victim.run.digests(stage) == expected
    assert any(name.endswith(".safetensors") for name in expected)
    assert victim.run.checkpoints(stage) == []


@pytest.mark.parametrize(("stage", "point"), COMMITS)
def test_row_01_a_stage_killed_at_a_point_of_its_commit_makes_the_same_one_again(
    victim: Victim, stage: str, point: str
) -> None:
    """Without a pointer nobody takes what was cut off for a result; a manifest that stands is found to be its own."""
    expected = victim.in_peace(stage)
    code, _ = victim.attempt(stage, victim.commit_trap(stage, point))
    assert code == -signal.SIGKILL
    assert victim.run.committed(stage) is None
    assert victim.attempt(stage)[0] == 0
    assert victim.run.digests(stage) == expected
    assert victim.run.checkpoints(stage) == []


def test_row_05_ppo_interrupted_again_and_again_ends_with_the_same_weights_and_multiplier(victim: Victim) -> None:
    """Killed within its second and its third step, and asked to stop after: answers are drawn, and batches and lambda
    taken up, as if nothing had happened. The trace holds cost, reward, KL and lambda of every step."""
    stage = "ppo_lagrangian"
    expected = victim.in_peace(stage)
    for step in (2, 3):
        assert victim.attempt(stage, Trap("HEAD", BEFORE_SAVE.format(step)))[0] == -signal.SIGKILL
    assert victim.attempt(stage, Trap("HEAD", BEFORE_SAVE.format(3), number=signal.SIGTERM))[0] == PREEMPTED_EXIT_CODE
    assert victim.attempt(stage)[0] == 0
    assert victim.run.digests(stage) == expected
    assert "trace.json" in expected


def test_row_10_a_finished_stage_that_is_started_again_does_nothing_and_ends_well(
    victim: Victim, services: Endpoints
) -> None:
    victim.run.bring_to("reward_model")
    before = victim.run.committed("sft"), victim.run.digests("sft")
    runs_before = [run.info.run_id for run in stage_runs(victim, MlflowClient(services.tracking_uri), "sft")]
    code, proxy = victim.attempt("sft")
    assert code == 0
    assert {method for method, _ in proxy.requests} <= {"GET", "HEAD"}
    assert not [path for _, path in proxy.requests if path.endswith(".safetensors")]
    assert (victim.run.committed("sft"), victim.run.digests("sft")) == before
    assert runs_before == [run.info.run_id for run in stage_runs(victim, MlflowClient(services.tracking_uri), "sft")]


def test_row_11_a_stage_that_is_asked_to_stop_saves_its_state_and_goes_on_at_the_retry(victim: Victim) -> None:
    """SIGTERM while the second checkpoint is written: the third step ends, is saved too, and the retry starts there."""
    expected = victim.in_peace("sft")
    code, _ = victim.attempt("sft", Trap("HEAD", BEFORE_SAVE.format(2), number=signal.SIGTERM))
    assert code == PREEMPTED_EXIT_CODE
    assert "step-3/MANIFEST.json" in victim.run.checkpoints("sft")
    code, proxy = victim.attempt("sft")
    assert code == 0
    assert any(path.endswith("checkpoints/step-3/state.safetensors") for _, path in proxy.requests)
    assert victim.run.digests("sft") == expected


def stage_runs(victim: Victim, client: MlflowClient, stage: str) -> list[Run]:
    """MLflow's runs of a stage, the newest first."""
    parent = open_run(victim.run.uri).mlflow_run_id
    condition = f"tags.`mlflow.parentRunId` = '{parent}' and tags.`{STAGE_TAG}` = '{stage}'"
    return list(client.search_runs([client.get_run(parent).info.experiment_id], condition))


def test_row_14_an_mlflow_run_left_running_by_a_killed_process_is_gone_on_with(
    victim: Victim, services: Endpoints
) -> None:
    client = MlflowClient(services.tracking_uri)

    def statuses() -> dict[str, str]:
        return {run.info.run_id: run.info.status for run in stage_runs(victim, client, "reward_model")}

    victim.in_peace("reward_model")
    before = statuses()
    assert victim.attempt("reward_model", POINTS["before the manifest"][0])[0] == -signal.SIGKILL
    (left,) = statuses().keys() - before.keys()
    assert statuses()[left] == "RUNNING"
    assert victim.attempt("reward_model")[0] == 0
    assert statuses() == before | {left: "FINISHED"}
    steps = [point.step for point in client.get_metric_history(left, "reward_model/loss")]
    assert steps == sorted(set(steps)) and steps[-1] > 2


def test_row_29_what_was_cut_is_counted_in_mlflow(victim: Victim, services: Endpoints) -> None:
    """Profile tiny leaves room for few tokens: every stage cuts some of the shipped texts."""
    client = MlflowClient(services.tracking_uri)
    victim.finish()
    for stage in STAGES[:3]:  # an attempt may have been killed before it counted
        counts = [run.data.params.get("truncated") for run in stage_runs(victim, client, stage)]
        assert {int(count) > 0 for count in counts if count} == {True}, stage
    runs = [run.data.metrics for run in stage_runs(victim, client, STAGES[3])]
    metrics = next(metrics for metrics in runs if "rollout/ended_share" in metrics)
    assert metrics["rollout/truncated_prompts"] > 0
    assert 0 <= metrics["rollout/ended_share"] <= 1


def test_row_33_keys_of_the_environment_stand_in_no_object_and_in_no_mlflow_run(
    victim: Victim, services: Endpoints, s3: Any
) -> None:
    """The key of the store, which every stage used, and one for a judge, which was planted."""
    victim.finish()
    secrets = (services.environment["AWS_SECRET_ACCESS_KEY"], PLANTED)
    bucket, prefix = split_uri(victim.run.uri)
    client = MlflowClient(services.tracking_uri)
    parent = open_run(victim.run.uri).mlflow_run_id
    texts = [
        json.dumps(run.to_dictionary(), default=str) for stage in STAGES for run in stage_runs(victim, client, stage)
    ]
    texts.append(json.dumps(client.get_run(parent).to_dictionary(), default=str))
    keys = [entry["Key"] for entry in s3.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]]
    assert len(keys) > 20
    contents = [s3.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys]
    for secret in secrets:
        assert not [text for text in texts if secret in text]
        assert not [key for key, content in zip(keys, contents, strict=True) if secret.encode() in content]
