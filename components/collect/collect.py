"""Collects answers of the current policy for annotation (paper section 4.2: each round gathers fresh answers).

Run: 1 choose prompts (attacks that broke the previous round's policy first), 2 sample several answers each, 3 commit.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from components.foundation.batching import ChatEncoder
from components.foundation.policy import load_policy
from components.foundation.preference import (
    NEWEST_FILE,
    CollectedAnswer,
    DualPreference,
    PromptRecord,
    attacks_and_others,
    read_jsonl,
)
from components.foundation.results import write_records
from components.foundation.rollout import Sampling
from components.foundation.rollout.transformers_engine import TransformersEngine
from components.foundation.run_context import open_stage

STAGE = "collect"


def run_collect(
    run_uri: str, round_number: int, data_uri: str, sft_uri: str, policy_uri: str, preferences_uri: str
) -> str:
    """Stage: prompts and policy -> URI of answers.jsonl (the answers to one prompt stand together)."""
    with open_stage(run_uri, STAGE, round_number) as stage:
        if (done := stage.finished()) is not None:
            return done
        settings, store = stage.context.settings, stage.context.store
        prompts = read_jsonl(store.fetch(data_uri) / "prompts.jsonl", PromptRecord)
        newest = store.fetch(preferences_uri) / NEWEST_FILE  # of the previous round; shipped answers are no policy's
        judged = read_jsonl(newest, DualPreference) if newest.exists() else []
        chosen = choose_prompts(
            prompts, judged, settings.collect.prompts_per_round, settings.ppo.red_team_share, stage.seed
        )
        backbone, role = load_policy(store, sft_uri, policy_uri, settings.dtype, stage.seed)
        encoder = ChatEncoder(backbone.tokenizer, settings.ppo.max_prompt_tokens, settings.ppo.max_new_tokens)
        asked = [record for record in chosen for _ in range(settings.collect.answers_per_prompt)]
        sampling = Sampling(settings.collect.temperature, settings.ppo.max_new_tokens, stage.seed)
        rollout = TransformersEngine(backbone, role).generate([encoder.prompt(r.prompt) for r in asked], sampling)
        texts = [backbone.text(a) for a in rollout.answers]
        write_records(
            stage.folder / "answers.jsonl",
            [CollectedAnswer(r.prompt, text, r.kind, r.harm_category) for r, text in zip(asked, texts, strict=True)],
        )
        counts = {"prompts": len(chosen), "answers": len(texts), "truncated_prompts": encoder.truncated}
        stage.mlflow.log_metrics({f"collect/{name}": count for name, count in counts.items()}, 0)
        return stage.commit(stage.folder, step=len(texts), parents=[data_uri, sft_uri, policy_uri, preferences_uri])


def choose_prompts(
    prompts: Sequence[PromptRecord],
    judged: Sequence[DualPreference],
    count: int,
    red_team_share: float,
    seed: int,
) -> list[PromptRecord]:
    """`count` prompts drawn by the seed, in the mixture of PPO's batches where kinds are declared.

    The mean costs of these answers calibrate PPO's threshold, so they should be answers to what PPO asks. Of each kind
    up to half are prompts that got an unsafe answer in `judged`.
    """
    rng = random.Random(seed)
    shuffled = rng.sample(list(prompts), len(prompts))
    broke = {r.prompt for r in judged if not (r.is_response_0_safe and r.is_response_1_safe)}

    def first(group: Sequence[PromptRecord], wanted: int) -> list[PromptRecord]:
        broken = [p for p in group if p.prompt in broke][: wanted // 2]
        return (broken + [p for p in group if p not in broken])[:wanted]

    attacks, others = attacks_and_others(shuffled)
    chosen: list[PromptRecord] = []
    if attacks and others:
        chosen = first(attacks, round(red_team_share * count))
        for index, group in enumerate(others):
            chosen += first(group, (count - len(chosen)) // (len(others) - index))
    taken = set(chosen)
    chosen += first([p for p in shuffled if p not in taken], count - len(chosen))
    return rng.sample(chosen, len(chosen))
