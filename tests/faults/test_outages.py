"""Servers that stop in mid-training and come back; memory, disk and cache that do not suffice."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from components.collect.component import collect
from components.evaluate.component import evaluate
from components.foundation import tracking
from components.foundation.backbone import Backbone
from components.foundation.base_model import resolve_base_model
from components.foundation.batching import TokenSequence
from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import OutOfMemoryError
from components.foundation.exit_codes import OUT_OF_MEMORY_EXIT_CODE
from components.foundation.run_context import create_run, open_stage
from components.foundation.setting_sections import SftSettings
from components.foundation.settings import resolve_settings
from components.foundation.training_checkpoints import TrainingCheckpoints
from components.prepare_data.prepare_data import run_prepare_data
from components.prepare_data.start_run import run_start_run
from components.sft.sft import train_sft
from pipelines.local import services as service_module
from pipelines.local.server_process import free_ports
from pipelines.local.services import Endpoints, down, up

pytestmark = pytest.mark.fault


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work folder of S3 and MLflow servers of this test's own, which `up` starts on the same ports every time."""
    ports = free_ports(9)
    for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(service_module, "free_ports", lambda count: ports[:8] if count == 8 else ports[8:])
    endpoints, _ = up(tmp_path)
    for name, value in endpoints.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SAFERLHF_CACHE", str(tmp_path / "cache"))
    yield tmp_path
    down(tmp_path)


