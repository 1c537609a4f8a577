"""What the first step refuses of a run form, before it asks anything of a server."""

from __future__ import annotations

import pytest

from components.foundation.errors import SettingsError
from components.prepare_data.component import start_run
from components.prepare_data.start_run import run_start_run


@pytest.mark.fault
@pytest.mark.parametrize("run_id", ["", "Mine", "a/b", "-a", "run_1", "a" * 64])
def test_row_31_a_run_id_that_cannot_name_things_is_refused(run_id: str) -> None:
    with pytest.raises(SettingsError, match=f"run_id='{run_id}' is refused: use up to 63 lower-case letters"):
        run_start_run("s3://saferlhf/pipeline/runs/x", run_id, "tiny", 0, "[]", 1)


@pytest.mark.fault
@pytest.mark.parametrize("overrides", ["ppo.steps=20", "{}", "[1]", '"ppo.steps=20"'])
def test_settings_that_are_no_list_of_texts_are_refused(overrides: str) -> None:
    with pytest.raises(SettingsError, match=r"run_set=.* is refused: write a JSON list of settings"):
        run_start_run("s3://saferlhf/pipeline/runs/x", "x", "tiny", 0, overrides, 1)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("field", "text", "said"),
    [
        ("ppo_steps", "many", r"ppo\.steps='many'"),
        ("ppo_kl_coefficient", "-1", r"ppo\.kl_coefficient=-1"),
        ("annotate_annotator", "nobody", r"annotate\.annotator='nobody'"),
        ("ppo_threshold_target", "0.1 ppo.steps=3", r"ppo\.threshold_target='0\.1 ppo\.steps=3'"),
    ],
)
def test_a_field_of_the_form_that_its_setting_refuses_is_named(field: str, text: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        start_run.python_func(
            run_uri="s3://saferlhf/pipeline/runs/x",
            run_id="x",
            kfp_run_id="",
            profile="tiny",
            seed=0,
            overrides="[]",
            rounds=1,
            pool_node_selector={},
            pool_tolerations=[],
            **{field: text},
        )
