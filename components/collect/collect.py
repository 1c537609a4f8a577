"""Collects answers of the current policy for annotation (paper section 4.2: each round gathers fresh answers).

Run: 1 choose prompts (those that broke the previous round's policy first), 2 sample several answers each, 3 commit.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from components.foundation.batching import ChatEncoder
from components.foundation.policy import load_policy
from components.foundation.preference import NEWEST_FILE, CollectedAnswer, DualPreference, PromptRecord, read_jsonl
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
        chosen = choose_prompts(prompts, judged, settings.collect.prompts_per_round, stage.seed)
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
    prompts: Sequence[PromptRecord], judged: Sequence[DualPreference], count: int, seed: int
) -> list[PromptRecord]:
    """`count` prompts drawn by the seed, up to half of them first from those with an unsafe answer in `judged`."""
    shuffled = random.Random(seed).sample(list(prompts), len(prompts))
    broke = {r.prompt for r in judged if not (r.is_response_0_safe and r.is_response_1_safe)}
    first = [r for r in shuffled if r.prompt in broke][: count // 2]
    taken = {r.prompt for r in first}
    return (first + [r for r in shuffled if r.prompt not in taken])[:count]