def test_row_34_servers_that_are_away_in_mid_training_cost_no_step_and_are_caught_up_with(
    servers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are stopped after the second of nine steps, when a checkpoint is due, and are there again at the fourth."""
    monkeypatch.setattr(tracking, "_FLUSH_SECONDS", 0.0)
    settings = resolve_settings("tiny", overrides=["store.uri=s3://saferlhf-outage/x", "checkpoint.every_steps=2"])
    run = create_run("s3://saferlhf-outage/x/runs/run", "run", settings)
    examples = [TokenSequence((5, 6), (70 + number, 257)) for number in range(3)]
    losses: dict[int, float] = {}
    with open_stage(run.run_uri, "sft", 0) as stage:
        backbone = Backbone.load(resolve_base_model("tiny", stage.context.store), "float32", seed=0)
        backbone.add_role("sft", settings.lora, scored=False)

        def on_step(step: int, total: int, metrics: dict[str, float]) -> None:
            if step == 2:
                assert down(servers)
            if step == 4:
                up(servers)
            stage.report(metrics, step)
            losses[step] = metrics["loss"]

        with TrainingCheckpoints(stage, backbone, []) as checkpoints:
            train_sft(backbone, "sft", examples, SftSettings(batch_size=1, epochs=3), 0, on_step, checkpoints)
        assert stage.context.store.latest(stage.checkpoints_uri) == f"{stage.checkpoints_uri}/step-8"
        backbone.save_role("sft", stage.folder / "out")
        uri = stage.commit(stage.folder / "out", step=9, parents=[])
        assert stage.context.store.is_whole(uri)
        mlflow_run = stage.mlflow.run_id
    told = capsys.readouterr().out
    assert "sft: not saved after step 2, goes on: cannot reach the S3 store" in told
    assert "metrics wait for MLflow: cannot reach MLflow" in told
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    logged = {point.step: point.value for point in client.get_metric_history(mlflow_run, "loss")}
    assert logged == losses and list(losses) == list(range(1, 10))
    assert client.get_run(mlflow_run).info.status == "FINISHED"


def test_row_12_a_stage_whose_memory_does_not_suffice_ends_with_a_code_of_its_own_and_a_hint(
    services: Endpoints, tmp_path: Path
) -> None:
    """Adapters of 128 GB, and 64 GB that the process may have."""
    root, name = f"s3://saferlhf-test/{uuid.uuid4().hex}", uuid.uuid4().hex
    wish = f'["store.uri={root}", "lora.rank=1000000000"]'
    run = run_start_run(f"{root}/runs/{name}", name, "tiny", 0, wish, 1)
    data = run_prepare_data(run)
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.launch_stage", "components.sft.sft:run_sft", run, data],
        env=os.environ | {"SAFERLHF_CACHE": str(tmp_path)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (64 << 30, 64 << 30)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == OUT_OF_MEMORY_EXIT_CODE, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("components.foundation.errors.OutOfMemoryError: sft: out of memory (")
    assert "lower the stage's batch size" in last and "would end alike" in last


@pytest.mark.parametrize(("step", "inputs"), [(collect, 4), (evaluate, 8)])
def test_row_12_steps_that_train_nothing_tell_it_alike(
    step: Any, inputs: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(*_: Any) -> str:
        raise OutOfMemoryError("out of memory: give it a larger machine")

    name = step.name
    monkeypatch.setattr(f"components.{name}.{name}.run_{name}", too_large)
    with pytest.raises(SystemExit) as ended:
        step.python_func("s3://bucket/runs/run", 1, *[""] * inputs)
    assert ended.value.code == OUT_OF_MEMORY_EXIT_CODE
    assert "OutOfMemoryError: out of memory: give it a larger machine" in capsys.readouterr().err


def with_mounts(mounts: dict[Path, str], *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command that sees a tmpfs with the given options at each of these places; nobody else sees them."""
    script = "".join(f"mount -t tmpfs -o {options} none '{place}' || exit 77; " for place, options in mounts.items())
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f'{script}exec "$@"', "sh", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip(f"no file systems may be mounted here: {done.stderr.strip()}")
    return done


@pytest.mark.parametrize(
    ("options", "reason"),
    [("size=64k", "No space left on device; 65536 bytes are free there"), ("ro", "Read-only file system")],
)
def test_row_30_a_cache_that_is_full_or_read_only_is_named_with_the_bytes_it_should_hold(
    store: CheckpointStore, tmp_path: Path, options: str, reason: str
) -> None:
    cache, folder = tmp_path / "small", tmp_path / "model"
    cache.mkdir()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(os.urandom(100_000))
    store.commit(f"{store.root_uri}/step-1", folder)
    fetch = (
        "import sys\nfrom pathlib import Path\nfrom components.foundation.checkpoint_store import CheckpointStore\n"
        "uri, cache = sys.argv[1:]\nCheckpointStore(uri, cache_dir=Path(cache)).fetch(uri)\n"
    )
    done = with_mounts({cache: options}, sys.executable, "-c", fetch, f"{store.root_uri}/step-1", str(cache))
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("components.foundation.errors.StoreError: ")
    assert f"step-1 with 100000 bytes cannot be kept in the cache {cache} ({reason}" in last
    assert "SAFERLHF_CACHE" in last


def test_row_30_the_doctor_names_64_mib_of_shared_memory_and_a_small_disk(tmp_path: Path) -> None:
    mounts = {Path("/dev/shm"): "size=64m", tmp_path: "size=1g"}
    doctor = ("doctor", "shm", "disk", "--json", "--workdir", str(tmp_path))
    done = with_mounts(mounts, sys.executable, "-c", "from pipelines.cli import main; main()", *doctor)
    assert done.returncode == 1, done.stderr
    shm, disk = json.loads(done.stdout)
    assert (shm["result"], disk["result"]) == ("warning", "failed")
    assert shm["found"] == "/dev/shm has 0.1 GiB: too little for several GPUs"
    assert disk["found"] == f"1.0 GiB free for the work folder {tmp_path}"
    assert "--shm-size" in shm["to_do"] and "--workdir" in disk["to_do"]


@pytest.mark.parametrize(
    ("options", "result", "found"),
    [("size=8g", "ok", "8.0 GiB free"), ("size=1g", "warning", "1.0 GiB free"), ("ro", "failed", "cannot be written")],
)
def test_row_30_the_doctor_names_a_cache_that_is_small_or_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, result: str, found: str
) -> None:
    monkeypatch.setenv("SAFERLHF_CACHE", str(tmp_path / "not" / "yet"))
    doctor = ("doctor", "cache", "--json")
    done = with_mounts({tmp_path: options}, sys.executable, "-c", "from pipelines.cli import main; main()", *doctor)
    (cache,) = json.loads(done.stdout)
    assert (cache["result"], done.returncode) == (result, int(result == "failed"))
    assert found in cache["found"] and str(tmp_path) in cache["found"]
    assert ("SAFERLHF_CACHE" in cache["to_do"]) == (result != "ok")
