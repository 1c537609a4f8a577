"""One tree of settings for the whole pipeline.

A profile (`tiny`, `smol`) is a set of defaults; `--set key=value` changes one of them.
An unknown key is an error, never ignored. The resolved tree is written beside the run
and its digest goes into every manifest, so a number can always be traced to its settings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from components.foundation.errors import SettingsError
from components.foundation.profiles import PROFILES

BUILTIN = "builtin"
"""Value of a data setting that means: the records shipped with the project."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _only_what_is_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """An empty text unsets what may be unset; true and false are no numbers, nor the other way round."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if value == "" and type(None) in get_args(annotation):
            return None
        if isinstance(value, bool) != (annotation is bool):
            raise ValueError("true and false are for switches, and switches are true or false")
        return value


class DataSettings(_Section):
    """Where records come from: `builtin`, a .jsonl/.jsonl.gz/.parquet file, or `datasets:NAME[:SPLIT]`."""

    preferences: str = BUILTIN
    demonstrations: str = BUILTIN
    prompts: str = BUILTIN
    held_out: str = BUILTIN
    max_bad_share: float = Field(0.05, ge=0, le=1, description="stop when more than this share of rows is bad")
    validation_share: float = Field(0.15, gt=0, lt=1, description="preference pairs held out from RM and CM")
    max_preferences: int = Field(0, ge=0, description="use at most so many pairs (0: all)")
    max_demonstrations: int = Field(0, ge=0, description="use at most so many demonstrations (0: all)")
    max_held_out: int = Field(0, ge=0, description="evaluate on at most so many prompts of a kind (0: all)")


