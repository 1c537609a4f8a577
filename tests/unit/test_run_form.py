"""What the first step refuses of a run form, before it asks anything of a server."""

from __future__ import annotations

import pytest

from components.foundation.errors import SettingsError
from components.foundation.run_context import store_root
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


@pytest.mark.fault
@pytest.mark.parametrize(
    ("run_uri", "overrides", "said"),
    [
        ("s3://saferlhf/pipeline/x", "[]", r"run_uri='s3://saferlhf/pipeline/x' is refused: write s3://"),
        (
            "s3://mine/runs/x",
            '["store.uri=s3://other"]',
            r"run_uri=s3://mine/runs/x does not lie in store\.uri=s3://oth",
        ),
    ],
)
def test_a_run_that_would_not_lie_in_its_store_is_refused(run_uri: str, overrides: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        run_start_run(run_uri, "x", "tiny", 0, overrides, 1)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ('["annotate.annotator=judge"]', r"needs annotate\.judge_url and annotate\.judge_model"),
        ('["annotate.annotator=judge", "annotate.judge_url=http://a/v1"]', r"needs annotate\.judge_url and"),
        (
            '["annotate.annotator=judge", "annotate.judge_model=m", "annotate.judge_url=http://me:hidden@a/v1"]',
            r"annotate\.judge_url=http://a/v1 was given with a user or password",
        ),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused_before_anything_is_stored(overrides: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said) as error:
        run_start_run("s3://saferlhf/pipeline/runs/x", "x", "tiny", 0, overrides, 1)
    assert "hidden" not in str(error.value)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("uri", "root"),
    [
        ("s3://b/p/runs/r1", "s3://b/p"),
        ("s3://runs/p/runs/r1/round-1/sft/step-3", "s3://runs/p"),
        ("s3://acme/runs/team/runs/r1/round-0/sft/step-3", "s3://acme/runs/team"),
        ("s3://acme/models/mine", ""),
    ],
)
def test_the_store_of_a_run_ends_before_its_own_folder(uri: str, root: str) -> None:
    assert store_root(uri) == root
