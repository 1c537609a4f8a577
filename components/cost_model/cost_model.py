"""The cost model: scores how harmful an answer is, with the sign of safety (paper section 3.2).

Run: 1 read preferences, 2 train adapter and head, 3 measure held-out accuracy, sign accuracy and AUC, 4 commit.
These steps are in `components/foundation/preference_stage.py`; here is what the cost model has of its own.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from components.cost_model.loss import cost_loss
from components.foundation.batching import ChatEncoder
from components.foundation.preference import DualPreference
from components.foundation.preference_stage import encode_pair, run_preference_stage
from components.foundation.preference_trainer import PreferenceScores, ScoredPair, ranking_accuracy, roc_auc
from components.foundation.results import PreferenceModelResult

STAGE = "cost_model"


def run_cost_model(run_uri: str, round_number: int, sft_uri: str, preferences_uri: str) -> str:
    """Stage: preferences -> URI of the cost adapter with result.json."""
    return run_preference_stage(
        run_uri,
        STAGE,
        round_number,
        sft_uri,
        preferences_uri,
        settings_of=lambda settings: settings.cost_model,
        pair_of=harmful_pair,
        loss_of=lambda settings: partial(
            cost_loss,
            regularization=settings.cost_model.regularization,
            severity_weight=settings.cost_model.severity_weight,
            ranks_safe_pairs=settings.cost_model.safe_pairs == "ranked",
        ),
        result_of=cost_result,
        scores_newest=True,
        reads_prompt_of=lambda settings: settings.cost_model.readout == "prompt_and_end",
    )


def harmful_pair(record: DualPreference, encoder: ChatEncoder) -> ScoredPair:
    """The more harmful answer should score above the safer one."""
    return encode_pair(record, high_id=1 - record.safer_response_id, encoder=encoder)


def cost_result(
    scores: PreferenceScores, newest: PreferenceScores | None, training_pairs: int
) -> PreferenceModelResult:
    """Ranking over pairs that differ in safety is what counts, but all held-out pairs are counted, as in the paper.

    Args:
        scores: of the held-out pairs.
        newest: of all pairs of the newest round, those that were drawn for training among them.
    """
    safe_costs, unsafe_costs = costs_by_label(scores)
    newest_safe, newest_unsafe = costs_by_label(newest) if newest else (torch.empty(0), torch.empty(0))
    right_signs = (safe_costs <= 0).sum() + (unsafe_costs > 0).sum()
    return PreferenceModelResult(
        accuracy=ranking_accuracy(scores),
        training_pairs=training_pairs,
        validation_pairs=len(scores.high),
        sign_accuracy=float(right_signs / (len(safe_costs) + len(unsafe_costs))),
        auc=roc_auc(unsafe_costs, safe_costs),
        safe_costs=safe_costs.tolist(),
        unsafe_costs=unsafe_costs.tolist(),
        newest_safe_costs=newest_safe.tolist(),
        newest_unsafe_costs=newest_unsafe.tolist(),
    )


def costs_by_label(scores: PreferenceScores) -> tuple[Tensor, Tensor]:
    """Scores of pairs -> ([S] of the answers labelled safe, [U] of those labelled unsafe)."""
    costs = torch.cat([scores.high, scores.low])
    unsafe = torch.cat([scores.high_sign, scores.low_sign]) > 0
    return costs[~unsafe], costs[unsafe]
