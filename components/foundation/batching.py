"""Text -> token ids -> padded batches, the same layout for training, scoring and generation.

Shapes: B sequences, P prompt tokens (padded on the left), T answer tokens (padded on the right), L = P + T.
Answers end with EOS. Padding is told from content by masks alone, so the padding id may be any id, EOS included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from components.foundation import distributed
from components.foundation.errors import ModelError
from components.foundation.untrusted import one_line


@dataclass(frozen=True)
class TokenSequence:
    """One prompt with one answer, as ids. `answer` holds EOS at the end unless it was cut off."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class SequenceBatch:
    """Padded sequences.

    Attributes:
        input_ids: [B, L] token ids.
        attention_mask: [B, L] 1 for content, 0 for padding.
        answer_mask: [B, T] True for answer tokens, EOS included.
        trunk: [B, L, D] hidden states that all roles share, where they have been computed.
    """

    input_ids: Tensor
    attention_mask: Tensor
    answer_mask: Tensor
    trunk: Tensor | None = None

    @property
    def answer_length(self) -> int:
        """T: tokens of the longest answer."""
        return int(self.answer_mask.shape[1])

    @property
    def answers(self) -> Tensor:
        """[B, T] ids of the answer tokens (and padding)."""
        return self.input_ids[:, -self.answer_length :]

    def rows(self, index: Tensor) -> SequenceBatch:
        """The batch of some rows, without the columns at its sides that are padding in all of them.

        Its T is that of their longest answer: what was computed of the whole batch's answers is cut to it.
        """
        filled = self.attention_mask[index, : -self.answer_length].any(dim=0).nonzero()
        first = int(filled[0]) if len(filled) else 0
        answer_length = max(1, int(self.answer_mask[index].sum(dim=-1).max()))
        columns = slice(first, self.input_ids.shape[1] - self.answer_length + answer_length)
        trunk = None if self.trunk is None else self.trunk[index, columns]
        return SequenceBatch(
            self.input_ids[index, columns],
            self.attention_mask[index, columns],
            self.answer_mask[index, :answer_length],
            trunk,
        )


_TEXT = "\ue000"
"""Stands for the user's text where the template alone is laid out: of private use, so no template holds it."""


