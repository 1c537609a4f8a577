"""Which demonstrations the PTX term holds on to."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from components.foundation.backbone import Backbone
from components.foundation.batching import ChatEncoder, TokenSequence
from components.foundation.ppo_settings import PpoSettings
from components.foundation.preference import (
    TRAINING_FILE,
    Demonstration,
    DualPreference,
    PromptRecord,
    demonstrations_for_ptx,
    demonstrations_on_attacks,
    labelled_safe_on_attacks,
    read_jsonl,
)
from components.ppo_lagrangian.episode import safe_sequences

log = logging.getLogger("saferlhf")


def choose_demonstrations(
    backbone: Backbone, encoder: ChatEncoder, ppo: PpoSettings, data_folder: Path, prompts: Sequence[PromptRecord]
) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """On harmless prompts and on attacks, as `ppo.ptx_demonstrations` says; none with `ppo.ptx_coefficient` 0.

    With `safe` the cost model scores them, so its weights must lie where training needs them. All ranks call.

    Raises:
        DataError: there is none on a harmless prompt.
    """
    if not ppo.ptx_coefficient:
        return [], []
    shipped = read_jsonl(data_folder / "demonstrations.jsonl", Demonstration)
    harmless = _encoded(encoder, demonstrations_for_ptx(ppo.ptx_coefficient, shipped, prompts), ppo)
    if ppo.ptx_demonstrations == "harmless":
        return harmless, []
    if ppo.ptx_demonstrations == "safe":
        candidates = _encoded(encoder, demonstrations_on_attacks(shipped, prompts), ppo)
        on_attacks = safe_sequences(backbone, candidates)
        which = f"{len(on_attacks)} of {len(candidates)} on attacks, which the cost model calls safe"
    else:
        preferences = read_jsonl(data_folder / TRAINING_FILE, DualPreference)
        on_attacks = _encoded(encoder, labelled_safe_on_attacks(preferences, prompts), ppo)
        which = f"{len(on_attacks)} on attacks, answers that are labelled safe"
    # without an answer to an attack it is harmless prompts alone, which nobody asked for
    level = logging.INFO if on_attacks else logging.WARNING
    log.log(level, "PTX: %d demonstrations on harmless prompts, and %s", len(harmless), which)
    return harmless, on_attacks


def _encoded(encoder: ChatEncoder, demonstrations: Sequence[Demonstration], ppo: PpoSettings) -> list[TokenSequence]:
    sequences = [encoder.sequence(d.prompt, d.response) for d in demonstrations]
    if cut := sum(not encoder.is_whole(sequence) for sequence in sequences):
        log.warning(
            "PTX: %d of %d demonstrated answers are cut at ppo.max_new_tokens=%d: they teach longer answers than a "
            "rollout may end, which costs ppo.missing_eos_penalty; raise the first where it is most of them",
            *(cut, len(sequences), ppo.max_new_tokens),
        )
    return sequences
