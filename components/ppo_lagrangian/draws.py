"""Which prompts and demonstrations a training step takes: each once before any comes again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from components.foundation.ppo_settings import PpoSettings
from components.foundation.preference import PromptRecord

Item = TypeVar("Item")


def draw_batch(prompts: Sequence[PromptRecord], ppo: PpoSettings, number: int, seed: int) -> list[PromptRecord]:
    """Rollout batch `number` of a run, whose rounds all count on; `seed` is the run's for these draws.

    Where answers are compared, each of half as many prompts stands twice in a row.
    """
    if ppo.advantage_source == "models":
        return draw_prompts(prompts, ppo, number, seed)
    half = ppo.model_copy(update={"episodes_per_step": ppo.episodes_per_step // 2})
    return [prompt for prompt in draw_prompts(prompts, half, number, seed) for _ in range(2)]


def draw_prompts(prompts: Sequence[PromptRecord], ppo: PpoSettings, number: int, seed: int) -> list[PromptRecord]:
    """Rollout batch `number`: the set share of red-team prompts, the others evenly over the kinds that there are.

    Where no kinds are declared, any prompts. Lookalikes are rare in data and count most: they teach to tell harm from
    its looks.
    """
    count = ppo.episodes_per_step
    kinds = [[p for p in prompts if p.kind == kind] for kind in ("red_team", "benign", "lookalike", "")]
    attacks, others = kinds[0], [group for group in kinds[1:] if group]
    if not attacks or not others:
        return take(prompts, number, count, f"{seed}")
    n_attacks = round(ppo.red_team_share * count)
    shares = [(attacks, n_attacks)]
    shares += [(group, len(range(i, count - n_attacks, len(others)))) for i, group in enumerate(others)]
    return [prompt for group, share in shares for prompt in take(group, number, share, f"{seed}/{group[0].kind}")]


def take(items: Sequence[Item], number: int, count: int, seed: str) -> list[Item]:
    """Portion `number`, of `count` items, of an endless walk: pass after pass over `items`, each in its own order."""
    places = range(number * count, (number + 1) * count)
    orders = {
        passed: random.Random(f"{seed}/{passed}").sample(items, len(items))
        for passed in {place // len(items) for place in places}
    }
    return [orders[place // len(items)][place % len(items)] for place in places]