class ChatEncoder:
    """Lays out prompts by the tokenizer's chat template and cuts what is too long, by rule.

    Template and text become ids apart from each other: a text that spells control tokens is still text.
    A prompt of more than `max_prompt_tokens` loses the end of the *user's text*, never a part of the template;
    an answer of more than `max_answer_tokens` loses its end and then has no EOS. `truncated` counts both.
    """

    def __init__(self, tokenizer: Any, max_prompt_tokens: int, max_answer_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._before, self._after = self._template()
        template_length = len(self._before) + len(self._after)
        self._max_text_tokens = max_prompt_tokens - template_length
        if self._max_text_tokens < 1:
            raise ModelError(
                f"the chat template alone takes {template_length} tokens of the {max_prompt_tokens} allowed for a "
                "prompt: raise the limit"
            )
        self._max_answer_tokens = max_answer_tokens
        self.truncated = 0

    def prompt(self, text: str) -> tuple[int, ...]:
        """User's text -> ids of the templated prompt, ready for the assistant's first token."""
        return (*self._before, *self._cut(self._text_ids(text), self._max_text_tokens), *self._after)

    def answer(self, text: str) -> tuple[int, ...]:
        """Answer text -> ids with EOS."""
        return tuple(self._cut([*self._text_ids(text), self._tokenizer.eos_token_id], self._max_answer_tokens))

    def sequence(self, prompt: str, answer: str) -> TokenSequence:
        return TokenSequence(self.prompt(prompt), self.answer(answer))

    def is_whole(self, sequence: TokenSequence) -> bool:
        """Its answer was not cut. No text holds an EOS, so only a whole answer ends with one."""
        return bool(sequence.answer[-1] == self._tokenizer.eos_token_id)

    def _cut(self, ids: list[int], limit: int) -> list[int]:
        self.truncated += len(ids) > limit
        return ids[:limit]

    def _text_ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    def _template(self) -> tuple[list[int], list[int]]:
        """Ids that stand before and after the user's text."""
        messages = [{"role": "user", "content": _TEXT}]
        try:
            rendered = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program; what it may not do, Jinja's sandbox says in many ways
            raise ModelError(f"the chat template fails ({one_line(error)}): mend the template") from error
        if rendered.count(_TEXT) != 1:
            raise ModelError(
                f"the chat template shows the user's text {rendered.count(_TEXT)} times, not once: mend the template"
            )
        before, after = (self._tokenizer.encode(part, add_special_tokens=False) for part in rendered.split(_TEXT))
        return before, after


def collate(sequences: Sequence[TokenSequence], padding_id: int, device: torch.device) -> SequenceBatch:
    """Pad prompts on the left and answers on the right."""
    prompt_length = max(len(s.prompt) for s in sequences)
    answer_length = max(len(s.answer) for s in sequences)
    ids, mask = [], []
    for s in sequences:
        left, right = prompt_length - len(s.prompt), answer_length - len(s.answer)
        ids.append([padding_id] * left + list(s.prompt) + list(s.answer) + [padding_id] * right)
        mask.append([0] * left + [1] * (len(s.prompt) + len(s.answer)) + [0] * right)
    attention_mask = torch.tensor(mask, device=device)
    return SequenceBatch(
        input_ids=torch.tensor(ids, device=device),
        attention_mask=attention_mask,
        answer_mask=attention_mask[:, prompt_length:].bool(),
    )


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row numbers in batches of rows of like length, so that little of a batch is padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def measure_in_parts(batch: SequenceBatch, rows_in_part: int, measure: Callable[[SequenceBatch], Tensor]) -> Tensor:
    """What `measure` gives for the batch, [B, T, ...], measured over a few rows of like length at a time.

    Little of such a part is padding, and what a forward pass holds of it is bounded. `measure` gives a part's answers
    along its second dimension, as many as its T or some more in front; beyond a part's longest answer there are zeros.
    All ranks call `measure` equally often, as they take part in each other's passes where weights are partitioned.
    """
    parts = batches_by_length(batch.attention_mask.sum(dim=-1).tolist(), rows_in_part)
    measured = []
    for rows in parts + parts[:1] * (distributed.maximum(len(parts)) - len(parts)):
        part = batch.rows(torch.tensor(rows, device=batch.input_ids.device))
        values = measure(part)
        after = [0, 0] * (values.dim() - 2) + [0, batch.answer_length - part.answer_length]
        measured.append(nn.functional.pad(values, after))
    order = torch.tensor([row for rows in parts for row in rows], device=batch.input_ids.device)
    return torch.cat(measured[: len(parts)])[order.argsort()]


def last_answer_token(per_token: Tensor, answer_mask: Tensor) -> Tensor:
    """[B, T] values and mask -> [B] value at each row's last answer token (its EOS, where it has one)."""
    last = answer_mask.long().sum(dim=-1, keepdim=True) - 1
    return per_token.gather(-1, last.clamp(min=0)).squeeze(-1)


def answer_score(per_token: Tensor, answer_mask: Tensor, *, reads_prompt: bool) -> Tensor:
    """[B, T + 1] head outputs at the prompt's last token and all answer tokens, [B, T] mask -> [B] scores of answers.

    With `reads_prompt` a score is the soft minimum of the output at the prompt's last token and that at the answer's.
    """
    score = last_answer_token(per_token[:, 1:], answer_mask)
    return soft_minimum(score, per_token[:, 0]) if reads_prompt else score


def soft_minimum(a: Tensor, b: Tensor) -> Tensor:
    """`-log(exp(-a) + exp(-b))`, elementwise: high only where both are."""
    return -torch.logaddexp(-a, -b)


_CHUNK_ELEMENTS = 1 << 20
"""Logits that are held in fp32 at a time: 4 MB."""


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """[B, T, V] logits, [B, T] ids -> [B, T] log-probability of each id at the temperature, in fp32.

    Vocabularies are large: [B, T, V] in fp32 would be the largest tensor of a training step. It is never held, neither
    here nor in the backward pass; a few rows at a time are.
    """
    flat: Tensor = _TokenLogProbs.apply(logits.flatten(0, 1), tokens.flatten(), temperature)  # type: ignore[no-untyped-call]
    return flat.view(tokens.shape)


class _TokenLogProbs(torch.autograd.Function):
    """[N, V] logits, [N] ids -> [N] log-probabilities; its gradient is (1[id] - softmax) / temperature."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).float() / temperature
        chunks = logits.split(_rows_in_chunk(logits))
        normalizers = torch.cat([torch.logsumexp(rows.float() / temperature, dim=-1) for rows in chunks])
        ctx.save_for_backward(logits, tokens, normalizers)
        ctx.temperature = temperature
        return chosen - normalizers

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, tokens, normalizers = ctx.saved_tensors
        scaled = gradients[0] / ctx.temperature
        result = torch.empty_like(logits)
        for rows in torch.arange(len(logits), device=logits.device).split(_rows_in_chunk(logits)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            weight = scaled[part].unsqueeze(-1)
            softmax = logits[part].to(torch.float32, copy=True).div_(ctx.temperature)
            softmax.sub_(normalizers[part].unsqueeze(-1)).exp_()
            result[part] = softmax.mul_(-weight).scatter_add_(-1, tokens[part].unsqueeze(-1), weight)
        return result, None, None


def _rows_in_chunk(logits: Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // logits.shape[-1])


def answer_cross_entropy(
    logits: Tensor, batch: SequenceBatch, total_tokens: Tensor | float, weights: Tensor | None = None
) -> Tensor:
    """[B, T, V] logits -> scalar: negative log-probability of the batch's answer tokens, prompts left out.

    The sum over tokens is divided by `total_tokens`, the answer tokens of the *whole* optimiser batch: the losses of
    its parts add up to its mean, however sequences fall into parts. With [T] `weights` of the places in an answer, both
    are sums of weights.
    """
    log_probs = token_log_probs(logits, batch.answers)
    if weights is not None:
        log_probs = log_probs * weights
    return -(log_probs * batch.answer_mask).sum() / total_tokens


def answer_tokens(sequences: Sequence[TokenSequence]) -> Tensor:
    """[B] number of answer tokens of each sequence."""
    return torch.tensor([len(sequence.answer) for sequence in sequences])
