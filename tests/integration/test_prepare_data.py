"""What `prepare_data` says of own sources that do not go together, before anything long starts."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from components.foundation.base_model import make_tiny, push_model
from components.foundation.errors import DataError, ModelError
from components.foundation.run_context import open_run
from components.prepare_data.prepare_data import STAGE, run_prepare_data
from components.prepare_data.start_run import run_start_run
from components.sft.sft import run_sft
from pipelines.cli import app

Start = Callable[..., str]


@pytest.fixture
def start(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """A run of profile tiny with settings -> its URI."""
    monkeypatch.setenv("SAFERLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SAFERLHF_MODELS", str(tmp_path / "models"))

    def started(*settings: str) -> str:
        run_id = uuid.uuid4().hex
        root = f"s3://saferlhf-test/{run_id}"
        return run_start_run(
            f"{root}/runs/{run_id}", run_id, "tiny", 0, json.dumps([f"store.uri={root}", *settings]), 2
        )

    return started


def written(path: Path, *rows: dict[str, str]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.fault
def test_demonstrations_that_no_prompt_calls_harmless_are_refused_for_ptx(start: Start, tmp_path: Path) -> None:
    """The shipped ones hold answers to attacks: with other prompts than theirs, nobody knows which they are."""
    prompts = written(tmp_path / "prompts.jsonl", {"prompt": "How do I bake bread?", "kind": "benign"})
    run = start(f"data.prompts={prompts}", "ppo.ptx_coefficient=0.5")
    with pytest.raises(DataError, match=r"ppo\.ptx_coefficient=0\.5 needs demonstrations on harmless prompts"):
        run_prepare_data(run)
    assert open_run(run).store.latest(open_run(run).stage_uri(STAGE, 0)) is None
    assert run_prepare_data(start(f"data.prompts={prompts}"))


def test_a_pushed_model_can_be_a_runs_base_and_one_that_is_not_there_cannot(start: Start, tmp_path: Path) -> None:
    """What `saferlhf models push` commits is what sft starts from; a wrong address is refused by the first step."""
    bucket = "s3://saferlhf-test"
    uri = f"{bucket}/{uuid.uuid4().hex}/base"
    with pytest.raises(ModelError, match="base_model 'smollm2' is not known: give smollm2-135m-instruct, tiny, "):
        start("base_model=smollm2")
    with pytest.raises(ModelError, match=rf"base_model={uri} is no commit: .* `saferlhf models push FOLDER {uri}`"):
        start(f"base_model={uri}")
    said = CliRunner().invoke(app, ["models", "push", str(make_tiny("qwen2")), uri])
    assert (said.exit_code, said.output.strip()) == (0, uri)
    run = start(f"base_model={uri}")
    sft = run_sft(run, run_prepare_data(run))
    config = json.loads((open_run(run).store.fetch(sft) / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "qwen2"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        push_model(tmp_path / "empty", uri)


@pytest.mark.parametrize("kinds", [("red_team", "benign", "lookalike"), ("red_team", "benign"), ("benign",)])
def test_held_out_prompts_that_the_gate_will_miss_are_named(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], kinds: tuple[str, ...]
) -> None:
    held_out = written(tmp_path / "own.jsonl", *({"prompt": f"a {kind} prompt", "kind": kind} for kind in kinds))
    run_prepare_data(start(f"data.held_out={held_out}"))
    warnings = [line for line in capsys.readouterr().out.splitlines() if "has no prompt of kind" in line]
    missing = [kind for kind in ("red_team", "benign", "lookalike") if kind not in kinds]
    assert len(warnings) == bool(missing)
    assert all(f"no prompt of kind {' or '.join(missing)}: " in warning for warning in warnings)
