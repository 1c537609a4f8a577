"""`saferlhf submit` with KFP's own client, against a server on the loopback interface that speaks its REST API."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from components.foundation.errors import ClusterError
from components.foundation.settings import resolve_settings
from components.prepare_data.prepare_data import BUILTIN_FOLDER
from pipelines.kubeflow.client import Access, connect
from pipelines.kubeflow.submit import data_digest, run_name
from pipelines.kubeflow.versions import upload_pipeline
from pipelines.kubeflow.watch import PATIENCE, watch
from tests.unit.kfp_server import KfpServer
from tests.unit.kfp_state import task
from tests.unit.kubeflow_command import saferlhf

SHIPPED = Path("pipelines/platforms/local.yaml")


@pytest.fixture
def run_id(kfp: KfpServer) -> str:
    """Of a run that the server has, to be watched."""
    kfp.experiments.append({"experiment_id": "e"})
    return str(kfp.answer("POST /runs", {}, json.dumps({"experiment_id": "e"}))["run_id"])


def watched(kfp: KfpServer, run_id: str) -> tuple[str, list[str]]:
    """(state at the end, the lines) of a run, without pauses."""
    lines: list[str] = []
    return watch(connect(Access(kfp.url)), run_id, lines.append, lambda: None), lines


def test_a_compiled_file_becomes_a_run_of_its_experiment(
    kfp: KfpServer, compiled_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFERLHF_GIT_SHA", "5f2c9a1e77b0")
    choice = ["--profile", "tiny", "--seed", "7", "--set", "ppo.steps=2", "--service-account", "saferlhf"]
    status, said = saferlhf("submit", str(compiled_pipeline), *choice, "--experiment", "trial")
    assert status == 0, said
    (run,), (experiment,) = kfp.runs, kfp.experiments
    assert said.splitlines() == [
        f"run {run['run_id']}: {run['display_name']}",
        f"{kfp.url}/#/runs/details/{run['run_id']}",
    ]
    assert run["display_name"].startswith("tiny-1-round-data-")
    assert "-git-5f2c9a1e-" in run["display_name"]
    assert (experiment["display_name"], run["experiment_id"]) == ("trial", experiment["experiment_id"])
    assert run["service_account"] == "saferlhf"
    assert run["pipeline_spec"]["pipeline_spec"]["pipelineInfo"]["name"] == "safe-rlhf"
    assert run["runtime_config"]["parameters"] == {
        "run_profile": "tiny",
        "run_seed": 7,
        "run_set": '["ppo.steps=2"]',
    }


def test_an_uploaded_version_is_run_by_reference(kfp: KfpServer, compiled_pipeline: Path) -> None:
    made = upload_pipeline(connect(Access(kfp.url)), compiled_pipeline, "v")
    assert saferlhf("submit", "--version", made.name)[0] == 0
    reference = {"pipeline_id": made.pipeline_id, "pipeline_version_id": made.version_id}
    assert kfp.runs[0]["pipeline_version_reference"] == reference
    assert kfp.runs[0]["runtime_config"]["parameters"]["run_set"] == "[]"


def test_a_platform_is_compiled_with_its_own_settings_and_account(
    kfp: KfpServer, tmp_path: Path, shallow: Callable[..., tuple[int, str]]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(SHIPPED.read_text().replace("registry.example.com", "registry.mine.org"))
    status, said = shallow(saferlhf, "submit", "--platform", str(file), "--rounds", "2", "--set", "ppo.steps=2")
    assert status == 0, said
    (run,) = kfp.runs
    assert run["service_account"] == "saferlhf"
    assert "platform_spec" in run["pipeline_spec"]
    assert run["display_name"].startswith("smol-2-rounds-")
    assert json.loads(run["runtime_config"]["parameters"]["run_set"]) == ["dtype=float32", "ppo.steps=2", "rounds=2"]


def test_a_run_that_stopped_goes_on_by_its_id(kfp: KfpServer, compiled_pipeline: Path) -> None:
    assert saferlhf("submit", str(compiled_pipeline), "--resume", "0b5c-7")[0] == 0
    assert kfp.runs[0]["runtime_config"]["parameters"]["run_id"] == "0b5c-7"


def test_a_run_starts_at_a_round_of_an_earlier_one(kfp: KfpServer, compiled_pipeline: Path) -> None:
    assert saferlhf("submit", str(compiled_pipeline), "--from-run", "0b5c-7", "--from-round", "1")[0] == 0
    sent = json.loads(kfp.runs[0]["runtime_config"]["parameters"]["run_set"])
    assert sent == ['start.from_run="0b5c-7"', "start.from_round=1"]


def test_the_link_is_of_the_ui_where_that_is_elsewhere(
    kfp: KfpServer, compiled_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KF_PIPELINES_UI_ENDPOINT", "https://kubeflow.example.com/pipeline/")
    said = saferlhf("submit", str(compiled_pipeline))[1]
    assert f"https://kubeflow.example.com/pipeline/#/runs/details/{kfp.runs[0]['run_id']}" in said


@pytest.mark.fault
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["FILE", "--set", "ppo.stepz=1"], "unknown setting 'ppo.stepz'"),
        (["FILE", "--set", "ppo.steps=-1"], "ppo.steps=-1 is refused"),
        (["FILE", "--set", "data.prompts=mine/prompts.jsonl"], "data.prompts=mine/prompts.jsonl is a file of this"),
        (["FILE", "--set", "gate.regressions=mine.jsonl"], "gate.regressions=mine.jsonl is a file of this"),
        (["FILE", "--set", "data.prompts=FILE"], "data.prompts=FILE is a file of this machine"),
        (["FILE", "--set", "base_model=./mine"], "base_model=./mine is a folder of this machine"),
        (["FILE", "--set", "base_model=/usr"], "base_model=/usr is a folder of this machine"),
        (
            ["FILE", "--set", "base_model=tests/unit"],
            "put it into the store with `saferlhf models push tests/unit s3://",
        ),
        (["FILE", "--profile", "huge"], "unknown profile 'huge'"),
        (["FILE", "--rounds", "3"], "rounds=3 is asked of FILE, which was compiled with 1: compile it anew"),
        (["FILE", "--version", "latest"], "say what to run: a compiled YAML, or --version"),
        ([], "say what to run"),
        (["--platform", "gke"], "platform gke has example images"),
        ([str(SHIPPED)], f"{SHIPPED} is no compiled pipeline of ours"),
        (["none.yaml"], "none.yaml cannot be read"),
        (["--version", "latest", "--set", "seed"], "write key=value"),
        (["FILE", "--resume", "Mine"], "run_id='Mine' is refused"),
        (["FILE", "--from-run", "0b5c-7"], "from_run and from_round go together"),
        (["FILE", "--from-run", "0b5c-7", "--from-round", "2"], "from_round=2 is past the last round"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_sent(
    kfp: KfpServer, compiled_pipeline: Path, arguments: list[str], sentence: str
) -> None:
    status, said = saferlhf("submit", *[text.replace("FILE", str(compiled_pipeline)) for text in arguments])
    assert status == 1
    assert sentence.replace("FILE", str(compiled_pipeline)) in said
    assert kfp.calls == []


def test_a_path_that_the_pods_may_have_is_left_to_them(
    kfp: KfpServer, compiled_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is not here; from within a pod, as a notebook's, also one that is there on a volume."""
    elsewhere = ("--set", "data.prompts=/volume/prompts.jsonl", "--set", "base_model=/volume/model")
    assert saferlhf("submit", str(compiled_pipeline), *elsewhere)[0] == 0
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert saferlhf("submit", str(compiled_pipeline), "--set", f"data.prompts={compiled_pipeline}")[0] == 0
    assert len(kfp.runs) == 2


