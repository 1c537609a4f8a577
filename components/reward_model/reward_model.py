"""The reward model: scores how helpful an answer is, blind to its harm (paper section 3.2).

Run: 1 read preferences, 2 train adapter and head, 3 measure held-out accuracy, 4 commit.
These steps are in `components/foundation/preference_stage.py`; here is what the reward model has of its own.
"""

from __future__ import annotations

from functools import partial

from components.foundation.batching import ChatEncoder
from components.foundation.preference import DualPreference
from components.foundation.preference_stage import encode_pair, run_preference_stage
from components.foundation.preference_trainer import PreferenceScores, ScoredPair, ranking_accuracy
from components.foundation.results import PreferenceModelResult
from components.reward_model.loss import reward_loss

STAGE = "reward_model"


def run_reward_model(run_uri: str, round_number: int, sft_uri: str, preferences_uri: str) -> str:
    """Stage: preferences -> URI of the reward adapter with result.json."""
    return run_preference_stage(
        run_uri,
        STAGE,
        round_number,
        sft_uri,
        preferences_uri,
        settings_of=lambda settings: settings.reward_model,
        pair_of=helpful_pair,
        loss_of=lambda settings: partial(reward_loss, regularization=settings.reward_model.regularization),
        result_of=reward_result,
    )


def helpful_pair(record: DualPreference, encoder: ChatEncoder) -> ScoredPair:
    """The better answer should score above the worse one."""
    return encode_pair(record, high_id=record.better_response_id, encoder=encoder)


def reward_result(scores: PreferenceScores, _: PreferenceScores | None, training_pairs: int) -> PreferenceModelResult:
    return PreferenceModelResult(
        accuracy=ranking_accuracy(scores),
        training_pairs=training_pairs,
        validation_pairs=len(scores.high),
        margin=float((scores.high - scores.low).mean()),
    )
