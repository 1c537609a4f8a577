"""The one question before registration: it is asked of the exported folder alone, and no answer is an error."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from components.evaluate.trial import QUESTION, TRIAL_FILE, try_model
from components.foundation.errors import ModelError
from components.foundation.results import TrialResult, to_json
from components.foundation.rollout.vllm_server import PYTHON_VARIABLE
from components.promote.promote import check_trial
from tests.misbehaving_vllm import fake_vllm
from tests.unit.conftest import MakeTiny

POLICY = "s3://bucket/store/runs/one/round-3/ppo_lagrangian/step-16"
PATIENCE = 300.0


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)


@pytest.fixture
def exported(tiny_folder: MakeTiny, tmp_path: Path) -> Path:
    """A folder of its own, to be damaged."""
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "model"))


def test_row_28_an_exported_model_answers_in_a_process_of_its_own(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (exported.parent / "transformers.py").write_text("raise SystemExit('this is not the library')")
    monkeypatch.setenv("PYTHONPATH", str(exported.parent))
    monkeypatch.chdir(exported.parent)
    result = try_model(POLICY, exported, PATIENCE)
    assert (result.policy_uri, result.server, result.question) == (POLICY, "transformers", QUESTION)
    assert result.answer.strip()


def test_the_process_that_loads_an_exported_model_has_no_key(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder's files are read there by libraries that are not ours."""
    program = tmp_path / "program.py"
    program.write_text("import json, os; print(json.dumps({'answer': ' '.join(os.environ)}))")
    monkeypatch.setattr("components.evaluate.trial._PROGRAM", program)
    for name in ("AWS_SECRET_ACCESS_KEY", "SAFERLHF_JUDGE_KEY", "MLFLOW_TRACKING_PASSWORD", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "some value")
    seen = try_model(POLICY, exported, PATIENCE).answer.split()
    assert not {"AWS_SECRET_ACCESS_KEY", "SAFERLHF_JUDGE_KEY", "MLFLOW_TRACKING_PASSWORD"} & set(seen)
    assert {"PATH", "AWS_DEFAULT_REGION", "HF_HUB_OFFLINE"} <= set(seen)


@pytest.mark.fault
def test_row_28_a_folder_that_does_not_load_is_an_error_that_names_the_policy(exported: Path) -> None:
    (exported / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match=f"{POLICY}/model failed in plain transformers.*not registered"):
        try_model(POLICY, exported, PATIENCE)


@pytest.mark.fault
def test_an_answer_without_text_is_an_error(exported: Path) -> None:
    file = exported / "generation_config.json"
    config = json.loads(file.read_text())
    vocabulary = json.loads((exported / "config.json").read_text())["vocab_size"]
    config["suppress_tokens"] = [token for token in range(vocabulary) if token != config["eos_token_id"]]
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="with nothing at all"):
        try_model(POLICY, exported, PATIENCE)


@pytest.mark.fault
def test_patience_ends(exported: Path) -> None:
    with pytest.raises(ModelError, match=r"serving\.trial_seconds=0\.01"):
        try_model(POLICY, exported, 0.01)


def test_where_there_is_vllm_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PYTHON_VARIABLE, fake_vllm(tmp_path, "chats"))
    result = try_model(POLICY, tmp_path, PATIENCE)
    assert (result.server, result.answer) == ("vllm", "Fried rice.")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("how", "words"), [("does not start", "failed in vLLM.*no accelerator"), ("well", "no chat completion")]
)
def test_a_vllm_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, words: str) -> None:
    monkeypatch.setenv(PYTHON_VARIABLE, fake_vllm(tmp_path, how))
    with pytest.raises(ModelError, match=f"(?s){words}"):
        try_model(POLICY, tmp_path, PATIENCE)


@pytest.mark.fault
def test_row_28_only_a_policy_that_was_seen_to_answer_is_registered(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="asked no policy"):
        check_trial(tmp_path, POLICY)
    trial = TrialResult(POLICY, "transformers", QUESTION, "Fried rice.")
    for other in (replace(trial, policy_uri=POLICY + "0"), replace(trial, answer=" ")):
        (tmp_path / TRIAL_FILE).write_text(to_json(other))
        with pytest.raises(ModelError, match="was not seen to answer"):
            check_trial(tmp_path, POLICY)
    (tmp_path / TRIAL_FILE).write_text(to_json(trial))
    check_trial(tmp_path, POLICY)