@pytest.mark.fault
@pytest.mark.parametrize("arguments", [["submit", "{folder}/p.yaml"], ["schedule", "apply", "-f", "{folder}/s.yaml"]])
def test_a_folder_of_this_machine_in_the_settings_of_the_pipeline_is_refused(
    kfp: KfpServer, compiled_pipeline: Path, tmp_path: Path, arguments: list[str]
) -> None:
    """They come from the platform file that it was compiled for."""
    none, one = "run_set:\n        defaultValue: '[]'", "run_set:\n        defaultValue: '[\"base_model=./mine\"]'"
    file = tmp_path / "p.yaml"
    file.write_text(compiled_pipeline.read_text().replace(none, one))
    upload_pipeline(connect(Access(kfp.url)), file, "v")
    kfp.calls.clear()
    (tmp_path / "s.yaml").write_text("schedules: [{name: weekly, cron: '0 0 2 * * 1', version: p.yaml}]")
    status, said = saferlhf(*[text.format(folder=tmp_path) for text in arguments])
    assert (status, "base_model=./mine is a folder of this machine" in said) == (1, True), said
    assert (kfp.changes, kfp.runs) == ([], [])


@pytest.mark.fault
def test_a_run_that_kfp_refuses_is_explained(kfp: KfpServer, compiled_pipeline: Path) -> None:
    kfp.refuse["POST /runs"] = (503, "no workflow controller")
    status, said = saferlhf("submit", str(compiled_pipeline), "--wait")
    assert status == 1
    assert "cannot start the run smol-1-round-" in said
    assert "KFP answers 503 Service Unavailable (no workflow controller)" in said
    assert "look for that name before you try again: it may run" in said
    assert kfp.runs == []


