"""One tree of settings for the whole pipeline.

A profile (`tiny`, `smol`) is a set of defaults; `--set key=value` changes one of them.
An unknown key is an error, never ignored. The resolved tree is written beside the run
and its digest goes into every manifest, so a number can always be traced to its settings.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args, get_origin

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from components.foundation.errors import SettingsError
from components.foundation.ppo_settings import PpoSettings
from components.foundation.profiles import PROFILES
from components.foundation.setting_sections import (
    AnnotateSettings,
    CheckpointSettings,
    CollectSettings,
    CostModelSettings,
    DataSettings,
    DistributedSettings,
    EvaluateSettings,
    GateSettings,
    LoraSettings,
    PreferenceModelSettings,
    Section,
    ServingSettings,
    SftSettings,
    StartSettings,
    StoreSettings,
)
from components.foundation.untrusted import PROBLEMS_TOLD, one_line, parse_json, parse_yaml, shown

log = logging.getLogger("saferlhf")

_MOST_CHARACTERS = 20_000
"""Of one `key=value`."""


class Settings(Section):
    """All settings of one pipeline run."""

    profile: str = Field("smol", description="name of the set of defaults: --profile chooses it")
    seed: int = Field(0, ge=0, description="seed of every random choice in the run")
    rounds: int = Field(
        3,
        ge=1,
        le=20,
        description="alignment rounds; each collects answers, trains both preference models and the policy, evaluates",
    )
    base_model: str = Field(
        "smollm2-135m-instruct",
        min_length=1,
        description="smollm2-135m-instruct, tiny[-llama|-gpt2|-qwen2|-gemma], a folder, s3://..., or a Hugging Face id",
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="precision of weights and activations; auto: bfloat16 where the hardware has it, else float32",
    )
    experiment: str = Field("safe-rlhf", min_length=1, description="name of the MLflow experiment")
    finetune: Literal["lora", "full"] = Field(
        "lora", description="lora: a role is an adapter on shared weights; full: a copy of the whole model"
    )
    start: StartSettings = StartSettings()
    data: DataSettings = DataSettings()
    lora: LoraSettings = LoraSettings()
    sft: SftSettings = SftSettings()
    reward_model: PreferenceModelSettings = PreferenceModelSettings()
    cost_model: CostModelSettings = CostModelSettings()
    collect: CollectSettings = CollectSettings()
    annotate: AnnotateSettings = AnnotateSettings()
    ppo: PpoSettings = PpoSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    distributed: DistributedSettings = DistributedSettings()
    gate: GateSettings = GateSettings()
    serving: ServingSettings = ServingSettings()
    store: StoreSettings = StoreSettings()

    @field_validator("start")
    @classmethod
    def _a_round_that_there_is(cls, value: StartSettings, info: ValidationInfo) -> StartSettings:
        rounds = info.data.get("rounds")
        if rounds is not None and value.from_round > rounds:
            raise ValueError(f"from_round={value.from_round} is past the last round: the run has rounds={rounds}")
        return value

    @field_validator("distributed")
    @classmethod
    def _work_for_every_rank(cls, value: DistributedSettings, info: ValidationInfo) -> DistributedSettings:
        ppo = info.data.get("ppo")
        if ppo is not None and (obstacle := ppo.obstacle_to(value.processes)):
            raise ValueError(obstacle)
        return value

    @field_validator("ppo")
    @classmethod
    def _vllm_takes_adapters_that_there_are(cls, value: PpoSettings, info: ValidationInfo) -> PpoSettings:
        if info.data.get("finetune") == "full" and value.engine == "vllm" and value.vllm_weights == "adapter":
            raise ValueError("with finetune=full there is no adapter to give to vLLM: set ppo.vllm_weights=full")
        return value

    @field_validator("ppo")
    @classmethod
    def _models_read_whole_answers(cls, value: PpoSettings, info: ValidationInfo) -> PpoSettings:
        """A score is read at the last token: learned and calibrated on cut answers, it means something else."""
        for name in ("reward_model", "cost_model"):
            model = info.data.get(name)
            needed = 2 * max(value.max_prompt_tokens, value.max_new_tokens + 1)  # an answer that was cut gets an EOS
            if model is not None and model.max_length < needed:
                raise ValueError(
                    f"max_prompt_tokens={value.max_prompt_tokens} and max_new_tokens={value.max_new_tokens} do not fit "
                    f"into {name}.max_length={model.max_length}, of which prompt and answer get one half each: set "
                    f"{name}.max_length={needed} or more"
                )
        return value

    @field_validator("ppo")
    @classmethod
    def _a_soft_minimum_is_not_scaled(cls, value: PpoSettings, info: ValidationInfo) -> PpoSettings:
        """That of two scaled numbers is another than their scaled soft minimum."""
        cost_model = info.data.get("cost_model")
        if cost_model is not None and cost_model.readout == "prompt_and_end" and value.cost_margin is not None:
            raise ValueError(
                f"cost_margin={value.cost_margin} scales what the head says, and cost_model.readout=prompt_and_end "
                "takes a soft minimum of that: set cost_model.readout=end, or leave ppo.cost_margin empty"
            )
        return value

    @field_validator("ppo")
    @classmethod
    def _people_cannot_answer_within_a_step(cls, value: PpoSettings, info: ValidationInfo) -> PpoSettings:
        annotate = info.data.get("annotate")
        if annotate is not None and annotate.annotator == "human" and value.advantage_source == "preference_oracle":
            raise ValueError(
                "advantage_source=preference_oracle asks at every step: set annotate.annotator=rules or judge"
            )
        return value

    @property
    def adapters(self) -> LoraSettings | None:
        """Of new roles; None where a role is a full copy of the model."""
        return self.lora if self.finetune == "lora" else None

    def digest(self) -> str:
        """SHA-256 of the canonical JSON form, without how the run is spread over devices."""
        return _digest(self.model_dump(mode="json"))

    def flat(self) -> dict[str, str]:
        """`section.key -> value` as text, for MLflow parameters and tables."""
        return dict(_flatten(self.model_dump(mode="json"), ""))

    def differences(self, earlier: Settings) -> dict[str, str]:
        """`section.key` -> `section.key (value there, value here)` of each setting that counts in the digest and that
        an earlier run has otherwise."""
        before, now = earlier.flat(), self.flat()
        return {
            key: f"{key} ({before.get(key, 'not set')} there, {now.get(key, 'not set')} here)"
            for key in dict.fromkeys([*now, *before])
            if now.get(key) != before.get(key) and not key.startswith("distributed.")
        }


@dataclass(frozen=True)
class RecordedSettings:
    """Settings as a run has recorded them, to be shown: another version may have had others than Settings has.

    Attributes:
        flat: `section.key -> value` as text.
        digest: that of the manifests of what the run committed.
    """

    flat: Mapping[str, str]
    digest: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """What some version's `Settings.model_dump_json` wrote.

        Raises:
            SettingsError: it is something else.
        """
        try:
            tree = parse_json(text)
            if isinstance(tree, dict):
                return cls(dict(_flatten(tree, "")), _digest(tree))
            reason = f"{shown(tree)} is no mapping"
        except (ValueError, RecursionError) as error:
            reason = one_line(error)
        raise SettingsError(f"these are no settings: {reason}")


@dataclass(frozen=True)
class SettingDescription:
    """What a setting is for, and what it may be where there are few choices.

    Attributes:
        text: one line.
        choices: all values that are allowed; empty where they are not listed.
    """

    text: str
    choices: tuple[str, ...]


def describe_settings(section: type[Section] = Settings, prefix: str = "") -> dict[str, SettingDescription]:
    """`section.key` -> its description, in the order of `Settings.flat`."""
    described: dict[str, SettingDescription] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            described |= describe_settings(kind, f"{prefix}{name}.")
        else:
            choices = get_args(kind) if get_origin(kind) is Literal else ()
            described[f"{prefix}{name}"] = SettingDescription(field.description or "", choices)
    return described


def resolve_settings(profile: str, seed: int = 0, overrides: Iterable[str] = ()) -> Settings:
    """Profile plus `key=value` overrides -> validated settings.

    Args:
        profile: name in PROFILES.
        seed: seed of every random choice in the run.
        overrides: `section.key=value` strings; the value is read as YAML, so `1e-3`, `true`, `null` mean what they
            say; nothing at all is the empty text, or unsets a setting that may be unset.

    Raises:
        SettingsError: unknown profile or key, or a value out of range; the message names the key and the value.
    """
    if profile not in PROFILES:
        raise SettingsError(f"unknown profile {shown(profile)}: choose one of {', '.join(sorted(PROFILES))}")
    tree: dict[str, Any] = json.loads(json.dumps(PROFILES[profile])) | {"profile": profile, "seed": seed}
    for override in overrides:
        key, separator, text = (part.strip() for part in override.partition("="))
        if not separator or not key:
            raise SettingsError(f"cannot read setting {shown(override)}: write key=value, for instance ppo.steps=20")
        if key == "profile":
            raise SettingsError(f"setting {shown(override)} would change the profile's name alone: use --profile")
        _assign(tree, key, _read_value(override, text))
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(_explain(error)) from None


def read_settings(text: str) -> Settings:
    """What `Settings.model_dump_json` wrote.

    Raises:
        SettingsError: it is something else, or a value is refused.
    """
    try:
        return Settings.model_validate_json(text)
    except ValidationError as error:
        raise SettingsError(_explain(error)) from None


def read_settings_of_any_version(text: str) -> Settings:
    """What some version's `Settings.model_dump_json` wrote, as far as this version has such settings.

    For a run that has ended: whoever goes on with one needs all of them, as `read_settings` reads them.

    Raises:
        SettingsError: it is something else.
    """
    try:
        tree = parse_json(text)
        Settings.model_validate(tree)
    except ValidationError as error:
        unknown = [key for item in error.errors(include_url=False) if (key := _taken_out(tree, item["loc"]))]
        log.warning("settings of another version are left out: %s", ", ".join(map(shown, unknown[:PROBLEMS_TOLD])))
    except ValueError as error:
        raise SettingsError(f"these are no settings: {one_line(error)}") from None
    return read_settings(json.dumps(tree))


def _taken_out(tree: Any, place: Sequence[int | str]) -> str:
    """Take one value, and no section, out of a tree -> its key; empty where there is none at that place."""
    *sections, name = place or ("",)
    for section in sections:
        tree = tree.get(section) if isinstance(tree, dict) else None
    if not isinstance(tree, dict) or isinstance(tree.get(name, {}), dict):
        return ""
    del tree[name]
    return ".".join(map(str, place))


def _read_value(override: str, text: str) -> Any:
    if len(override) > _MOST_CHARACTERS:
        raise SettingsError(f"setting {shown(override)} has more than {_MOST_CHARACTERS} characters: put it in a file")
    try:
        value = parse_yaml(text) if text else ""
    except ValueError as error:
        raise SettingsError(f"setting {shown(override)} is not YAML ({error}): put a text in quotes") from error
    if isinstance(value, str) and not text.lstrip().startswith(("'", '"')):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as text
        except ValueError:
            return value
    return value


def _assign(tree: dict[str, Any], dotted_key: str, value: Any) -> None:
    *sections, name = dotted_key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise SettingsError(f"unknown setting {shown(dotted_key)}: {shown(section)} is a value, not a section")
    node[name] = value


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False)[:PROBLEMS_TOLD]:
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown setting {shown(key)}: `saferlhf settings` lists all of them")
        else:
            reason = one_line(item["msg"].removeprefix("Value error, "))
            lines.append(f"setting {one_line(key)}={shown(item['input'])} is refused: {reason}")
    return "; ".join(lines)


def _digest(tree: Mapping[str, Any]) -> str:
    counted = {key: value for key, value in tree.items() if key != "distributed"}
    canonical = json.dumps(counted, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _flatten(node: dict[str, Any], prefix: str) -> Iterable[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "" if value is None else str(value)
