"""Settings: what is accepted, what is refused, and what the digest stands for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import components
from components.foundation.errors import SettingsError
from components.foundation.profiles import PROFILES
from components.foundation.settings import Settings, resolve_settings

CHOICES = {
    "ppo.max_prompt_tokens": "47",  # more would not fit into the reward model
    "ppo.lambda_start": "previous",
    "ppo.threshold_answers": "held_out",
    "serving.memory": "8Gi",
    "dtype": "float32",
    "data.history": "replace",
    "annotate.annotator": "judge",
    "ppo.actor_schedule": "constant",
    "ppo.cost_aggregation": "rectified",
    "reward_model.start": "sft",
    "cost_model.start": "sft",
    "cost_model.safe_pairs": "ranked",
    "cost_model.readout": "end",
    "ppo.critics": "adapter",
    "ppo.ptx_demonstrations": "harmless",
    "ppo.engine": "vllm",
    "ppo.importance_cap": "3.0",
    "ppo.vllm_weights": "full",
    "ppo.lagrangian": "dual_ascent",
    "ppo.advantage_source": "preference_oracle",
    "ppo.macro_action": "ngram",
    "ppo.reference": "previous",
    "finetune": "full",
    "store.uri": "s3://another-bucket/elsewhere",
}


def leaves(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def another(key: str, value: Any) -> str:
    """A valid value of a setting that differs from the one it has."""
    if key in CHOICES:
        return CHOICES[key]
    if isinstance(value, bool):
        return str(not value).lower()
    if isinstance(value, int):
        return str(value + 1)
    if isinstance(value, float):
        return str(value * 0.9 or 0.5)
    return "0.5" if value is None else "another"


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_profiles_resolve(profile: str) -> None:
    resolved = resolve_settings(profile, seed=7)
    assert (resolved.profile, resolved.seed) == (profile, 7)
    for key, value in leaves(PROFILES[profile]).items():
        assert leaves(resolved.model_dump())[key] == value


def quantities() -> dict[str, tuple[str, str]]:
    """Setting -> (default, value in smol) by the tables of the paper's quantities; a cell has a value each setting."""
    readme = (Path(components.__file__).parent / "ppo_lagrangian" / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## The paper's quantities\n")[2].partition("\n## ")[0]
    found: dict[str, tuple[str, str]] = {}
    for quantity, *cells in re.findall(r"^\| (.+?) \| .+? \| (.+?) \| (.+?) \|", section, re.MULTILINE):
        if keys := re.findall(r"`(\w+\.\w+)`", quantity):
            found |= zip(keys, zip(*(cell.split(", ") for cell in cells), strict=True), strict=True)
    return found


def test_the_readme_tells_the_papers_quantities_as_they_are_set() -> None:
    def told(value: Any) -> str:
        return "none" if value is None else value if isinstance(value, str) else f"{float(value)}"

    def read(cell: str) -> str:
        return f"{float(cell)}" if re.match(r"[0-9]", cell) else cell

    table = quantities()
    for column, resolved in enumerate((Settings(), resolve_settings("smol"))):
        values = leaves(resolved.model_dump())
        assert {key: read(cells[column]) for key, cells in table.items()} == {key: told(values[key]) for key in table}
    sections = {name: PROFILES["smol"][name] for name in ("sft", "reward_model", "cost_model", "ppo")}
    assert leaves(sections).keys() <= table.keys()  # what the profile changes is told


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("sft.learning_rate=1e-3", "sft.learning_rate", 0.001),
        ("sft.learning_rate=2.5E-4", "sft.learning_rate", 0.00025),
        ('experiment="2024"', "experiment", "2024"),
        ("experiment='1e-3'", "experiment", "1e-3"),
        ("ppo.steps=2e1", "ppo.steps", 20),
        ("ppo.whiten_advantages=false", "ppo.whiten_advantages", False),
        ("ppo.whiten_advantages=true", "ppo.whiten_advantages", True),
        ("ppo.threshold=null", "ppo.threshold", None),
        ("ppo.threshold=", "ppo.threshold", None),
        ("ppo.threshold= ", "ppo.threshold", None),
        ("ppo.threshold=-3", "ppo.threshold", -3.0),
        (" ppo.steps = 20 ", "ppo.steps", 20),
        ("base_model=./folder with spaces", "base_model", "./folder with spaces"),
        ("annotate.judge_url=http://127.0.0.1:8000/v1?a=b", "annotate.judge_url", "http://127.0.0.1:8000/v1?a=b"),
        ('annotate.judge_url=""', "annotate.judge_url", ""),
        ("annotate.judge_url=", "annotate.judge_url", ""),
        ("ppo={steps: 3, epochs: 2}", "ppo.epochs", 2),
        ("seed=11", "seed", 11),
    ],
)
def test_values_are_read_as_yaml(override: str, key: str, expected: object) -> None:
    value = leaves(resolve_settings("smol", overrides=[override]).model_dump())[key]
    assert value == expected
    assert type(value) is type(expected)


