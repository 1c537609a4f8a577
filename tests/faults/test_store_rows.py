"""What a stage does with pointers, checkpoints and commits that are not as they should be."""

from __future__ import annotations

import logging
import pickle
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.foundation.backbone import Backbone
from components.foundation.base_model import resolve_base_model
from components.foundation.batching import TokenSequence
from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import (
    ConflictError,
    IntegrityError,
    ModelError,
    SettingsError,
    StoreError,
    TrainingError,
)
from components.foundation.role_optimizer import make_optimizers
from components.foundation.run_context import Stage, create_run, open_stage
from components.foundation.s3 import split_uri
from components.foundation.setting_sections import SftSettings
from components.foundation.settings import Settings, resolve_settings
from components.foundation.training_checkpoints import TrainingCheckpoints, TrainingState
from components.sft import sft
from pipelines.local.services import Endpoints
from tests.faults.killing_proxy import FULL, Trap, killing_proxy

pytestmark = pytest.mark.fault

EXAMPLES = [TokenSequence((5, 6), (70 + number, 257)) for number in range(5)]
BATCHES_OF_TWO = SftSettings(batch_size=2, epochs=3)


def settings_in(store: CheckpointStore, *overrides: str) -> Settings:
    return resolve_settings("tiny", overrides=[f"store.uri={store.root_uri}", "checkpoint.every_steps=1", *overrides])


