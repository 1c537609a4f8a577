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
    """Where records come from: `builtin`, a .jsonl/.jsonl.gz/.parquet file (also in S3), `datasets:NAME[:SPLIT]`."""

    preferences: str = Field(
        BUILTIN,
        description="pairs for the reward and cost model: builtin, a .jsonl, .jsonl.gz or .parquet file, s3://... "
        "or datasets:NAME[:SPLIT]",
    )
    demonstrations: str = Field(
        BUILTIN, description="answers that SFT (and ppo.ptx_coefficient) imitates: a source like data.preferences"
    )
    prompts: str = Field(
        BUILTIN, description="what the policy is asked in collection and PPO: a source like data.preferences"
    )
    held_out: str = Field(BUILTIN, description="what it is asked in evaluation alone: a source like data.preferences")
    max_bad_share: float = Field(0.05, ge=0, le=1, description="stop when more than this share of rows is bad")
    validation_share: float = Field(
        0.15, gt=0, lt=1, description="share of the preferences held out from the reward and cost model, by prompt"
    )
    history: Literal["accumulate", "replace"] = Field(
        "accumulate", description="what a round's models learn from: all preferences so far, or the round's own alone"
    )
    max_preferences: int = Field(0, ge=0, description="use at most so many pairs (0: all)")
    max_demonstrations: int = Field(0, ge=0, description="use at most so many demonstrations (0: all)")
    max_held_out: int = Field(0, ge=0, description="evaluate on at most so many prompts of a kind (0: all)")
    min_new_pairs: int = Field(
        0, ge=0, description="end early with fewer preference pairs that the champion's run did not have (0: go on)"
    )
    min_new_share: float = Field(
        0.0, ge=0, le=1, description="like min_new_pairs, as a share of the run's preference pairs (0: go on)"
    )


class StartSettings(Section):
    """Start from an earlier run's results in the same store; `saferlhf run` and `submit` have options for it."""

    from_run: str = Field("", description="id of the earlier run; empty: start anew")
    from_round: int = Field(0, ge=0, le=20, description="first round to run anew; what is before it is taken over")

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if bool(self.from_run) != bool(self.from_round):
            raise ValueError("from_run and from_round go together: which run, and the first round to run anew")
        return self


class LoraSettings(Section):
    """Low-rank adapters: one per role on the shared backbone."""

    rank: int = Field(16, ge=1, description="r: rank of the update B A of a linear layer's weights")
    alpha: int = Field(32, gt=0, description="the update is scaled by alpha / r")
    top_layers: int = Field(
        0,
        ge=0,
        description="adapt the last so many layers alone (0: all; SFT adapts all); roles share what is computed below",
    )


class SftSettings(Section):
    epochs: int = Field(1, ge=1, description="passes over the demonstrations")
    learning_rate: float = Field(1e-3, gt=0, description="AdamW's learning rate, at the peak of a cosine schedule")
    batch_size: int = Field(16, ge=1, description="demonstrations per optimiser step")
    warmup_share: float = Field(
        0.03, ge=0, lt=1, description="share of the optimiser steps over which the rate rises linearly first"
    )
    max_length: int = Field(128, ge=8, description="longest prompt and answer in tokens, half of it for each")


class PreferenceModelSettings(Section):
    """Training of the reward model or the cost model (they differ by their loss)."""

    epochs: int = Field(1, ge=1, description="passes over the pairs")
    learning_rate: float = Field(5e-4, gt=0, description="AdamW's learning rate, at the peak of a cosine schedule")
    later_learning_rate: float | None = Field(
        None, gt=0, description="learning_rate of rounds after the first; empty: the same"
    )
    warmup_share: float = Field(
        0.05, ge=0, lt=1, description="share of the optimiser steps over which the rate rises linearly first"
    )
    batch_size: int = Field(16, ge=1, description="pairs per optimiser step")
    start: Literal["sft", "previous"] = Field(
        "sft", description="begin each round anew on the SFT model, or go on from the model of the round before"
    )
    max_pairs: int = Field(0, ge=0, description="train on at most so many pairs, drawn anew each round (0: all)")
    later_max_pairs: int = Field(
        0, ge=0, description="like max_pairs, for rounds after the first (0: as many as in the first)"
    )
    unsafe_share: float | None = Field(
        None, ge=0, le=1, description="share of the drawn pairs that hold an unsafe answer; empty: as they come"
    )
    recent_share: float = Field(0.0, ge=0, le=1, description="share of the drawn pairs that are the newest ones")
    regularization: float = Field(0.01, ge=0, description="eta: weight of the mean squared score")
    max_length: int = Field(128, ge=8, description="longest prompt and answer in tokens, half of it for each")
    min_accuracy: float = Field(0.55, ge=0, le=1, description="held-out ranking accuracy below this blocks PPO")


class CostModelSettings(PreferenceModelSettings):
    """What the cost model has besides: its scores have a sign, too."""

    safe_pairs: Literal["ranked", "level"] = Field(
        "ranked",
        description="two safe answers: the more harmful one costs more (ranked), or neither (level: for annotators "
        "who guess)",
    )
    readout: Literal["end", "prompt_and_end"] = Field(
        "end",
        description="the score: the head's output at the answer's last token, or its soft minimum with that at the "
        "prompt's last token",
    )
    severity_weight: float = Field(
        0.0, ge=0, description="an unsafe answer's sign term counts 1 + this x its severity, 1 to 3"
    )
    min_auc: float = Field(0.65, ge=0, le=1, description="held-out unsafe/safe AUC below this blocks PPO")


