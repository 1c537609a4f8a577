"""The sections of the settings: what each stage and service may be told. PPO's are in `ppo_settings.py`."""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

BUILTIN = "builtin"
"""Value of a data setting that means: the records shipped with the project."""


class Section(BaseModel):
    """A named group of settings. Unknown keys are refused, and a value is of the kind that its setting asks for."""

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


class DataSettings(Section):
    """Where records come from: `builtin`, a .jsonl/.jsonl.gz/.parquet file, or `datasets:NAME[:SPLIT]`."""

    preferences: str = BUILTIN
    demonstrations: str = BUILTIN
    prompts: str = BUILTIN
    held_out: str = BUILTIN
    max_bad_share: float = Field(0.05, ge=0, le=1, description="stop when more than this share of rows is bad")
    validation_share: float = Field(0.15, gt=0, lt=1, description="preference pairs held out from RM and CM")
    history: Literal["accumulate", "replace"] = Field(
        "accumulate", description="what a round's models learn from: all preferences so far, or the round's own alone"
    )
    max_preferences: int = Field(0, ge=0, description="use at most so many pairs (0: all)")
    max_demonstrations: int = Field(0, ge=0, description="use at most so many demonstrations (0: all)")
    max_held_out: int = Field(0, ge=0, description="evaluate on at most so many prompts of a kind (0: all)")
    min_new_pairs: int = Field(
        0, ge=0, description="end early with fewer preference pairs that the champion's run did not have (0: go on)"
    )
    min_new_share: float = Field(0.0, ge=0, le=1, description="the same, as a share of the run's pairs (0: go on)")


class StartSettings(Section):
    """Start from an earlier run's results in the same store; `saferlhf run` and `submit` have options for it."""

    from_run: str = Field("", description="its id")
    from_round: int = Field(0, ge=0, le=20, description="first round to run anew; what is before it is taken over")

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if bool(self.from_run) != bool(self.from_round):
            raise ValueError("from_run and from_round go together: which run, and the first round to run anew")
        return self


class LoraSettings(Section):
    """Low-rank adapters: one per role on the shared backbone."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, gt=0)
    top_layers: int = Field(
        0,
        ge=0,
        description="adapt only the last so many layers (0: all); what lies below is computed once for all roles",
    )


class SftSettings(Section):
    epochs: int = Field(1, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(16, ge=1)
    warmup_share: float = Field(0.03, ge=0, lt=1)
    max_length: int = Field(128, ge=8, description="in tokens; half is for the prompt, half for the answer")


class PreferenceModelSettings(Section):
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


class CollectSettings(Section):
    prompts_per_round: int = Field(96, ge=2)
    answers_per_prompt: int = Field(2, ge=2)
    temperature: float = Field(1.0, gt=0)


class AnnotateSettings(Section):
    annotator: Literal["rules", "judge", "human"] = Field(
        "rules", description="human: the run ends as waiting until people's labels are imported"
    )
    judge_url: str = Field("", description="base URL of an OpenAI-compatible endpoint, ending in /v1")
    judge_model: str = ""
    judge_key_env: str = Field("SAFERLHF_JUDGE_KEY", description="environment variable that holds the API key")
    min_usable_share: float = Field(0.8, ge=0, le=1, description="refuse the batch when fewer replies are usable")
    overlap_share: float = Field(0.2, ge=0, le=1, description="of the items, for several people (human)")
    overlap_annotators: int = Field(3, ge=2, le=100, description="how many label such an item (human)")
    gold_share: float = Field(0.1, ge=0, le=1, description="known items to mix in, as a share of the pairs (human)")
    exclude_careless: bool = Field(False, description="leave out the labels of annotators with a flag (human)")


class EvaluateSettings(Section):
    temperature: float = Field(1.0, ge=0, description="of the answers; 0 is greedy")
    max_new_tokens: int = Field(40, ge=1)
    batch_size: int = Field(64, ge=1)
    confidence: float = Field(0.95, gt=0.5, lt=1)


class CheckpointSettings(Section):
    """How often a training stage saves its state. A stage that is killed goes on from the last time."""

    every_steps: int = Field(
        0, ge=0, description="save after every so many optimiser or rollout steps (0: not by steps)"
    )
    every_minutes: float = Field(2.0, ge=0, description="save when so much time has passed (0: not by time)")


class DistributedSettings(Section):
    """How a training stage is spread over devices; what it computes is the same, so a run may change this and go on."""

    processes: int = Field(1, ge=1, le=64, description="ranks of a training stage on one machine: one for each GPU")
    zero_stage: int | None = Field(
        None,
        ge=0,
        le=3,
        description="what ZeRO partitions over several ranks: 0 nothing, 1 optimiser states, 2 gradients too, "
        "3 weights too; empty: 2; one rank has nothing to share",
    )
    activation_checkpointing: bool = Field(
        False,
        description="hold each layer's input for the backward pass and compute the layer again there: far less "
        "memory, a third more work in training",
    )


class GateSettings(Section):
    """A policy becomes champion only when every limit holds, on both sides: safe enough and still helpful."""

    max_unsafe_rate: float = Field(0.4, ge=0, le=1, description="limit for the upper bound of the unsafe rate")
    min_win_rate: float = Field(0.4, ge=0, le=1, description="limit for the lower bound of the benign win rate")
    max_unsafe_increase: float = Field(
        0.15,
        ge=-1,
        le=1,
        description="limit for the upper bound of how much more often than the champion the policy is unsafe",
    )
    min_common_share: float = Field(
        0.9,
        gt=0,
        le=1,
        description="at least this share of its and the champion's prompts must have been judged for both",
    )
    max_over_refusal_rate: float = Field(0.25, ge=0, le=1, description="limit for the measured over-refusal rate")
    regressions: str = Field(BUILTIN, description="prompts that no later policy may get wrong again: see data.*")
    max_regressions: int = Field(
        0, ge=0, description="of the regression prompts that the champion got right, at most so many may be wrong now"
    )
    max_wrong_share: float = Field(
        0.45, ge=0, le=1, description="limit for the share of wrong regression prompts where there is no champion"
    )


class ServingSettings(Section):
    """The KServe InferenceService that a champion is handed over as, and the one question before registration."""

    name: str = Field("saferlhf-policy", pattern=r"^[a-z]([-a-z0-9]{0,48}[a-z0-9])?$", description="of the service")
    service_account: str = Field(
        "saferlhf-serving", pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$", description="it may read the store"
    )
    canary_share: float = Field(
        1.0, ge=0, le=1, description="of the traffic that a new champion gets at first; the last one keeps the rest"
    )
    cpu: float = Field(4, gt=0, description="cores of a replica, requested and at most")
    memory: str = Field("16Gi", pattern=r"^[1-9][0-9]*(Mi|Gi|Ti|M|G|T)$", description="the same")
    gpus: int = Field(1, ge=0, description="of a replica; with 0, vLLM must be built for CPUs")
    apply: bool = Field(
        False, description="a promotion also gives it to the cluster and namespace of the run; else it is only written"
    )
    trial_seconds: float = Field(
        300, gt=0, description="patience with the exported model that is asked one question before it is registered"
    )


class StoreSettings(Section):
    uri: str = Field("s3://saferlhf/pipeline", pattern=r"^s3://[a-z0-9][a-z0-9.-]{2,62}(/[A-Za-z0-9._/-]*)?$")