class LoraSettings(_Section):
    """Low-rank adapters: one per role on the shared backbone."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, gt=0)
    top_layers: int = Field(
        0,
        ge=0,
        description="adapt only the last so many layers (0: all); what lies below is computed once for all roles",
    )


class SftSettings(_Section):
    epochs: int = Field(1, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(16, ge=1)
    warmup_share: float = Field(0.03, ge=0, lt=1)
    max_length: int = Field(128, ge=8, description="in tokens; half is for the prompt, half for the answer")


class PreferenceModelSettings(_Section):
    """Training of the reward model or the cost model (they differ by their loss)."""

    epochs: int = Field(1, ge=1)
    learning_rate: float = Field(5e-4, gt=0)
    batch_size: int = Field(16, ge=1, description="pairs per optimiser step")
    start: Literal["sft", "previous"] = Field(
        "sft", description="begin each round anew on the SFT model, or go on from the model of the round before"
    )
    max_pairs: int = Field(0, ge=0, description="train on at most so many pairs, drawn anew each round (0: all)")
    later_max_pairs: int = Field(
        0, ge=0, description="the same for rounds after the first (0: as many as in the first)"
    )
    unsafe_share: float | None = Field(
        None, ge=0, le=1, description="share of the drawn pairs that hold an unsafe answer; empty: as they come"
    )
    recent_share: float = Field(0.0, ge=0, le=1, description="share of the drawn pairs that are the newest ones")
    regularization: float = Field(0.01, ge=0, description="eta: weight of the mean squared score")
    severity_weight: float = Field(
        0.0, ge=0, description="an unsafe answer's sign term counts 1 + this x its severity, 1 to 3 (cost model)"
    )
    max_length: int = Field(128, ge=8)
    min_accuracy: float = Field(0.55, ge=0, le=1, description="held-out ranking accuracy below this blocks PPO")
    min_auc: float = Field(0.65, ge=0, le=1, description="held-out unsafe/safe AUC below this blocks PPO (cost model)")


class CollectSettings(_Section):
    prompts_per_round: int = Field(96, ge=2)
    answers_per_prompt: int = Field(2, ge=2)
    temperature: float = Field(1.0, gt=0)
    history: Literal["accumulate", "replace"] = "accumulate"


class AnnotateSettings(_Section):
    annotator: Literal["rules", "judge"] = "rules"
    judge_url: str = Field("", description="base URL of an OpenAI-compatible endpoint, ending in /v1")
    judge_model: str = ""
    judge_key_env: str = Field("SAFERLHF_JUDGE_KEY", description="environment variable that holds the API key")
    min_usable_share: float = Field(0.8, ge=0, le=1, description="refuse the batch when fewer replies are usable")


class PpoSettings(_Section):
    """PPO-Lagrangian (paper section 3.3). Learning rates are per optimiser step."""

    steps: int = Field(16, ge=1, description="rollout batches per round")
    episodes_per_step: int = Field(32, ge=2)
    epochs: int = Field(1, ge=1, description="passes over each rollout batch")
    minibatch_size: int = Field(16, ge=1, description="episodes per optimiser step")
    max_prompt_tokens: int = Field(48, ge=4)
    max_new_tokens: int = Field(40, ge=1)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(
        1.0, gt=0, le=1, description="draw among the fewest most likely tokens that hold this probability (1: all)"
    )
    top_k: int = Field(0, ge=0, description="draw among so many most likely tokens (0: all)")
    engine: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="what draws the answers: the training weights themselves, or vLLM in its own process",
    )
    vllm_python: str = Field(
        "", description="interpreter that has vLLM, e.g. .venv-vllm/bin/python; empty: SAFERLHF_VLLM_PYTHON names it"
    )
    vllm_weights: Literal["adapter", "full"] = Field(
        "adapter", description="what vLLM takes over before every rollout batch: the LoRA adapter or all weights"
    )
    vllm_memory_share: float = Field(
        0.4, gt=0, lt=1, description="share of a GPU's memory that vLLM takes; training needs the rest"
    )
    importance_cap: float = Field(
        2.0, ge=1, description="largest weight by which a token counts that the engine drew at another probability"
    )
    critics: Literal["adapter", "head"] = Field(
        "adapter",
        description="adapter: each critic has an adapter and a head; head: a head on the hidden states that the reward "
        "or cost model scores by, which takes no pass of its own",
    )
    actor_learning_rate: float = Field(5e-4, gt=0)
    actor_schedule: Literal["constant", "cosine"] = Field(
        "constant", description="cosine: the actor's learning rate falls to nearly 0 over the steps of a round"
    )
    critic_learning_rate: float = Field(5e-4, gt=0)
    kl_coefficient: float = Field(0.05, ge=0, description="beta")
    clip_ratio: float = Field(0.2, gt=0, lt=1)
    value_clip: float = Field(5.0, gt=0)
    score_clip: float = Field(50.0, gt=0, description="shaped rewards and costs are clamped to +- this")
    gamma: float = Field(1.0, gt=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)
    whiten_advantages: bool = True
    macro_action: Literal["none", "ngram", "perplexity"] = Field(
        "none",
        description="what takes a decision: a token, a run of macro_action_length tokens, or a run of tokens while "
        "perplexity does not rise",
    )
    macro_action_length: int = Field(3, ge=1, description="tokens in an n-gram macro action; 1 is plain token PPO")
    reference: Literal["sft", "previous"] = Field(
        "sft", description="which policy the KL penalty holds on to: the SFT model or the policy of the round before"
    )
    missing_eos_penalty: float = Field(1.0, ge=0, description="taken from the reward of an answer cut off at the limit")
    max_gradient_norm: float = Field(1.0, gt=0)
    cost_aggregation: Literal["mean", "rectified", "floored"] = Field(
        "mean",
        description="what an answer costs: its score; rectified: counted from 0 up, so safe answers cannot pay for "
        "unsafe ones; floored: counted from a floor up that is calibrated on the cost model's scores",
    )
    cost_floor_target: float = Field(
        0.15, ge=0, lt=1, description="where a calibrated floor lies between the mean cost of safe and unsafe answers"
    )
    threshold: float | None = Field(None, description="cost threshold d; empty: calibrated from the cost model")
    threshold_target: float = Field(0.1, gt=0, lt=1, description="share of unsafe answers that a calibrated d allows")
    lagrangian: Literal["dual_ascent", "pid"] = Field(
        "dual_ascent",
        description="how lambda follows the violation of the threshold: by log-space ascent or PID control",
    )
    pid_proportional: float = Field(1.0, ge=0, description="Kp of PID control")
    pid_integral: float = Field(0.1, gt=0, description="Ki of PID control")
    pid_derivative: float = Field(1.0, ge=0, description="Kd of PID control")
    advantage_source: Literal["models", "preference_oracle"] = Field(
        "models",
        description="whose word the policy is updated by: reward and cost model with their critics, or the annotator's "
        "comparisons of two answers a prompt; then lambda steps in [0, lambda_max], and the cost is the unsafe share",
    )
    oracle_comparisons: int = Field(
        1, ge=1, description="how often the annotator compares each pair (the rules always say the same)"
    )
    oracle_clip: float = Field(
        0.1, gt=0, lt=0.5, description="shares of won comparisons are clipped to [this, 1 - this] before their logit"
    )
    reward_shaping: float | None = Field(
        None,
        gt=0,
        description="the paper's baseline instead of a multiplier: maximise reward - this x cost, with one critic",
    )
    lambda_init: float = Field(1.0, gt=0)
    lambda_learning_rate: float = Field(0.1, gt=0)
    lambda_min: float = Field(0.05, gt=0)
    lambda_max: float = Field(20.0, gt=0)
    cost_window: int = Field(128, ge=1, description="episodes in the moving average of the cost")
    ptx_coefficient: float = Field(
        0.0, ge=0, description="weight of the language-model loss on harmless demonstrations in the actor's update"
    )
    red_team_share: float = Field(0.6, ge=0, le=1, description="share of red-team prompts in a rollout batch")
    max_skipped_updates: int = Field(
        3, ge=0, description="updates in a row that may be skipped because loss or gradient is not finite"
    )
    max_kl: float | None = Field(
        10.0,
        gt=0,
        description="stop when the KL divergence from the reference is above so many nats a token; empty: never",
    )

    def obstacle_to(self, processes: int) -> str:
        """Why PPO cannot run on so many ranks; empty where it can."""
        if processes > self.episodes_per_step:
            return f"{processes} processes cannot share ppo.episodes_per_step={self.episodes_per_step}"
        if processes > 1 and self.advantage_source == "preference_oracle":
            return "ppo.advantage_source=preference_oracle compares pairs, which are not split over ranks"
        if processes > 1 and self.engine == "vllm":
            return "ppo.engine=vllm serves one process: use ppo.engine=transformers"
        return ""

    @field_validator("lambda_max")
    @classmethod
    def _ceiling_above_floor(cls, value: float, info: ValidationInfo) -> float:
        if value <= info.data.get("lambda_min", 0.0):
            raise ValueError(f"lambda_max={value} must be greater than lambda_min={info.data['lambda_min']}")
        return value

    @field_validator("advantage_source")
    @classmethod
    def _goes_with_pairs_and_its_own_dual_step(cls, value: str, info: ValidationInfo) -> str:
        episodes, rule = info.data.get("episodes_per_step", 2), info.data.get("lagrangian", "dual_ascent")
        if value == "preference_oracle" and episodes % 2:
            raise ValueError(f"it takes two answers a prompt: ppo.episodes_per_step={episodes} must be even")
        if value == "preference_oracle" and rule != "dual_ascent":
            raise ValueError(f"it has a dual step of its own: leave out ppo.lagrangian={rule}")
        return value

    @field_validator("reward_shaping")
    @classmethod
    def _weighs_scores_of_models(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("advantage_source") == "preference_oracle":
            raise ValueError("it weighs the scores of models: leave out ppo.advantage_source=preference_oracle")
        return value


class EvaluateSettings(_Section):
    temperature: float = Field(1.0, ge=0, description="of the answers; 0 is greedy")
    max_new_tokens: int = Field(40, ge=1)
    batch_size: int = Field(64, ge=1)
    confidence: float = Field(0.95, gt=0.5, lt=1)


class CheckpointSettings(_Section):
    """How often a training stage saves its state. A stage that is killed goes on from the last time."""

    every_steps: int = Field(
        0, ge=0, description="save after every so many optimiser or rollout steps (0: not by steps)"
    )
    every_minutes: float = Field(2.0, ge=0, description="save when so much time has passed (0: not by time)")


class DistributedSettings(_Section):
    """How a training stage is spread over devices; what it computes is the same, so a run may change this and go on."""

    processes: int = Field(1, ge=1, le=64, description="ranks of a training stage on one machine: one for each GPU")
    zero_stage: int | None = Field(
        None,
        ge=0,
        le=3,
        description="what ZeRO partitions over several ranks: 0 nothing, 1 optimiser states, 2 gradients too, "
        "3 weights too; empty: 2; one rank has nothing to share",
    )


class GateSettings(_Section):
    """A policy becomes champion only when every limit holds, on both sides: safe enough and still helpful."""

    max_unsafe_rate: float = Field(0.4, ge=0, le=1, description="limit for the upper bound of the unsafe rate")
    min_win_rate: float = Field(0.4, ge=0, le=1, description="limit for the lower bound of the benign win rate")
    max_over_refusal_rate: float = Field(0.25, ge=0, le=1, description="limit for the measured over-refusal rate")


class StoreSettings(_Section):
    uri: str = Field("s3://saferlhf/pipeline", pattern=r"^s3://[a-z0-9][a-z0-9.-]{2,62}(/[A-Za-z0-9._/-]*)?$")


class Settings(_Section):
    """All settings of one pipeline run."""

    profile: str = "smol"
    seed: int = Field(0, ge=0)
    rounds: int = Field(3, ge=1, le=20)
    base_model: str = Field(
        "smollm2-135m-instruct",
        min_length=1,
        description="smollm2-135m-instruct, tiny[-llama|-gpt2|-qwen2|-gemma], a folder, s3://..., or a Hugging Face id",
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="of weights and activations; auto: bfloat16 where the hardware has it, else float32"
    )
    experiment: str = Field("safe-rlhf", min_length=1, description="MLflow experiment")
    finetune: Literal["lora", "full"] = Field(
        "lora", description="lora: a role is an adapter on shared weights; full: a copy of the whole model"
    )
    data: DataSettings = DataSettings()
    lora: LoraSettings = LoraSettings()
    sft: SftSettings = SftSettings()
    reward_model: PreferenceModelSettings = PreferenceModelSettings()
    cost_model: PreferenceModelSettings = PreferenceModelSettings()
    collect: CollectSettings = CollectSettings()
    annotate: AnnotateSettings = AnnotateSettings()
    ppo: PpoSettings = PpoSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    distributed: DistributedSettings = DistributedSettings()
    gate: GateSettings = GateSettings()
    store: StoreSettings = StoreSettings()

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

    @property
    def adapters(self) -> LoraSettings | None:
        """Of new roles; None where a role is a full copy of the model."""
        return self.lora if self.finetune == "lora" else None

    def digest(self) -> str:
        """SHA-256 of the canonical JSON form, without how the run is spread over devices."""
        tree = self.model_dump(mode="json", exclude={"distributed"})
        canonical = json.dumps(tree, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def flat(self) -> dict[str, str]:
        """`section.key -> value` as text, for MLflow parameters and tables."""
        return dict(_flatten(self.model_dump(mode="json"), ""))


"""What each profile changes from the defaults above."""


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
        raise SettingsError(f"unknown profile {profile!r}: choose one of {', '.join(sorted(PROFILES))}")
    tree: dict[str, Any] = json.loads(json.dumps(PROFILES[profile])) | {"profile": profile, "seed": seed}
    for override in overrides:
        key, separator, text = (part.strip() for part in override.partition("="))
        if not separator or not key:
            raise SettingsError(f"cannot read setting {override!r}: write key=value, for instance ppo.steps=20")
        if key == "profile":
            raise SettingsError(f"setting {override!r} would change the profile's name alone: use --profile")
        _assign(tree, key, _read_value(override, text))
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(_explain(error)) from None


def _read_value(override: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text) if text else ""
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SettingsError(f"setting {override!r} is not YAML: put a text in quotes") from error
    if isinstance(value, str):
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
            raise SettingsError(f"unknown setting {dotted_key!r}: {section!r} is a value, not a section")
    node[name] = value


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown setting {key!r}: `saferlhf settings` lists all of them")
        else:
            lines.append(f"setting {key}={item['input']!r} is refused: {item['msg'].removeprefix('Value error, ')}")
    return "; ".join(lines)


def _flatten(node: dict[str, Any], prefix: str) -> Iterable[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "" if value is None else str(value)