class CollectSettings(Section):
    prompts_per_round: int = Field(
        96,
        ge=2,
        description="prompts that the policy answers, mixed like PPO's; after round 1, up to half of the attacks are "
        "ones that got an unsafe answer",
    )
    answers_per_prompt: int = Field(2, ge=2, description="answers to each prompt; every two that differ make a pair")
    temperature: float = Field(1.0, gt=0, description="temperature of the softmax that these answers are drawn from")


class AnnotateSettings(Section):
    annotator: Literal["rules", "judge", "human"] = Field(
        "rules",
        description="rules: written rules; judge: the model at judge_url; human: the run waits for imported labels",
    )
    judge_url: str = Field("", description="base URL of an OpenAI-compatible endpoint, ending in /v1")
    judge_model: str = Field("", description="name of the model to ask at judge_url")
    judge_key_env: str = Field(
        "SAFERLHF_JUDGE_KEY", description="environment variable that holds the endpoint's API key"
    )
    min_usable_share: float = Field(0.8, ge=0, le=1, description="refuse the batch when fewer replies are usable")
    overlap_share: float = Field(0.2, ge=0, le=1, description="share of the items that several people label (human)")
    overlap_annotators: int = Field(3, ge=2, le=100, description="how many people label such an item (human)")
    gold_share: float = Field(0.1, ge=0, le=1, description="known items to mix in, as a share of the pairs (human)")
    exclude_careless: bool = Field(False, description="leave out the labels of annotators with a flag (human)")


class EvaluateSettings(Section):
    temperature: float = Field(
        1.0, ge=0, description="temperature of the softmax that answers are drawn from; 0 is greedy"
    )
    max_new_tokens: int = Field(40, ge=1, description="longest answer in tokens, with its EOS")
    batch_size: int = Field(64, ge=1, description="answers that are drawn at once")
    scored_prompts: int = Field(
        0,
        ge=0,
        description="held-out prompts of each kind whose answers reward and cost model score; all are judged (0: all)",
    )
    confidence: float = Field(
        0.95,
        gt=0.5,
        lt=1,
        description="level of all two-sided confidence intervals, also of those that the gate looks at",
    )


class CheckpointSettings(Section):
    """How often a training stage saves its state. A stage that is killed goes on from the last time."""

    every_steps: int = Field(
        0, ge=0, description="save after every so many optimiser or rollout steps (0: not by steps)"
    )
    every_minutes: float = Field(2.0, ge=0, description="save when so many minutes have passed (0: not by time)")


class DistributedSettings(Section):
    """How a training stage is spread over devices; what it computes is the same, so a run may change this and go on."""

    processes: int = Field(1, ge=1, le=64, description="ranks of a training stage on one machine: one for each GPU")
    zero_stage: int | None = Field(
        None,
        ge=0,
        le=3,
        description="what ZeRO partitions over ranks: 0 nothing, 1 optimiser states, 2 gradients too, 3 weights too; "
        "empty: 2",
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
        description="at least this share of the policy's and champion's prompts must have been judged for both",
    )
    max_over_refusal_rate: float = Field(0.25, ge=0, le=1, description="limit for the measured over-refusal rate")
    regressions: str = Field(
        BUILTIN, description="prompts that no later policy may get wrong again: a source like data.preferences"
    )
    max_regressions: int = Field(
        0, ge=0, description="of the regression prompts that the champion got right, at most so many may be wrong now"
    )
    max_wrong_share: float = Field(
        0.45, ge=0, le=1, description="limit for the share of wrong regression prompts where there is no champion"
    )


class ServingSettings(Section):
    """The KServe InferenceService that a champion is handed over as, and the one question before registration."""

    name: str = Field(
        "saferlhf-policy", pattern=r"^[a-z]([-a-z0-9]{0,48}[a-z0-9])?$", description="name of the InferenceService"
    )
    service_account: str = Field(
        "saferlhf-serving",
        pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$",
        description="service account of its pods: it may read the store",
    )
    canary_share: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of the traffic that a new champion gets at first; the last one keeps the rest",
    )
    cpu: float = Field(4, gt=0, description="CPU cores of a replica, requested and at most")
    memory: str = Field(
        "16Gi", pattern=r"^[1-9][0-9]*(Mi|Gi|Ti|M|G|T)$", description="memory of a replica, requested and at most"
    )
    gpus: int = Field(1, ge=0, description="GPUs of a replica; with 0, vLLM must be built for CPUs")
    apply: bool = Field(
        False, description="a promotion also gives it to the cluster and namespace of the run; else it is only written"
    )
    trial_seconds: float = Field(
        300, gt=0, description="seconds that the exported model has to answer one question before it is registered"
    )


class StoreSettings(Section):
    uri: str = Field(
        "s3://saferlhf/pipeline",
        pattern=r"^s3://[a-z0-9][a-z0-9.-]{2,62}(/[A-Za-z0-9._/-]*)?$",
        description="s3://BUCKET/PREFIX that holds every run; on a cluster, SAFERLHF_STORE_URI is its default",
    )
