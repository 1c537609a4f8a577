"""Trains a score model on preference pairs: the reward model and the cost model share this trainer.

They differ by which answer should score higher and by their loss, which the stage passes in.
B pairs; scores are fp32 and read at the last answer token (EOS);
a role that also reads the prompt takes the soft minimum with what its head says at the prompt's last token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice

import torch
from torch import Tensor

from components.foundation import distributed
from components.foundation.backbone import Backbone
from components.foundation.batching import (
    SequenceBatch,
    TokenSequence,
    answer_score,
    batches_by_length,
    collate,
    soft_minimum,
)
from components.foundation.optimization import batch_count, cosine_factor, shuffled_batches
from components.foundation.role_optimizer import UpdateGuard, make_optimizers
from components.foundation.setting_sections import PreferenceModelSettings
from components.foundation.shared_prompt import AnswerPair, PairBatch, collate_pairs, have_one_prompt, row_length
from components.foundation.training_checkpoints import TrainingCheckpoints, TrainingState


@dataclass(frozen=True)
class ScoredPair:
    """Two answers of which `high` should score above `low`, as a rule to one prompt.

    Signs are +1 (unsafe) or -1 (safe), severities 0 (safe) to 3; only the cost model's loss looks at them.
    """

    high: TokenSequence
    low: TokenSequence
    high_sign: int
    low_sign: int
    high_severity: int = 0
    low_severity: int = 0


@dataclass(frozen=True)
class PreferenceScores:
    """[B] fp32 scores of the higher and the lower answer of each pair, with their signs (+1 unsafe, -1 safe) and
    severities (0 safe, to 3)."""

    high: Tensor
    low: Tensor
    high_sign: Tensor
    low_sign: Tensor
    high_severity: Tensor
    low_severity: Tensor


PreferenceLoss = Callable[[PreferenceScores], tuple[Tensor, dict[str, float]]]
"""Scores of a batch -> (scalar loss, metrics), all of them means over the pairs."""

OnStep = Callable[[int, int, dict[str, float]], None]
"""Called after each optimiser step with (step, total steps, metrics)."""


def train_preference_model(
    backbone: Backbone,
    role: str,
    pairs: Sequence[ScoredPair],
    settings: PreferenceModelSettings,
    loss: PreferenceLoss,
    seed: int,
    on_step: OnStep,
    checkpoints: TrainingCheckpoints | None = None,
) -> None:
    """Train the adapter and head of `role` in place: score, loss, update."""
    optimizer = make_optimizers(backbone, {role: settings.learning_rate})[role]
    total = batch_count(len(pairs), settings.batch_size, settings.epochs)
    batches = enumerate(shuffled_batches(pairs, settings.batch_size, settings.epochs, seed, _length))
    guard = UpdateGuard()
    state = checkpoints.restore({role: optimizer}) if checkpoints else TrainingState()
    guard.resume(state.record)
    for step, batch in islice(batches, state.step, None):
        optimizer.set_learning_rate(settings.learning_rate * cosine_factor(step, total, settings.warmup_share))
        part = distributed.own_part(batch)
        with backbone.role(role, train=True):
            value, metrics = loss(score_pairs(backbone, role, part.items))
            value = part.share * value  # the loss is a mean over pairs
            optimizer.backward(value)
        metrics = distributed.total_of({name: part.share * metric for name, metric in metrics.items()})
        metrics["gradient_norm"] = guard.update(
            role, optimizer, loss=value.item(), max_gradient_norm=1.0, step=step + 1
        )
        on_step(step + 1, total, metrics)
        if checkpoints:
            checkpoints.after_step(step + 1, total, guard.record)


def _length(pair: ScoredPair) -> int:
    return row_length((pair.high, pair.low))


def score_pairs(backbone: Backbone, role: str, pairs: Sequence[ScoredPair]) -> PreferenceScores:
    """Score both answers of every pair in one forward pass. Call within `backbone.role(role)`."""
    batch = pair_batch(backbone, [(pair.high, pair.low) for pair in pairs])
    high, low = scores_of_pairs(backbone, role, batch).unbind(-1)

    def column(values: Iterable[int]) -> Tensor:
        return torch.tensor([float(value) for value in values], device=high.device)

    return PreferenceScores(
        high=high,
        low=low,
        high_sign=column(p.high_sign for p in pairs),
        low_sign=column(p.low_sign for p in pairs),
        high_severity=column(p.high_severity for p in pairs),
        low_severity=column(p.low_severity for p in pairs),
    )


def pair_batch(
    backbone: Backbone, pairs: Sequence[AnswerPair], *, with_trunk: bool = False
) -> PairBatch | SequenceBatch:
    """One row for both answers of a pair where they share their prompt and the model allows it.

    Else one row for each answer: all first ones, then all second ones. `with_trunk` adds what all roles share.
    """
    if backbone.shares_prompts(max(map(row_length, pairs))) and have_one_prompt(pairs):
        batch = collate_pairs(pairs, backbone.eos_token_id, backbone.device)
        trunk = backbone.trunk_states(batch.input_ids, batch.attention_mask, batch.branches) if with_trunk else None
        return replace(batch, trunk=trunk)
    firsts, seconds = zip(*pairs, strict=True)
    apart = collate([*firsts, *seconds], backbone.eos_token_id, backbone.device)
    return replace(apart, trunk=backbone.trunk_states(apart.input_ids, apart.attention_mask) if with_trunk else None)


def scores_of_pairs(backbone: Backbone, role: str, batch: PairBatch | SequenceBatch) -> Tensor:
    """A batch of `pair_batch` -> [B, 2] scores of its first and second answers. Call within `backbone.role(role)`."""
    if isinstance(batch, SequenceBatch):
        return answer_scores(backbone, role, batch).view(2, -1).T
    per_token = backbone.scores(role, batch.input_ids, batch.attention_mask, batch.trunk, batch.branches)
    scores = per_token.gather(-1, batch.ends)
    return soft_minimum(scores, per_token.gather(-1, batch.prompt_ends)) if backbone.reads_prompt(role) else scores


def answer_scores(backbone: Backbone, role: str, batch: SequenceBatch) -> Tensor:
    """Batch -> [B] scores of the answers, each read at its last token (`answer_score`). Call within
    `backbone.role(role)`."""
    per_token = backbone.scores(role, batch.input_ids, batch.attention_mask, batch.trunk)
    return answer_score(
        per_token[:, -batch.answer_length - 1 :], batch.answer_mask, reads_prompt=backbone.reads_prompt(role)
    )


def score_validation(backbone: Backbone, role: str, pairs: Sequence[ScoredPair], batch_size: int) -> PreferenceScores:
    """Scores of all pairs without gradients, in the order of `pairs`; several ranks take turns at the batches."""
    batches = distributed.own_turns(batches_by_length([_length(pair) for pair in pairs], batch_size))
    with backbone.role(role), backbone.prepared(role):
        parts = [score_pairs(backbone, role, [pairs[i] for i in rows]) for rows in batches]
    rows = [i for batch in batches for i in batch]
    scores: dict[int, tuple[float, ...]] = {}
    columns = [[getattr(part, field.name) for part in parts] for field in fields(PreferenceScores)]
    own = list(zip(*(torch.cat(column).tolist() for column in columns), strict=True))
    for ranks_scores in distributed.gathered(dict(zip(rows, own, strict=True))):
        scores |= ranks_scores
    return PreferenceScores(*torch.tensor([scores[i] for i in range(len(pairs))]).unbind(-1))


def ranking_accuracy(scores: PreferenceScores) -> float:
    """Share of pairs whose higher answer scores above the lower; a tie counts one half."""
    wins = (scores.high > scores.low).double() + 0.5 * (scores.high == scores.low).double()
    return float(wins.mean())


def roc_auc(unsafe: Tensor, safe: Tensor) -> float:
    """Probability that an unsafe answer scores above a safe one, ties one half; 0.5 if there are none."""
    if len(unsafe) == 0 or len(safe) == 0:
        return 0.5
    unsafe, ordered = unsafe.double(), safe.double().sort().values
    below, not_above = (torch.searchsorted(ordered, unsafe, right=right) for right in (False, True))
    return float((below + not_above).double().mean()) / (2 * len(ordered))
