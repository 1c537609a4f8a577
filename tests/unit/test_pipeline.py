"""The compiled pipeline: what a cluster is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler

from components.foundation.exit_codes import NOTHING_NEW
from pipelines.safe_rlhf import build_pipeline

ROUND = {"collect", "annotate", "reward-model", "cost-model", "ppo-lagrangian", "evaluate"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file: Path = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    compiler.Compiler().compile(build_pipeline(3), str(file))
    return yaml.safe_load(file.read_text())  # type: ignore[no-any-return]


def tasks_of(component: dict[str, Any]) -> dict[str, Any]:
    return component["dag"]["tasks"]  # type: ignore[no-any-return]


def training(compiled: dict[str, Any]) -> dict[str, Any]:
    """The box with all that follows the data."""
    (box,) = [task for task in tasks_of(compiled["root"]).values() if task["taskInfo"]["name"] == "training"]
    return compiled["components"][box["componentRef"]["name"]]  # type: ignore[no-any-return]


def dags(compiled: dict[str, Any]) -> list[dict[str, Any]]:
    return [compiled["root"], *(c for c in compiled["components"].values() if "dag" in c)]


def test_three_rounds_each_a_nested_pipeline(compiled: dict[str, Any]) -> None:
    names = [task["taskInfo"]["name"] for task in tasks_of(training(compiled)).values()]
    assert [name for name in names if name.startswith("round")] == ["round 1", "round 2", "round 3"]
    rounds = [set(tasks_of(dag)) for dag in dags(compiled) if "collect" in tasks_of(dag)]
    assert rounds == [ROUND] * 3 or rounds == [ROUND]


def test_a_round_starts_from_the_last_rounds_policy(compiled: dict[str, Any]) -> None:
    """Lineage is in the graph: policy and preferences of round k are inputs of round k + 1."""
    tasks = tasks_of(training(compiled)).values()
    rounds = [task for task in tasks if task["taskInfo"]["name"].startswith("round")]
    assert len(rounds) == 3
    for later in rounds[1:]:
        for name in ("policy_uri", "preferences_uri"):
            source = later["inputs"]["parameters"][name]["taskOutputParameter"]
            assert source["producerTask"].startswith("alignment-round")
            assert source["outputParameterKey"] == name
            assert source["producerTask"] in later["dependentTasks"]


def test_row_20_no_step_is_ever_taken_from_a_cache(compiled: dict[str, Any]) -> None:
    for dag in dags(compiled):
        for name, task in tasks_of(dag).items():
            if "dag" not in compiled["components"][task["componentRef"]["name"]]:
                assert not task.get("cachingOptions", {}).get("enableCache"), name


def test_both_outcomes_of_the_gate_lead_to_the_report(compiled: dict[str, Any]) -> None:
    conditions = conditions_of(compiled, "gate")
    assert len(conditions) == 2
    assert any(condition.startswith("!") for condition in conditions)
    report = tasks_of(training(compiled))["report"]
    assert any(name.startswith("condition-branches") for name in report["dependentTasks"])


def test_all_that_follows_the_data_is_skipped_for_one_word_alone(compiled: dict[str, Any]) -> None:
    """An output that is something else, or empty, does not skip it."""
    assert conditions_of(compiled, "prepare-data") == [
        f"inputs.parameter_values['pipelinechannel--prepare-data-Output'] != '{NOTHING_NEW}'"
    ]
    outside = {name for name in tasks_of(compiled["root"]) if not name.startswith("condition-")}
    assert outside == {"start-run", "prepare-data"}
    assert {"sft", "evaluate", "register", "gate", "report"} <= set(tasks_of(training(compiled)))


def conditions_of(compiled: dict[str, Any], producer: str) -> list[str]:
    """Of all boxes that are opened or skipped by what a step returns."""
    conditions = [
        task["triggerPolicy"]["condition"]
        for dag in dags(compiled)
        for task in tasks_of(dag).values()
        if "triggerPolicy" in task
    ]
    return [condition for condition in conditions if f"pipelinechannel--{producer}-Output" in condition]


def test_steps_run_our_images_with_nothing_installed_on_the_way(compiled: dict[str, Any]) -> None:
    for executor in compiled["deploymentSpec"]["executors"].values():
        container = executor["container"]
        assert container["image"].startswith("saferlhf/")
        assert "pip install" not in " ".join(container["command"])
