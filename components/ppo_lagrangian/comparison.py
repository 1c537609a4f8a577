"""A rollout batch of pairs as the annotator sees it: what `ppo.advantage_source=preference_oracle` learns from.

Shapes: P pairs, B = 2 P answers; the answers of pair i are 2 i and 2 i + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from components.foundation.backbone import REFERENCE, Backbone
from components.foundation.batching import TokenSequence
from components.foundation.errors import AnnotationError
from components.foundation.judging import AnswerJudgement, AnswerPair, Judge, check_usable
from components.foundation.policy import ACTOR
from components.foundation.preference import PromptRecord
from components.foundation.settings import Settings
from components.ppo_lagrangian.episode import Appraisal, Episode, collated, measure_log_probs, missing_eos
from components.ppo_lagrangian.preference_oracle import estimate_gaps, pair_scores


@dataclass(frozen=True)
class Tally:
    """Counts over all usable replies to a batch.

    Attributes:
        asked: [P] usable comparisons of each pair; 0 also where both answers are the same text.
        better, more_harmful: [P] how often that was the first answer.
        unsafe_shares: share of the judgements that call an answer unsafe, of every answer that was judged.
        helpfulness: in [0, 1], of every judgement.
    """

    asked: Tensor
    better: Tensor
    more_harmful: Tensor
    unsafe_shares: list[float]
    helpfulness: list[float]


def ask_annotator(judge: Judge, pairs: Sequence[AnswerPair], comparisons: int, min_usable_share: float) -> Tally:
    """Compare every pair `comparisons` times. Two equal answers are not compared, but judged, once.

    Raises:
        AnnotationError: fewer than `min_usable_share` of the replies are usable, or none.
    """
    different = [i for i, pair in enumerate(pairs) if pair.answer_0 != pair.answer_1]
    same = [i for i, pair in enumerate(pairs) if pair.answer_0 == pair.answer_1]
    asked, better, more_harmful = (torch.zeros(len(pairs)) for _ in range(3))
    judgements: list[list[AnswerJudgement]] = [[] for _ in range(2 * len(pairs))]
    rows = different * comparisons
    for i, reply in zip(rows, judge.compare([pairs[i] for i in rows]), strict=True):
        if reply is None:
            continue
        asked[i] += 1
        better[i] += reply.better_id == 0
        more_harmful[i] += reply.safer_id == 1
        judgements[2 * i].append(reply.judgement_0)
        judgements[2 * i + 1].append(reply.judgement_1)
    alone = judge.judge_answers([(pairs[i].prompt, pairs[i].answer_0) for i in same])
    for i, judgement in zip(same, alone, strict=True):
        if judgement is not None:
            judgements[2 * i].append(judgement)
            judgements[2 * i + 1].append(judgement)
    usable = int(asked.sum()) + sum(judgement is not None for judgement in alone)
    check_usable(usable, len(rows) + len(same), min_usable_share)
    if not usable:
        raise AnnotationError("none of the annotator's judgements was usable: look at its replies")
    return Tally(
        asked=asked,
        better=better,
        more_harmful=more_harmful,
        unsafe_shares=[sum(not j.is_safe for j in group) / len(group) for group in judgements if group],
        helpfulness=[j.helpfulness for group in judgements for j in group],
    )


def compare_episode(
    backbone: Backbone,
    judge: Judge,
    settings: Settings,
    prompts: Sequence[PromptRecord],
    sequences: Sequence[TokenSequence],
) -> Episode:
    """Everything the update needs to know of a rollout batch, from comparisons and labels alone.

    An answer's reward and cost are half its pair's gap, up or down; there are no critics, so values are 0. What the
    multiplier sees is the share of judgements that call an answer unsafe, from 0 to 1.

    Args:
        prompts: [B] records of the prompts; those of a pair are the same.
        sequences: [B] prompts and sampled answers.
    """
    ppo = settings.ppo
    texts = [backbone.text(sequence.answer) for sequence in sequences]
    pairs = [AnswerPair(prompts[i], texts[i], texts[i + 1]) for i in range(0, len(texts), 2)]
    tally = ask_annotator(judge, pairs, ppo.oracle_comparisons, settings.annotate.min_usable_share)
    batch = collated(backbone, sequences)

    def appraisal(wins: Tensor) -> Appraisal:
        gaps = estimate_gaps(wins, tally.asked, ppo.oracle_clip).to(backbone.device)
        return Appraisal(pair_scores(gaps), torch.zeros_like(batch.answer_mask, dtype=torch.float32), None)

    reward = appraisal(tally.better)
    return Episode(
        batch=batch,
        log_probs=measure_log_probs(backbone, ACTOR, batch, ppo.temperature),
        reference_log_probs=measure_log_probs(backbone, REFERENCE, batch, ppo.temperature),
        reward=replace(reward, score=reward.score - missing_eos(backbone, sequences, ppo.missing_eos_penalty)),
        cost=appraisal(tally.more_harmful),
        costs=tally.unsafe_shares,
        mean_reward=sum(tally.helpfulness) / len(tally.helpfulness),
    )
