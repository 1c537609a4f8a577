"""The settings of PPO-Lagrangian."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from components.foundation.setting_sections import Section


class PpoSettings(Section):
    """PPO-Lagrangian (paper section 3.3). Learning rates are per optimiser step."""

    steps: int = Field(16, ge=1, description="rollout batches per round")
    episodes_per_step: int = Field(
        32, ge=2, description="answers in a rollout batch: one to a prompt, two with advantage_source=preference_oracle"
    )
    epochs: int = Field(1, ge=1, description="passes over each rollout batch")
    minibatch_size: int = Field(16, ge=1, description="episodes per optimiser step")
    max_prompt_tokens: int = Field(
        48, ge=4, description="longest prompt with its chat template, in tokens; also of collect and evaluate"
    )
    max_new_tokens: int = Field(40, ge=1, description="longest answer in tokens, with its EOS; also of collect")
    temperature: float = Field(
        1.0,
        gt=0,
        description="temperature of the softmax that answers are drawn from, and of pi and pi_ref in loss and KL",
    )
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
        description="adapter: an adapter and a head, by gradient steps; head: ridge regression on hidden states of the "
        "reward or cost model",
    )
    critic_ridge: float = Field(
        0.5, gt=0, description="head critics: ridge penalty, relative to the mean squared deviation of a hidden state"
    )
    critic_memory: float = Field(
        0.9, ge=0, le=1, description="head critics: what an answer counts in the fit one step later, relative to before"
    )
    actor_learning_rate: float = Field(
        5e-4, gt=0, description="AdamW's learning rate for the actor; with actor_schedule=cosine or trapezoid its peak"
    )
    later_actor_learning_rate: float | None = Field(
        None, gt=0, description="actor_learning_rate of rounds after the first; empty: the same"
    )
    actor_schedule: Literal["constant", "cosine", "trapezoid"] = Field(
        "constant",
        description="the actor's learning rate in a round; cosine: falls all the time; trapezoid: in its last quarter",
    )
    actor_warmup_share: float = Field(
        0.0, ge=0, lt=1, description="cosine, trapezoid: share of the steps over which the rate rises first"
    )
    average_steps: int = Field(
        1,
        ge=1,
        description="the round's policy is the mean of the actor after each of its last so many steps (1: the last)",
    )
    critic_learning_rate: float = Field(5e-4, gt=0, description="AdamW's learning rate for critics with an adapter")
    kl_coefficient: float = Field(0.05, ge=0, description="beta: weight of the KL penalty for leaving pi_ref")
    clip_ratio: float = Field(
        0.2, gt=0, lt=1, description="epsilon: the probability ratio pi / pi_old is clipped to 1 +- this"
    )
    opening_tokens: int = Field(
        4, ge=1, description="answer tokens in which it is decided whether to help; the others are its continuation"
    )
    continuation_weight: float = Field(
        1.0,
        gt=0,
        le=1,
        description="what a token of the continuation counts in the actor's losses, where one of the opening counts 1",
    )
    value_clip: float = Field(
        5.0, gt=0, description="the value loss clips values to those of the rollout +- this (critics with an adapter)"
    )
    score_clip: float = Field(
        50.0, gt=0, description="a token's reward or cost, with its KL term, is clamped to +- this"
    )
    gamma: float = Field(1.0, gt=0, le=1, description="gamma: discount of rewards and costs per token or macro action")
    gae_lambda: float = Field(
        0.95,
        ge=0,
        le=1,
        description="lambda of GAE, not the multiplier: 0 trusts the critics alone, 1 the answers' returns; "
        "preference_oracle: always 1",
    )
    whiten_advantages: bool = Field(
        True, description="scale advantages to mean 0 and variance 1 over the rollout batch's answer tokens"
    )
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
    max_gradient_norm: float = Field(
        1.0, gt=0, description="gradients are scaled down to this L2 norm, for the actor and each critic by itself"
    )
    cost_aggregation: Literal["mean", "rectified", "floored"] = Field(
        "mean",
        description="cost C of an answer. mean: its score; rectified: max(score, 0), so safe ones pay for no unsafe "
        "ones; floored: max(score, floor)",
    )
    cost_floor_target: float = Field(
        0.15,
        ge=0,
        lt=1,
        description="the floor is mean_safe + this x (mean_unsafe - mean_safe), of cost scores of labelled answers",
    )
    reward_margin: float | None = Field(
        None,
        gt=0,
        description="scale rewards: better held-out answers score so much higher on average; empty: as they are",
    )
    cost_margin: float | None = Field(
        None, gt=0, description="scale costs: unsafe held-out answers cost so much more on average; empty: as they are"
    )
    threshold: float | None = Field(None, description="cost threshold d; empty: calibrated from the cost model")
    threshold_target: float = Field(0.1, gt=0, lt=1, description="share of unsafe answers that a calibrated d allows")
    threshold_answers: Literal["held_out", "newest"] = Field(
        "held_out",
        description="answers whose scores calibrate d (and a floor): of held-out pairs of all rounds, or those of the "
        "newest collection",
    )
    lagrangian: Literal["dual_ascent", "pid"] = Field(
        "dual_ascent",
        description="how lambda follows the violation of the threshold: by log-space ascent or PID control",
    )
    pid_proportional: float = Field(1.0, ge=0, description="Kp of PID control: weight of the violation J_C - d")
    pid_integral: float = Field(
        0.1, gt=0, description="Ki of PID control: weight of the violations' sum, which stays from 0 to lambda_max / Ki"
    )
    pid_derivative: float = Field(
        1.0, ge=0, description="Kd of PID control: weight of a rise of J_C since the step before"
    )
    advantage_source: Literal["models", "preference_oracle"] = Field(
        "models",
        description="what judges answers: reward and cost model, or the annotator, by comparing two to a prompt; then "
        "J_C is the unsafe share",
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
    lambda_init: float = Field(
        1.0, gt=0, description="multiplier lambda at the start of round 1; of every round with lambda_start=init"
    )
    lambda_start: Literal["init", "previous"] = Field(
        "previous",
        description="where lambda starts in later rounds: at lambda_init, or where the round before left it",
    )
    lambda_learning_rate: float = Field(
        0.1,
        gt=0,
        description="eta: log lambda += eta (J_C - d) at every step of dual_ascent; preference_oracle: lambda itself",
    )
    lambda_min: float = Field(
        0.05, gt=0, description="floor of lambda after every step; with preference_oracle the floor is 0"
    )
    lambda_max: float = Field(20.0, gt=0, description="ceiling of lambda after every step")
    cost_window: int = Field(128, ge=1, description="J_C is the mean cost of so many newest answers")
    ptx_coefficient: float = Field(
        0.0,
        ge=0,
        description="weight of the language-model loss on demonstrations (PTX) in the actor's update",
    )
    ptx_demonstrations: Literal["harmless", "safe", "labelled"] = Field(
        "harmless",
        description="for PTX: on harmless prompts; safe: also on attacks, where the cost model passes them; "
        "labelled: also preferences' safe answers to attacks",
    )
    red_team_share: float = Field(
        0.6,
        ge=0,
        le=1,
        description="share of red-team prompts in a rollout batch, in collect, and in PTX's answers to attacks",
    )
    max_skipped_updates: int = Field(
        3,
        ge=0,
        description="updates in a row that may be skipped because loss or gradient is not finite; with ZeRO none",
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
        start = info.data.get("lambda_init", value)
        floor = 0.0 if info.data.get("advantage_source") == "preference_oracle" else info.data.get("lambda_min", 0.0)
        if not floor <= start <= value:
            raise ValueError(f"lambda_init={start} must lie between lambda_min={floor} and lambda_max={value}")
        return value

    @field_validator("advantage_source")
    @classmethod
    def _goes_with_pairs_and_its_own_dual_step(cls, value: str, info: ValidationInfo) -> str:
        episodes, rule = info.data.get("episodes_per_step", 2), info.data.get("lagrangian", "dual_ascent")
        if value == "preference_oracle" and episodes % 2:
            raise ValueError(f"it takes two answers a prompt: ppo.episodes_per_step={episodes} must be even")
        if value == "preference_oracle" and rule != "dual_ascent":
            raise ValueError(f"it has a dual step of its own: set ppo.lagrangian=dual_ascent, not {rule}")
        return value

    @field_validator("reward_shaping")
    @classmethod
    def _weighs_scores_of_models(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("advantage_source") == "preference_oracle":
            raise ValueError("it weighs the scores of models: leave out ppo.advantage_source=preference_oracle")
        return value

    @field_validator("ptx_demonstrations")
    @classmethod
    def _asks_the_cost_model(cls, value: str, info: ValidationInfo) -> str:
        if value == "safe" and info.data.get("advantage_source") == "preference_oracle":
            raise ValueError(
                "safe asks the cost model, which preference_oracle does without: set ppo.ptx_demonstrations=harmless"
            )
        return value
