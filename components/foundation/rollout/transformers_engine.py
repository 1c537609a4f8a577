"""Rollout with the training weights themselves: no second copy of the model, no weight transfer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from components.foundation.backbone import Backbone, position_ids
from components.foundation.batching import batches_by_length
from components.foundation.language_model import import_transformers
from components.foundation.rollout import Rollout, Sampling

_STREAMS_APART = 1_000_000_007
"""Between the seeds of two batches, so that no two rollouts of a run come by the same seed."""

_ROWS_DRAWN = 8
"""At once on a CPU: what a draw makes of so many rows of logits stays in its cache, and the draws are five times as
fast as those of 128 rows."""


class TransformersEngine:
    """Batched decoding with a key-value cache, as one role of the backbone."""

    def __init__(self, backbone: Backbone, role: str, batch_size: int = 64) -> None:
        self._backbone = backbone
        self._role = role
        self._batch_size = batch_size

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, rows: Sequence[int] | None = None
    ) -> Rollout:
        """See `RolloutEngine.generate`. Prompts of like length share a batch, so little of it is padding.

        Each batch has a random stream of its own, in which every prompt has its place: what is drawn for a prompt
        depends on the seed and on the prompts beside it, not on which of them are answered here.
        """
        rows = range(len(prompts)) if rows is None else rows
        wanted = set(rows)
        answers: dict[int, list[tuple[int, float]]] = {}
        groups = batches_by_length([len(prompt) for prompt in prompts], self._batch_size)
        with self._backbone.prepared(self._role):
            for number, group in enumerate(groups):
                generator = torch.Generator(self._backbone.device).manual_seed(sampling.seed + number * _STREAMS_APART)
                places = [place for place, row in enumerate(group) if row in wanted]
                if places:
                    own = [group[place] for place in places]
                    decoded = self._decode([prompts[i] for i in own], sampling, generator, places, len(group))
                    answers |= zip(own, decoded, strict=True)
        return Rollout(
            [tuple(token for token, _ in answers[row]) for row in rows],
            [tuple(log_prob for _, log_prob in answers[row]) for row in rows],
            exact=not sampling.truncated,
        )

    def close(self) -> None:
        """Nothing was started."""

    def _decode(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        generator: torch.Generator,
        places: Sequence[int],
        group_size: int,
    ) -> list[list[tuple[int, float]]]:
        """Answers to some prompts of a group as (token, its log-probability); `places` are theirs among the group's
        `group_size` prompts."""
        cache = import_transformers().DynamicCache()
        eos = self._backbone.eos_token_id
        tokens, mask = _pad_left(prompts, eos, self._backbone.device)
        positions = position_ids(mask)
        answers: list[list[tuple[int, float]]] = [[] for _ in prompts]
        drawn_for = torch.tensor(places, device=self._backbone.device)
        going = torch.arange(len(prompts), device=self._backbone.device)  # rows that have not ended
        # no_grad, not inference_mode: tensors made there could not enter a later graph of the same weights
        with self._backbone.role(self._role), torch.no_grad():
            for _ in range(sampling.max_new_tokens):
                logits = self._backbone.decode_step(tokens, mask, positions, cache)
                # a number for every row, ended or not: what a row draws does not depend on when the others end
                uniform = torch.rand(group_size, 1, generator=generator, device=logits.device)[drawn_for[going]]
                token, log_prob = draw(logits, sampling, uniform)
                for row, *drawn in zip(going.tolist(), token.tolist(), log_prob.tolist(), strict=True):
                    answers[row].append((drawn[0], drawn[1]))
                keep = (token != eos).nonzero().squeeze(-1)
                if len(keep) == 0:
                    break
                if len(keep) < len(going):
                    cache.batch_select_indices(keep)
                    going, token, mask, positions = going[keep], token[keep], mask[keep], positions[keep]
                tokens = token.unsqueeze(-1)
                mask = torch.cat([mask, torch.ones_like(tokens)], dim=-1)
                positions = positions[:, -1:] + 1
        return answers


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """[B, V] logits and [B, 1] uniform numbers in [0, 1) -> ([B] sampled ids, [B] their log-probabilities).

    Inverse transform sampling: one random number a row instead of one a vocabulary entry.
    """
    if sampling.temperature == 0:
        token = logits.argmax(dim=-1)
        return token, torch.zeros(token.shape, device=token.device)
    at_once = _ROWS_DRAWN if logits.device.type == "cpu" else len(logits)
    parts = [
        _draw(some, sampling, numbers)
        for some, numbers in zip(logits.split(at_once), uniform.split(at_once), strict=True)
    ]
    tokens, log_probs = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(log_probs)


def _draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.float() / sampling.temperature
    if sampling.truncated:
        logits = truncate(logits, sampling.top_p, sampling.top_k)
    probabilities = torch.softmax(logits, dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    index = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    index = index.clamp(max=logits.shape[-1] - 1)
    return index.squeeze(-1), probabilities.gather(-1, index).squeeze(-1).log()


def truncate(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """[B, V] logits -> the same, with -inf for what is not among the `top_k` and then the `top_p` most likely.

    Of top_p, the token that reaches the sum is kept, so at least one always is (nucleus sampling, arXiv 1904.09751).
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[:, top_k:] = -torch.inf
    probabilities = torch.softmax(ordered, dim=-1)
    sum_before = probabilities.cumsum(dim=-1) - probabilities
    beyond = sum_before >= top_p
    beyond[:, 0] = False
    return torch.full_like(logits, -torch.inf).scatter(-1, order, ordered.masked_fill(beyond, -torch.inf))


def _pad_left(prompts: Sequence[Sequence[int]], padding_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    length = max(len(p) for p in prompts)
    ids = [[padding_id] * (length - len(p)) + list(p) for p in prompts]
    mask = [[0] * (length - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