def test_the_name_says_rounds_data_code_and_time() -> None:
    settings = resolve_settings("tiny", 0, ["rounds=3"])
    now = datetime(2026, 11, 24, 15, 20, 17, tzinfo=UTC)
    name = run_name(settings, {"SAFERLHF_GIT_SHA": "5f2c9a1e77b0"}, now)
    assert name == f"tiny-3-rounds-data-{data_digest(settings.data)[:8]}-git-5f2c9a1e-20261124-152017"


@pytest.mark.golden
def test_the_data_digest_is_of_the_bytes_where_they_can_be_read_else_of_the_name(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(b"one\n")
    overrides = [f"data.preferences={file}", "data.prompts=datasets:org/prompts", "data.held_out=/data/none.jsonl"]
    expected = {
        "preferences": hashlib.sha256(b"one\n").hexdigest(),
        "demonstrations": hashlib.sha256((BUILTIN_FOLDER / "demonstrations.jsonl").read_bytes()).hexdigest(),
        "prompts": "datasets:org/prompts",
        "held_out": "/data/none.jsonl",
    }
    by_hand = hashlib.sha256(json.dumps(expected, sort_keys=True).encode()).hexdigest()
    assert data_digest(resolve_settings("tiny", 0, overrides).data) == by_hand
    file.write_bytes(b"two\n")
    assert data_digest(resolve_settings("tiny", 0, overrides).data) != by_hand


def test_each_change_of_a_step_is_one_line(kfp: KfpServer, run_id: str) -> None:
    """Of the nodes that Argo has, only the steps; those of a later round are numbered."""
    noise = [
        task("safe-rlhf-x7k2p", "RUNNING", node="safe-rlhf-x7k2p"),
        *(task(name, "SUCCEEDED") for name in ("root", "root-driver", "sft-driver", "executor", "condition-2")),
    ]
    kfp.script = [
        ("PENDING", []),
        ("RUNNING", [*noise, task("sft", "RUNNING")]),
        ("RUNNING", [*noise, task("sft", "RUNNING")]),
        ("RUNNING", [*noise, task("sft", "SUCCEEDED"), task("collect", "RUNNING", node="a")]),
        ("RUNNING", [task("sft", "SUCCEEDED"), task("collect", "SUCCEEDED", "a"), task("collect", "PENDING", "b")]),
        ("SUCCEEDED", [task("sft", "SUCCEEDED"), task("collect", "SUCCEEDED", "a"), task("collect", "SUCCEEDED", "b")]),
    ]
    state, lines = watched(kfp, run_id)
    assert state == "SUCCEEDED"
    assert lines == [
        "run PENDING",
        "sft RUNNING",
        "run RUNNING",
        *("collect RUNNING", "sft SUCCEEDED"),
        *("collect SUCCEEDED", "collect #2 PENDING"),
        *("collect #2 SUCCEEDED", "run SUCCEEDED"),
    ]


def test_waiting_for_a_good_run_ends_with_status_0(kfp: KfpServer, compiled_pipeline: Path) -> None:
    kfp.script = [("SUCCEEDED", [task("report", "SUCCEEDED")])]
    status, said = saferlhf("submit", str(compiled_pipeline), "--wait")
    assert status == 0
    assert [line.partition(" ")[2] for line in said.splitlines()[2:]] == ["report SUCCEEDED", "run SUCCEEDED"]


@pytest.mark.fault
@pytest.mark.parametrize("state", ["FAILED", "CANCELED", "SKIPPED"])
def test_waiting_for_a_run_that_ends_otherwise_has_status_1(
    kfp: KfpServer, compiled_pipeline: Path, state: str
) -> None:
    kfp.script = [(state, [task("sft", state, error="out of\nmemory")])]
    status, said = saferlhf("submit", str(compiled_pipeline), "--wait")
    assert status == 1
    assert f"sft {state}: out of memory\n" in said
    assert f"ended as {state}: the logs of its steps are at {kfp.url}/#/runs/details/" in said


@pytest.mark.fault
def test_ctrl_c_ends_the_watching_and_not_the_run(kfp: KfpServer, compiled_pipeline: Path) -> None:
    """A real SIGINT, while the answer is awaited."""
    kfp.script = [("RUNNING", [])]
    kfp.hold["GET /runs/*"] = threading.Event()

    def interrupt(call: str) -> None:
        if call.startswith("GET /runs/"):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    kfp.on_call = interrupt
    status, said = saferlhf("submit", str(compiled_pipeline), "--wait")
    (run,) = kfp.runs
    assert status == 130
    assert f"stopped watching; run {run['run_id']} goes on: {kfp.url}/#/runs/details/{run['run_id']}" in said
    assert [call for call in kfp.changes if call.startswith("POST /runs/")] == []


@pytest.mark.fault
def test_a_server_that_fails_for_a_while_is_asked_again(kfp: KfpServer, run_id: str) -> None:
    kfp.refuse["GET /runs/*"] = (503, "restarting")
    kfp.refuse_times["GET /runs/*"] = 5
    state, lines = watched(kfp, run_id)
    assert state == "SUCCEEDED"
    assert [line for line in lines if "no news, asking again: " in line and "restarting" in line] == lines[:1]
    assert lines[1:] == ["run SUCCEEDED"]


@pytest.mark.fault
def test_only_silence_in_a_row_counts(kfp: KfpServer, run_id: str) -> None:
    """Every second look fails, more often in all than a run is given up for."""
    kfp.script = [("RUNNING", [])] * (PATIENCE + 1) + [("SUCCEEDED", [])]

    def every_second_time(call: str) -> None:
        kfp.refuse = {} if kfp.refuse else {"GET /runs/*": (503, "restarting")}

    kfp.on_call = every_second_time
    assert watched(kfp, run_id)[0] == "SUCCEEDED"


@pytest.mark.fault
def test_a_server_that_stays_away_is_given_up_and_the_run_is_not(kfp: KfpServer, run_id: str) -> None:
    kfp.refuse["GET /runs/*"] = (503, "restarting")
    with pytest.raises(ClusterError, match=f"run {run_id} goes on, and cannot be watched"):
        watched(kfp, run_id)
    assert kfp.calls.count(f"GET /runs/{run_id}") == PATIENCE


@pytest.mark.fault
def test_a_run_that_somebody_deleted_is_not_waited_for(kfp: KfpServer) -> None:
    with pytest.raises(ClusterError, match="cannot look at run gone: KFP answers 404"):
        watched(kfp, "gone")


@pytest.mark.fault
@pytest.mark.parametrize("broken", ["a: [", "a: b", "", "- 1", "\x00"])
def test_a_file_that_is_no_pipeline_of_ours_is_refused(kfp: KfpServer, tmp_path: Path, broken: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(broken)
    assert f"{file} is no compiled pipeline of ours" in saferlhf("submit", str(file))[1]


def test_what_was_compiled_with_example_images_is_not_submitted(kfp: KfpServer) -> None:
    status, said = saferlhf("submit", "pipelines/compiled/local.yaml")
    assert status == 1
    assert "local.yaml was compiled with the example image registry.example.com/" in said and "--image-trainer" in said
    assert not kfp.runs


def test_a_shipped_platform_with_images_of_ones_own_can_be_submitted_with_its_settings(
    kfp: KfpServer, tmp_path: Path
) -> None:
    file, digest = tmp_path / "own.yaml", f"sha256:{'1' * 64}"
    images = [f"--image-{name}=ours.example.org/{name}@{digest}" for name in ("trainer", "rollout", "service")]
    status, said = saferlhf("compile", "--platform", "local", "-o", str(file), *images)
    assert status == 0, said
    status, said = saferlhf("submit", str(file))
    assert status == 0, said
    assert kfp.runs[0]["display_name"].startswith("smol-3-rounds-")
    assert kfp.runs[0]["runtime_config"]["parameters"]["run_set"] == '["dtype=float32"]'


def test_no_option_takes_a_token() -> None:
    for command in (["submit"], ["upload"], ["schedule", "apply"]):
        said = saferlhf(*command, "--help")[1]
        assert "--token-file" in said
        assert not re.search(r"--token\b(?!-file)", said)
