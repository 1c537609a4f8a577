"""What a file of schedules may hold, and what is refused of it before anything is asked of a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.foundation.errors import SettingsError
from pipelines.kubeflow.cron import check_cron
from pipelines.kubeflow.schedule_file import read_schedules

GOOD = """
schedules:
  - name: weekly
    cron: "0 0 2 * * MON"
    start: 2026-12-01T00:00:00Z
    end: 2027-12-01T00:00:00+01:00
    profile: tiny
    seed: 7
    settings: [ppo.steps=2]
    version: 0.1.0-5f2c9a1e77b0
    experiment: nightly
    service_account: saferlhf
    enabled: false
  - {name: monthly, cron: '0  0 3 1 * ?', version: pipeline.yaml}
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "schedules.yaml"
    file.write_text(text)
    return file


def test_every_field_is_read_and_the_others_have_defaults(tmp_path: Path) -> None:
    weekly, monthly = read_schedules(written(tmp_path, GOOD))
    assert weekly.start is not None and weekly.start.isoformat() == "2026-12-01T00:00:00+00:00"
    assert (weekly.choice.profile, weekly.choice.seed, weekly.choice.overrides) == ("tiny", 7, ("ppo.steps=2",))
    assert (weekly.version, weekly.experiment, weekly.enabled) == ("0.1.0-5f2c9a1e77b0", "nightly", False)
    assert (monthly.cron, monthly.profile, monthly.seed) == ("0 0 3 1 * ?", "smol", 0)
    assert (monthly.experiment, monthly.enabled) == ("safe-rlhf", None)
    assert monthly.version == str(tmp_path / "pipeline.yaml")  # beside the file


@pytest.mark.fault
@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("seed: 7", "sede: 7", "unknown field 'schedules.0.sede'"),
        ("schedules:", "schedule:", "unknown field 'schedule'"),
        ('cron: "0 0 2 * * MON"', "", "schedules.0.cron is missing"),
        ('"0 0 2 * * MON"', '"0 2 * * MON"', "has 5 fields, and KFP wants 6, seconds first: write '0 0 2 * * MON'"),
        ("name: weekly", "name: Weekly", "schedules.0.name='Weekly' is refused"),
        ("name: monthly", "name: weekly", "has 2 schedules with the name 'weekly'"),
        ("2027-12-01T00:00:00+01:00", "2026-11-01T00:00:00Z", "end 2026-11-01T00:00:00+00:00 is not after start 2026"),
        ("2026-12-01T00:00:00Z", "2026-12-01T00:00:00", "schedules.0.start"),
        ("[ppo.steps=2]", "[ppo.stepz=2]", "schedule weekly: unknown setting 'ppo.stepz'"),
        (
            "[ppo.steps=2]",
            "[data.preferences=my.jsonl]",
            "weekly: data.preferences=my.jsonl is a file of this",
        ),
        ("[ppo.steps=2]", "[base_model=./mine]", "schedule weekly: base_model=./mine is a folder of this machine"),
        ("profile: tiny", "profile: huge", "schedule weekly: unknown profile 'huge'"),
        ("seed: 7", "seed: -1", "schedules.0.seed=-1 is refused"),
        ("enabled: false", "enabled: perhaps", "schedules.0.enabled='perhaps' is refused"),
        (GOOD, "schedules: []", "schedules=[] is refused"),
        (GOOD, "a: [", "is not YAML"),
        (GOOD, "", "None is refused"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    assert old in GOOD
    with pytest.raises(SettingsError) as refused:
        read_schedules(written(tmp_path, GOOD.replace(old, new)))
    assert sentence in str(refused.value)


@pytest.mark.fault
def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.yaml cannot be read: No such file"):
        read_schedules(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "cron",
    [
        "0 0 2 * * 1",
        "0 */15 9-17 ? * mon-fri",
        "59 59 23 31 12 6",
        "0 0 0 1,15 JAN,jul *",
        "5/10 0 0 * * SUN",
        "* * * * * ?",
    ],
)
def test_what_kfp_can_read_is_accepted(cron: str) -> None:
    check_cron(cron)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("cron", "sentence"),
    [
        ("0 2 * * 1", "has 5 fields, and KFP wants 6, seconds first: write '0 0 2 * * 1'"),
        ("@weekly", "has 1 fields"),
        ("", "has 0 fields"),
        ("0 0 2 * * 1 2027", "has 7 fields"),
        ("60 0 2 * * 1", "'60' is no second: write 0 to 59"),
        ("0 60 2 * * 1", "'60' is no minute"),
        ("0 0 24 * * 1", "'24' is no hour"),
        ("0 0 2 0 * 1", "'0' is no day of month: write 1 to 31"),
        ("0 0 2 * 13 1", "'13' is no month: write 1 to 12 or jan..."),
        ("0 0 2 * * 7", "'7' is no day of week: write 0 to 6 or sun..."),
        ("0 0 2 * * monday", "'monday' is no day of week"),
        ("0 0 17-9 * * 1", "'17-9' is no hour"),
        ("0 */0 2 * * 1", "'*/0' is no minute"),
        ("0 1, 2 * * 1", "'1,' is no minute"),
        ("0 -1 2 * * 1", "'-1' is no minute"),
        ("0 0 2 L * ?", "'L' is no day of month"),
    ],
)
def test_what_kfp_cannot_read_is_refused_by_field(cron: str, sentence: str) -> None:
    with pytest.raises(SettingsError) as refused:
        check_cron(cron)
    assert sentence in str(refused.value)


def test_a_run_may_start_at_any_round_that_its_version_may_have(tmp_path: Path) -> None:
    """How many rounds there are, the version says, not the profile."""
    settings = "[start.from_run=r, start.from_round=5]"
    text = f"schedules:\n  - {{name: late, cron: '0 0 3 1 * ?', version: '1', settings: {settings}}}\n"
    (late,) = read_schedules(written(tmp_path, text))
    assert late.choice.overrides == ("start.from_run=r", "start.from_round=5")
