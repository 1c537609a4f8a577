"""The settings of PPO-Lagrangian."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from components.foundation.setting_sections import Section


class PpoSettings(Section):
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
        description="adapter: each critic has an adapter and a head, which learn by gradient steps; head: a head on "
        "the hidden states that the reward or cost model scores by, fitted by ridge regression, without passes of its "
        "own",
    )
    critic_ridge: float = Field(
        0.5, gt=0, description="penalty of that regression, relative to the mean squared deviation of a hidden state"
    )
    critic_memory: float = Field(
        0.9, ge=0, le=1, description="what an answer counts in that regression one step later, relative to before"
    )
    actor_learning_rate: float = Field(5e-4, gt=0)
    later_actor_learning_rate: float | None = Field(None, gt=0, description="the same in later rounds; empty: as it is")
    actor_schedule: Literal["constant", "cosine"] = Field(
        "constant", description="cosine: the actor's learning rate falls to nearly 0 over the steps of a round"
    )
    actor_warmup_share: float = Field(
        0.0, ge=0, lt=1, description="cosine: share of the steps over which the rate rises first"
    )
    critic_learning_rate: float = Field(5e-4, gt=0, description="of critics with an adapter")
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
    threshold_answers: Literal["held_out", "newest"] = Field(
        "held_out",
        description="whose scores calibrate d (and a floor): answers of held-out pairs of all rounds, or the answers "
        "that the newest round collected, which are like those that d will be held against",
    )
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
    lambda_start: Literal["init", "previous"] = Field(
        "previous",
        description="where lambda starts in later rounds: at lambda_init, or where the round before left it",
    )
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
