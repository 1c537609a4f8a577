"""Rollout with the training weights themselves: no second copy of the model, no weight transfer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from components.foundation.backbone import Backbone, position_ids
from components.foundation.language_model import import_transformers
from components.foundation.rollout import Sampling


class TransformersEngine:
    """Batched decoding with a key-value cache, as one role of the backbone."""

    def __init__(self, backbone: Backbone, role: str, batch_size: int = 64) -> None:
        self._backbone = backbone
        self._role = role
        self._batch_size = batch_size

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[tuple[int, ...]]:
        """See `RolloutEngine.generate`. Prompts of like length share a batch, so little of it is padding."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        generator = torch.Generator(self._backbone.device).manual_seed(sampling.seed)
        answers: list[tuple[int, ...]] = [()] * len(prompts)
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            for row, answer in zip(rows, self._decode([prompts[i] for i in rows], sampling, generator), strict=True):
                answers[row] = answer
        return answers

    def _decode(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator
    ) -> list[tuple[int, ...]]:
        cache = import_transformers().DynamicCache()
        eos = self._backbone.eos_token_id
        tokens, mask = _pad_left(prompts, eos, self._backbone.device)
        drawn: list[Tensor] = []
        finished = torch.zeros(len(prompts), dtype=torch.bool, device=self._backbone.device)
        positions = position_ids(mask)
        # no_grad, not inference_mode: tensors made there could not enter a later graph of the same weights
        with self._backbone.role(self._role), torch.no_grad():
            for _ in range(sampling.max_new_tokens):
                logits = self._backbone.decode_step(tokens, mask, positions, cache)
                token = draw(logits, sampling.temperature, generator).masked_fill(finished, eos)
                drawn.append(token)
                finished = finished | (token == eos)
                if bool(finished.all()):
                    break
                tokens = token.unsqueeze(-1)
                mask = torch.cat([mask, torch.ones_like(tokens)], dim=-1)
                positions = positions[:, -1:] + 1
        return [_until_eos(row, eos) for row in torch.stack(drawn, dim=-1).tolist()]


def draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """[B, V] logits -> [B] sampled ids; temperature 0 takes the most likely one.

    Inverse transform sampling: one uniform number a row instead of one exponential a vocabulary entry.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    cumulative = torch.softmax(logits.float() / temperature, dim=-1).cumsum(dim=-1)
    uniform = torch.rand(len(logits), 1, generator=generator, device=logits.device)
    index = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(-1)
    return index.clamp(max=logits.shape[-1] - 1)


def _pad_left(prompts: Sequence[Sequence[int]], padding_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    length = max(len(p) for p in prompts)
    ids = [[padding_id] * (length - len(p)) + list(p) for p in prompts]
    mask = [[0] * (length - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _until_eos(row: list[int], eos: int) -> tuple[int, ...]:
    return tuple(row[: row.index(eos) + 1]) if eos in row else tuple(row)
