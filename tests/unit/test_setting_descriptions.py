"""What `saferlhf settings` says of each setting."""

from __future__ import annotations

import pytest

from components.foundation.errors import SettingsError
from components.foundation.settings import Settings, describe_settings, resolve_settings
from tests.unit.kubeflow_command import saferlhf

DESCRIBED = describe_settings()


def printed(*arguments: str) -> list[str]:
    status, output = saferlhf("settings", *arguments)
    assert status == 0, output
    return output.splitlines()


def test_there_is_a_description_of_every_setting() -> None:
    assert list(DESCRIBED) == list(Settings().flat())


@pytest.mark.parametrize("key", DESCRIBED)
def test_every_setting_explains_itself_in_one_short_line(key: str) -> None:
    text = DESCRIBED[key].text
    assert 3 <= len(text) <= 140 and text == text.strip() and "\n" not in text, text
    assert not text.endswith("."), text


def test_choices_are_those_that_are_accepted() -> None:
    assert DESCRIBED["ppo.macro_action"].choices == ("none", "ngram", "perplexity")
    assert DESCRIBED["ppo.steps"].choices == ()
    choosing = {key: described.choices for key, described in DESCRIBED.items() if described.choices}
    assert len(choosing) > 10
    for key, choices in choosing.items():
        with pytest.raises(SettingsError, match=key.replace(".", r"\.")):
            resolve_settings("tiny", overrides=[f"{key}={'-or-'.join(choices)}"])


def test_without_describe_there_is_a_line_for_each_setting_and_no_more() -> None:
    values = resolve_settings("tiny", 3, ["ppo.steps=5"]).flat()
    assert printed("--profile", "tiny", "--seed", "3", "--set", "ppo.steps=5") == [
        f"{k}={v}" for k, v in values.items()
    ]


def test_described_settings_fit_a_terminal_and_say_all() -> None:
    lines = printed("--describe", "--profile", "tiny")
    assert [line for line in lines if not line.startswith("    ")] == printed("--profile", "tiny")
    assert max(len(line) for line in lines if line.startswith("    ")) <= 100
    text = " ".join(line.strip() for line in lines)
    for described in DESCRIBED.values():
        assert described.text in text


def test_choices_stand_below_the_description() -> None:
    described = DESCRIBED["ppo.lagrangian"]
    assert printed("ppo.lagrangian", "--describe") == [
        "ppo.lagrangian=pid",
        f"    {described.text}",
        "    one of: dual_ascent, pid",
    ]
    assert printed("ppo.clip_ratio", "--describe") == [
        "ppo.clip_ratio=0.2",
        "    epsilon: the probability ratio pi / pi_old is clipped to 1 +- this",
    ]


def test_a_prefix_chooses_the_settings_that_begin_with_it() -> None:
    assert printed("sft.") == [line for line in printed() if line.startswith("sft.")]


@pytest.mark.fault
def test_a_prefix_of_no_setting_is_refused_by_name() -> None:
    status, output = saferlhf("settings", "pppo.")
    assert status == 1 and "no setting begins with 'pppo.'" in output