def test_an_override_changes_its_key_alone() -> None:
    before = leaves(resolve_settings("tiny").model_dump())
    after = leaves(resolve_settings("tiny", overrides=["ppo.steps=5", "reward_model.epochs=3"]).model_dump())
    assert {key: value for key, value in after.items() if before[key] != value} == {
        "ppo.steps": 5,
        "reward_model.epochs": 3,
    }
    assert leaves(resolve_settings("tiny").model_dump()) == before  # and the profile itself is left alone


def test_the_last_override_wins() -> None:
    assert resolve_settings("smol", overrides=["rounds=1", "rounds=2"]).rounds == 2


@pytest.mark.fault
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ppo.stepz=3", ["ppo.stepz", "unknown"]),
        ("nonsense=3", ["nonsense", "unknown"]),
        ("reward_model.min_auc=0.9", ["reward_model.min_auc", "unknown"]),
        ("ppo.steps.deeper=3", ["ppo.steps"]),
        ("base_model.x=3", ["base_model", "x"]),
        ("ppo.steps", ["ppo.steps", "key=value"]),
        ("=3", ["=3", "key=value"]),
        ("ppo.steps=0", ["ppo.steps", "0"]),
        ("ppo.steps=2.5", ["ppo.steps", "2.5"]),
        ("ppo.steps=[3]", ["ppo.steps", "[3]"]),
        ("ppo.steps=many", ["ppo.steps", "many"]),
        ("ppo=3", ["ppo", "3"]),
        ("rounds=21", ["rounds", "21"]),
        ("seed=-1", ["seed", "-1"]),
        ("ppo.gamma=1.01", ["ppo.gamma", "1.01"]),
        ("ppo.clip_ratio=1", ["ppo.clip_ratio", "1"]),
        ("ppo.max_new_tokens=48", ["max_new_tokens=48", "reward_model.max_length=96", "=98 or more"]),
        ("cost_model.max_length=94", ["max_prompt_tokens=48", "cost_model.max_length=94", "=96 or more"]),
        ("ppo.lambda_max=0.01", ["lambda_max", "0.01", "lambda_min", "0.05"]),
        ("ppo.lambda_init=30", ["lambda_init", "30", "lambda_max"]),
        ("ppo.lambda_init=0.01", ["lambda_init", "0.01", "lambda_min", "0.05"]),
        ("ppo.lambda_min=30", ["lambda_min", "30"]),
        ("data.validation_share=0", ["data.validation_share", "0"]),
        ("data.validation_share=1", ["data.validation_share", "1"]),
        ("evaluate.confidence=0.5", ["evaluate.confidence", "0.5"]),
        ("gate.max_unsafe_rate=-0.1", ["gate.max_unsafe_rate", "-0.1"]),
        ("collect.answers_per_prompt=1", ["collect.answers_per_prompt", "1"]),
        ("dtype=float16", ["dtype", "float16"]),
        ("store.uri=file:///tmp", ["store.uri", "file:///tmp"]),
        ("base_model=", ["base_model"]),
        ("ppo.steps=", ["ppo.steps"]),
        ("ppo.steps=true", ["ppo.steps", "True"]),
        ("ppo.threshold=true", ["ppo.threshold", "True"]),
        ("ppo.whiten_advantages=1", ["ppo.whiten_advantages", "1"]),
        ("data.prompts=2024-13-45", ["data.prompts", "2024-13-45"]),
        ("profile=tiny", ["profile=tiny", "--profile"]),
        ("profile=zzz", ["profile=zzz", "--profile"]),
    ],
)
def test_row_31_bad_overrides_are_refused_by_name_and_value(override: str, words: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve_settings("smol", overrides=[override])
    message = str(caught.value)
    assert all(word in message for word in words), message


@pytest.mark.fault
@pytest.mark.parametrize("text", ["[1", "{", "@home", "!!python/object:os.system x", '"open', "a: b: c"])
def test_malformed_yaml_is_a_settings_error(text: str) -> None:
    with pytest.raises(SettingsError, match="base_model"):
        resolve_settings("smol", overrides=[f"base_model={text}"])


@pytest.mark.fault
@pytest.mark.parametrize("value", [".inf", ".nan", "-inf", "1e400"])
@pytest.mark.parametrize("key", ["sft.learning_rate", "ppo.threshold"])
def test_numbers_that_are_not_finite_are_refused(key: str, value: str) -> None:
    """JSON has no infinity: run.json would hold null, and the later stages would read other settings or none."""
    with pytest.raises(SettingsError, match=key):
        resolve_settings("smol", overrides=[f"{key}={value}"])


@pytest.mark.fault
def test_row_31_every_bad_setting_is_named_at_once() -> None:
    with pytest.raises(SettingsError, match=r"ppo\.steps.*sft\.epochs|sft\.epochs.*ppo\.steps"):
        resolve_settings("smol", overrides=["ppo.steps=0", "sft.epochs=0"])


@pytest.mark.fault
def test_unknown_profiles_are_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"'large'.*smol, tiny"):
        resolve_settings("large")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ppo.episodes_per_step=7", r"two answers a prompt.*episodes_per_step=7 must be even"),
        ("ppo.lagrangian=pid", r"dual step of its own: set ppo.lagrangian=dual_ascent, not pid"),
        ("ppo.ptx_demonstrations=safe", r"ppo\.ptx_demonstrations.*asks the cost model"),
        ("ppo.reward_shaping=2", r"ppo\.reward_shaping=2.*scores of models"),
        ("ppo.oracle_clip=0.5", r"ppo\.oracle_clip=0\.5"),
        ("ppo.oracle_comparisons=0", r"ppo\.oracle_comparisons=0"),
        ("annotate.annotator=human", r"asks at every step.*annotate\.annotator=rules or judge"),
    ],
)
def test_what_does_not_go_with_a_preference_oracle_is_refused(override: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        resolve_settings("tiny", overrides=["ppo.advantage_source=preference_oracle", override])


def test_a_cost_that_is_a_soft_minimum_is_not_scaled() -> None:
    overrides = ["cost_model.readout=prompt_and_end", "ppo.cost_margin=2"]
    with pytest.raises(SettingsError, match=r"cost_margin=2\.0 scales.*cost_model\.readout=end"):
        resolve_settings("tiny", overrides=overrides)
    assert resolve_settings("tiny", overrides=[overrides[1]]).ppo.cost_margin == 2


def test_settings_are_frozen() -> None:
    resolved = resolve_settings("smol")
    with pytest.raises(ValidationError):
        resolved.rounds = 1  # type: ignore[misc]
    with pytest.raises(ValidationError):
        resolved.ppo.steps = 1  # type: ignore[misc]


def test_every_setting_enters_the_digest() -> None:
    before = resolve_settings("smol")
    digests = {"": before.digest()}
    for key, value in leaves(before.model_dump()).items():
        if key != "profile" and not key.startswith("distributed."):  # changes who computes, not what
            # to start from a run takes both settings of it, and comparisons refuse what smol has
            pair = ["start.from_run=earlier", "start.from_round=2"] if key.startswith("start.") else []
            if key == "ppo.advantage_source":
                pair.append("ppo.lagrangian=dual_ascent")
            if key == "ppo.cost_margin":
                pair.append("cost_model.readout=end")
            digests[key] = resolve_settings("smol", overrides=[*pair, f"{key}={another(key, value)}"]).digest()
    digests["profile"] = resolve_settings("tiny").digest()
    assert (
        len(set(digests.values())) == len(digests) == len(before.flat()) + 1 - len(before.model_dump()["distributed"])
    )


def test_a_run_may_go_on_with_another_number_of_ranks() -> None:
    spread = resolve_settings("smol", overrides=["distributed.processes=8", "distributed.zero_stage=3"])
    assert spread.digest() == resolve_settings("smol").digest()


@pytest.mark.fault
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("distributed.processes=0", "distributed.processes=0 is refused"),
        ("distributed.zero_stage=4", "distributed.zero_stage=4 is refused"),
        ("distributed.processes=37", "37 processes cannot share ppo.episodes_per_step=36"),
        (
            "ppo.lagrangian=dual_ascent ppo.ptx_demonstrations=harmless "
            "ppo.advantage_source=preference_oracle distributed.processes=2",
            "which are not split over ranks",
        ),
        ("ppo.engine=vllm distributed.processes=2", "ppo.engine=vllm serves one process"),
        ("ppo.engine=vllm finetune=full", "set ppo.vllm_weights=full"),
        ("finetune=qlora", "finetune='qlora' is refused"),
    ],
)
def test_ways_to_spread_a_run_that_cannot_be_are_refused_by_name(override: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        resolve_settings("smol", overrides=override.split())


def test_digest_is_the_same_in_every_process_and_order() -> None:
    overrides = ["ppo.steps=5", "rounds=2", "ppo.threshold=0.5"]
    digest = resolve_settings("tiny", 3, overrides).digest()
    assert len(digest) == 64
    assert resolve_settings("tiny", 3, overrides[::-1]).digest() == digest
    program = (
        "import sys; from components.foundation.settings import resolve_settings as r;"
        "print(r('tiny', 3, sys.argv[1:]).digest())"
    )
    other = subprocess.run([sys.executable, "-c", program, *overrides], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest


@given(
    profile=st.sampled_from(sorted(PROFILES)),
    rate=st.floats(1e-6, 1.0),
    threshold=st.none() | st.floats(-50, 50),
    steps=st.integers(1, 10**6),
)
@settings(deadline=None, max_examples=30)
def test_json_and_flat_forms_give_the_settings_back(
    profile: str, rate: float, threshold: float | None, steps: int
) -> None:
    """The profile is the one setting that --set may not change."""
    overrides = [f"sft.learning_rate={rate}", f"ppo.steps={steps}"]
    overrides += [] if threshold is None else [f"ppo.threshold={threshold}"]
    resolved = resolve_settings(profile, 1, overrides)
    assert resolved.sft.learning_rate == rate
    again = Settings.model_validate(json.loads(resolved.model_dump_json()))
    assert (again, again.digest()) == (resolved, resolved.digest())
    flat = resolved.flat()
    assert set(flat) == set(leaves(resolved.model_dump()))
    read_back = resolve_settings("smol", 0, [f"{key}={value}" for key, value in flat.items() if key != "profile"])
    assert read_back.model_copy(update={"profile": flat["profile"]}) == resolved
