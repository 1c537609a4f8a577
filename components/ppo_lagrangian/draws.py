"""Which prompts and demonstrations a training step takes: each once before any comes again.

Prompts over all rounds of a run, demonstrations within a round.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from components.foundation.ppo_settings import PpoSettings
from components.foundation.preference import PromptRecord, attacks_and_others

Item = TypeVar("Item")


def draw_batch(prompts: Sequence[PromptRecord], ppo: PpoSettings, number: int, seed: int) -> list[PromptRecord]:
    """Rollout batch `number` of a run, whose rounds all count on; `seed` is the run's for these draws.

    Where answers are compared, each of half as many prompts stands twice in a row.
    """
    times = 1 if ppo.advantage_source == "models" else 2
    drawn = draw_prompts(prompts, ppo.episodes_per_step // times, ppo.red_team_share, number, seed)
    return [prompt for prompt in drawn for _ in range(times)]


def draw_prompts(
    prompts: Sequence[PromptRecord], count: int, red_team_share: float, number: int, seed: int
) -> list[PromptRecord]:
    """Batch `number` of `count`: the share of red-team prompts, the others evenly over the kinds that there are.

    Where no kinds are declared, any prompts. Lookalikes are rare in data and count most: they teach to tell harm from
    its looks.
    """
    attacks, others = attacks_and_others(prompts)
    if not attacks or not others:
        return take(prompts, number, count, f"{seed}")
    n_attacks = round(red_team_share * count)
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
