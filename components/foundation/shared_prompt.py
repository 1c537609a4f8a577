"""Two answers to one prompt in one row, so that their prompt is computed once.

    prompt | first answer | second answer | padding

Both answers see the prompt and themselves, and neither sees the other; each goes on from the prompt's last position.
A model is told so by its mask and its positions alone. In profile smol prompts have 23 tokens and answers 21: a row has
65 where two rows have 88.

Shapes: B pairs, L tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from components.foundation.batching import TokenSequence, collate

AnswerPair = tuple[TokenSequence, TokenSequence]
"""Two answers, as a rule to the same prompt."""

_PROMPTS, _ANSWERS = ((1, 2, 3, 4), (3, 2)), ((5, 6, 7), (8, 9, 10, 11))
"""Token ids of the trial: two rows of unlike length, so that one has padding."""


@dataclass(frozen=True)
class PairBatch:
    """Pairs as rows, padded on the right.

    Attributes:
        input_ids: [B, L] token ids.
        attention_mask: [B, L] 1 for content, 0 for padding.
        branches: [B, L] 1 for tokens of the first answer, 2 for the second one's, 0 for all others.
        ends: [B, 2] places of the last token of the first and the second answer (its EOS, where it has one).
        trunk: [B, L, D] hidden states that all roles share, where they have been computed.
    """

    input_ids: Tensor
    attention_mask: Tensor
    branches: Tensor
    ends: Tensor
    trunk: Tensor | None = None

    @property
    def prompt_ends(self) -> Tensor:
        """[B, 1] place of each prompt's last token."""
        return ((self.branches == 0) & self.attention_mask.bool()).sum(dim=-1, keepdim=True) - 1


def have_one_prompt(pairs: Sequence[AnswerPair]) -> bool:
    """Whether the two answers of every pair answer the same prompt."""
    return all(first.prompt == second.prompt for first, second in pairs)


def row_length(pair: AnswerPair) -> int:
    """Tokens of a row."""
    first, second = pair
    return len(first) + len(second.answer)


def collate_pairs(pairs: Sequence[AnswerPair], padding_id: int, device: torch.device) -> PairBatch:
    """One row for each pair; `have_one_prompt` must hold."""
    length = max(map(row_length, pairs))
    ids, mask, branches, ends = [], [], [], []
    for first, second in pairs:
        own = row_length((first, second))
        padding = [0] * (length - own)
        ids.append([*first.prompt, *first.answer, *second.answer] + [padding_id] * len(padding))
        mask.append([1] * own + padding)
        branches.append([0] * len(first.prompt) + [1] * len(first.answer) + [2] * len(second.answer) + padding)
        ends.append([len(first) - 1, own - 1])
    return PairBatch(*(torch.tensor(rows, device=device) for rows in (ids, mask, branches, ends)))


def branch_positions(attention_mask: Tensor, branches: Tensor) -> Tensor:
    """[B, L] mask and branches -> [B, L] positions; both answers go on from the prompt.

    Padding is at 0: no position is beyond those of the sequences, where a model may have none, or stretch all of them.
    """
    positions = attention_mask.cumsum(dim=-1) - 1
    return (positions - (branches == 2) * (branches == 1).sum(dim=-1, keepdim=True)) * attention_mask


def branch_attention(attention_mask: Tensor, branches: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, L] mask and branches -> [B, 1, L, L], to be added to attention scores: 0 where a token sees another one,
    and elsewhere the dtype's least number."""
    length = attention_mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
    on_the_way = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    seen = (causal & on_the_way & attention_mask[:, None, :].bool()).unsqueeze(1)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def respects_branches(hidden_states: Callable[..., Tensor], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether two answers in one row have the hidden states that they have apart, up to rounding in the model's dtype.

    `hidden_states` maps [B, L] ids and mask, and `branches=`, to [B, L, D]. SmolLM2's differ by 0.9 of their norm where
    a second answer sees the first, and by 0.14 where its positions go on from the first; else by less than 0.01.
    """
    pairs = [(TokenSequence(prompt, _ANSWERS[0]), TokenSequence(prompt, _ANSWERS[1])) for prompt in _PROMPTS]
    expected = []
    for sequence in (sequence for pair in pairs for sequence in pair):
        alone = collate([sequence], 0, device)
        expected.append(hidden_states(alone.input_ids, alone.attention_mask)[0, len(sequence.prompt) :])
    together = collate_pairs(pairs, 0, device)
    try:
        states = hidden_states(together.input_ids, together.attention_mask, branches=together.branches)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of the model's own code, which may expect any other mask
        return False
    found = [row[branch == answer] for row, branch in zip(states, together.branches, strict=True) for answer in (1, 2)]
    rounding = 1e-4 if dtype == torch.float32 else 0.03
    return all(bool((a - b).norm() <= rounding * b.norm()) for a, b in zip(found, expected, strict=True))
