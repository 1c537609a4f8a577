"""What the first step refuses of a run form, before it asks anything of a server."""

from __future__ import annotations

import pytest

from components.foundation.errors import SettingsError
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
