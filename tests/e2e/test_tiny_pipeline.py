"""The whole pipeline on a tiny random model, through the command that users type."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("pipeline")]

SAFERLHF = Path(sys.executable).with_name("saferlhf")
OPEN_GATE = ("gate.max_unsafe_rate=1", "gate.min_win_rate=0", "gate.max_over_refusal_rate=1")


def saferlhf(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_"))}
    return subprocess.run(
        [str(SAFERLHF), *arguments], capture_output=True, text=True, timeout=600, check=False, env=environment
    )


def run_tiny(workdir: Path, *settings: str) -> tuple[dict[str, Any], str]:
    arguments = [part for setting in settings for part in ("--set", setting)]
    done = saferlhf("run", "--profile", "tiny", "--workdir", str(workdir), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((workdir / "summary.json").read_text()), done.stdout


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def first_run(workdir: Path) -> tuple[dict[str, Any], str]:
    """Two rounds, with a gate that lets everything pass."""
    return run_tiny(workdir, "rounds=2", *OPEN_GATE)


def test_every_stage_ran(first_run: tuple[dict[str, Any], str]) -> None:
    summary, _ = first_run
    expected = {f"round-0/{stage}" for stage in ("prepare_data", "sft", "evaluate", "report")}
    stages = ("collect", "annotate", "reward_model", "cost_model", "ppo_lagrangian", "evaluate")
    expected |= {f"round-{number}/{stage}" for number in (1, 2) for stage in stages}
    assert set(summary["stage_seconds"]) == expected
    assert [entry["round"] for entry in summary["rounds"]] == [1, 2]
    for entry in summary["rounds"]:
        assert entry["ppo"]["steps"] == 2
        for series in ("lambda", "cost", "reward", "kl"):
            assert len(entry["ppo"][series]) == 2
        assert 0.0 <= entry["eval"]["unsafe_rate_ci"][0] <= entry["eval"]["unsafe_rate"]
        assert entry["eval"]["n_red_team"] == entry["eval"]["n_benign"] == 16
    assert summary["rounds"][0]["policy_uri"] != summary["rounds"][1]["policy_uri"]


def test_multiplier_moves_with_the_violation(first_run: tuple[dict[str, Any], str]) -> None:
    """The first step's moving average is that step's mean cost, so its direction can be told from the summary."""
    for entry in first_run[0]["rounds"]:
        ppo = entry["ppo"]
        assert (ppo["lambda"][0] > 1.0) == (ppo["cost"][0] > ppo["threshold"])


def test_open_gate_promotes_and_closed_gate_does_not(first_run: tuple[dict[str, Any], str], workdir: Path) -> None:
    promoted = first_run[0]["promotion"]
    assert (promoted["decision"], promoted["alias"], promoted["version"]) == ("promote", "champion", "1")
    summary, _ = run_tiny(workdir, "rounds=1", "gate.max_unsafe_rate=0")
    kept = summary["promotion"]
    assert (kept["decision"], kept["alias"], kept["version"]) == ("challenger", "challenger", "2")
    assert any(reason.startswith("failed: upper bound of the unsafe rate") for reason in kept["reasons"])
    assert any("champion, version 1" in reason for reason in kept["reasons"])


def test_output_is_ours_alone(first_run: tuple[dict[str, Any], str]) -> None:
    lines = first_run[1].splitlines()
    assert any(line.startswith("progress ppo_lagrangian 2/2 steps") for line in lines)
    assert not [line for line in lines if "Warning" in line or "Traceback" in line]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("ppo.stepz=3", ["unknown setting", "ppo.stepz"]),
        ("ppo.clip_ratio=2", ["ppo.clip_ratio", "2"]),
        ("data.preferences=/nowhere.jsonl", ["/nowhere.jsonl", "does not exist"]),
        ("base_model=/nowhere", ["/nowhere", "does not exist"]),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(tmp_path: Path, setting: str, words: list[str]) -> None:
    done = saferlhf("run", "--profile", "tiny", "--workdir", str(tmp_path), "--set", setting)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert all(word in done.stderr for word in words)
    assert not (tmp_path / "summary.json").exists()