@pytest.fixture
def stage(store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """SFT of a new run that saves its state after every step."""
    monkeypatch.setenv("SAFERLHF_CACHE", str(tmp_path / "cache"))
    run = create_run(f"{store.root_uri}/runs/run", uuid.uuid4().hex, settings_in(store))
    with open_stage(run.run_uri, "sft", 0) as opened:
        yield opened


def a_model(stage: Stage) -> Backbone:
    backbone = Backbone.load(resolve_base_model("tiny", stage.context.store), "float32", seed=0)
    backbone.add_role("sft", stage.context.settings.lora, scored=False)
    return backbone


def saved(stage: Stage, *steps: int) -> Backbone:
    """Let a stage save its state after these steps, and nothing else."""
    backbone = a_model(stage)
    with TrainingCheckpoints(stage, backbone, []) as checkpoints:
        checkpoints.restore(make_optimizers(backbone, {"sft": 1e-3}))
        for step in steps:
            checkpoints.after_step(step, 1000)
    return backbone


def restored(stage: Stage) -> TrainingState:
    backbone = a_model(stage)
    with TrainingCheckpoints(stage, backbone, []) as checkpoints:
        return checkpoints.restore(make_optimizers(backbone, {"sft": 1e-3}))


@pytest.mark.parametrize("parents", [["s3://other/parent"], []], ids=["other work", "the same work"])
def test_row_01_a_commit_that_latest_does_not_name_counts_for_the_work_it_was_made_of(
    stage: Stage, tmp_path: Path, parents: list[str]
) -> None:
    """Killed between manifest and LATEST, and a repetition that is not the same bits, as on a GPU."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "weights").write_text(folder.name)
    store, digest = stage.context.store, stage.context.settings.digest()
    stage_uri = stage.context.stage_uri("sft", 0)
    store.commit(f"{stage_uri}/step-5", first, parents=parents, settings_digest=digest)
    if parents:
        with pytest.raises(ConflictError, match="already committed with other files"):
            stage.commit(second, step=5, parents=[])
        assert store.latest(stage_uri) is None
        return
    assert stage.commit(second, step=5, parents=[]) == f"{stage_uri}/step-5" == store.latest(stage_uri)
    assert (store.fetch(f"{stage_uri}/step-5") / "weights").read_text() == "first"
    with pytest.raises(ConflictError, match="already committed with other files"):
        stage.commit(second, step=5, parents=[])  # LATEST names it by now: nobody does the work again


def put(s3: Any, uri: str, body: bytes) -> None:
    bucket, key = split_uri(uri)
    s3.put_object(Bucket=bucket, Key=key, Body=body)


def delete(s3: Any, uri: str) -> None:
    bucket, key = split_uri(uri)
    s3.delete_object(Bucket=bucket, Key=key)


def test_row_02_weights_that_cannot_be_stored_end_the_stage_and_leave_the_pointer(
    stage: Stage, services: Endpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second checkpoint on the store has no room for weights; a pointer's few bytes it would take."""
    store, uri = stage.context.store, stage.checkpoints_uri
    saved(stage, 1)
    with killing_proxy(services.s3_url, Trap("PUT", "state.safetensors", answer=FULL)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with open_stage(stage.context.run_uri, "sft", 0) as again, pytest.raises(StoreError, match="the disk is full"):
            saved(again, 2)
    assert not [path for method, path in proxy.requests if method == "PUT" and path.endswith(("LATEST", "T.json"))]
    assert store.latest(uri) == f"{uri}/step-1"
    monkeypatch.undo()
    assert restored(stage).step == 1


def test_row_03_without_a_pointer_a_stage_starts_at_its_first_step_whatever_the_folders_say(
    stage: Stage, s3: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "saferlhf")
    saved(stage, 7)
    delete(s3, f"{stage.checkpoints_uri}/LATEST")
    caplog.clear()
    assert restored(stage) == TrainingState(step=0)
    assert "sft: there is no checkpoint; starts at its first step" in caplog.text
    assert stage.context.store.list(stage.checkpoints_uri) == []


def test_row_04_steps_come_in_the_order_of_their_numbers(stage: Stage) -> None:
    """100 is after 10 and 10 after 9, though not in the alphabet."""
    for step in (9, 10, 100):
        saved(stage, step)
        assert restored(stage).step == step
        assert stage.context.store.latest(stage.checkpoints_uri) == f"{stage.checkpoints_uri}/step-{step}"


@pytest.mark.parametrize("killed_in", [1, 4, 6, 7])
def test_row_06_resumed_in_mid_epoch_no_example_comes_twice_and_none_is_missing(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, killed_in: int
) -> None:
    """Three batches an epoch. The step that was cut off is done again: it had left no trace in what was saved."""
    trained: list[list[TokenSequence]] = []
    collate = sft.collate

    def noting(sequences: Any, *rest: Any) -> Any:
        trained.append(list(sequences))
        return collate(sequences, *rest)

    monkeypatch.setattr(sft, "collate", noting)

    def cut_off(step: int, *_: Any) -> None:
        if step == killed_in:
            raise KeyboardInterrupt

    def train(on_step: Any) -> None:
        backbone = a_model(stage)
        with TrainingCheckpoints(stage, backbone, []) as checkpoints:
            sft.train_sft(backbone, "sft", EXAMPLES, BATCHES_OF_TWO, 0, on_step, checkpoints)

    with pytest.raises(KeyboardInterrupt):
        train(cut_off)
    assert len(trained) == killed_in
    del trained[killed_in - 1 :]
    train(lambda *_: None)
    assert len(trained) == 9
    for epoch in range(3):
        seen = [example for batch in trained[3 * epoch : 3 * epoch + 3] for example in batch]
        assert sorted(seen, key=EXAMPLES.index) == EXAMPLES


def test_row_08_a_run_is_not_resumed_with_other_settings_and_the_difference_is_shown(store: CheckpointStore) -> None:
    """How it is spread over devices may change."""
    uri, name = f"{store.root_uri}/runs/run", uuid.uuid4().hex
    first = create_run(uri, name, settings_in(store, "ppo.steps=4"))
    with pytest.raises(SettingsError) as error:
        create_run(uri, name, settings_in(store, "ppo.steps=5", "sft.epochs=7", "distributed.processes=2"))
    assert "other settings (sft.epochs (1 there, 7 here), ppo.steps (4 there, 5 here)): " in str(error.value)
    assert "--from-run" in str(error.value)
    spread = create_run(uri, name, settings_in(store, "ppo.steps=4", "distributed.processes=2"))
    assert spread.mlflow_run_id == first.mlflow_run_id


@pytest.mark.parametrize("version", [0, 2])
def test_row_09_a_checkpoint_of_another_format_is_refused_in_one_sentence(stage: Stage, s3: Any, version: int) -> None:
    saved(stage, 3)
    manifest = f"{stage.checkpoints_uri}/step-3/MANIFEST.json"
    text = stage.context.store.read_text(manifest)
    assert '"format_version": 1' in text
    put(s3, manifest, text.replace('"format_version": 1', f'"format_version": {version}').encode())
    with pytest.raises(IntegrityError, match=f"format {version}; this version reads format 1$") as error:
        restored(stage)
    assert manifest in str(error.value)


@pytest.mark.parametrize(("role", "more"), [("actor", 0), ("sft", 1)])
def test_row_09_a_checkpoint_of_other_roles_or_shapes_is_refused(stage: Stage, role: str, more: int) -> None:
    """As a version that called them otherwise, or made them larger, would have left it."""
    backbone = Backbone.load(resolve_base_model("tiny", stage.context.store), "float32", seed=0)
    lora = stage.context.settings.lora
    backbone.add_role(role, lora.model_copy(update={"rank": lora.rank + more}), scored=False)
    with TrainingCheckpoints(stage, backbone, []) as checkpoints:
        checkpoints.restore(make_optimizers(backbone, {role: 1e-3}))
        checkpoints.after_step(1, 9)
    with pytest.raises(TrainingError, match="holds no 'sft' of this model's shape: it was made by another") as error:
        restored(stage)
    assert stage.checkpoints_uri in str(error.value)


@pytest.mark.parametrize("gone", ["MANIFEST.json", "model.safetensors"])
def test_row_20_a_finished_stage_whose_objects_are_gone_runs_again(
    stage: Stage, s3: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, gone: str
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    uri = stage.commit(folder, step=3, parents=[])
    assert stage.finished() == uri
    delete(s3, f"{uri}/{gone}")
    caplog.set_level(logging.WARNING, "saferlhf")
    assert stage.finished() is None
    assert f"objects of {uri} are gone: the stage runs again" in caplog.text
    assert stage.commit(folder, step=3, parents=[]) == uri
    assert stage.finished() == uri
    assert (stage.context.store.fetch(uri) / "model.safetensors").read_bytes() == b"weights"


class Malicious:
    """Leaves a file where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self._trace,)


def test_row_21_a_malicious_pickle_is_refused_and_nothing_of_it_ran(stage: Stage, tmp_path: Path) -> None:
    """In place of a model's weights, beside them, and in place of a checkpoint's tensors, its digest being right."""
    trace = tmp_path / "ran"
    poison = pickle.dumps(Malicious(trace))
    pickle.loads(poison)
    assert trace.exists()  # it would bite
    trace.unlink()

    saved_uri = f"{stage.checkpoints_uri}/step-1"
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "state.json").write_text('{"step": 1, "record": ""}')
    (folder / "state.safetensors").write_bytes(poison)
    digest = stage.context.settings.digest()
    stage.context.store.commit(saved_uri, folder, settings_digest=digest)
    stage.context.store.set_latest(stage.checkpoints_uri, saved_uri)
    with pytest.raises(IntegrityError, match=r"state\.safetensors cannot be read"):
        restored(stage)

    model = tmp_path / "model"
    shutil.copytree(resolve_base_model("tiny", stage.context.store), model)
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):
        (model / name).write_bytes(poison)
    Backbone.load(model, "float32", seed=0)  # what lies beside safetensors is not looked at
    (model / "model.safetensors").write_bytes(poison)
    with pytest.raises(ModelError, match=r"model\.safetensors of \d+ bytes cannot be read"):
        Backbone.load(model, "float32", seed=0)
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="is pickled, which is refused"):
        Backbone.load(model, "float32", seed=0)
    assert not trace.exists()
