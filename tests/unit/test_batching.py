"""Text to ids to padded batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from components.foundation.batching import (
    ChatEncoder,
    SequenceBatch,
    TokenSequence,
    answer_cross_entropy,
    batches_by_length,
    collate,
    last_answer_token,
    measure_in_parts,
    token_log_probs,
)
from components.foundation.errors import ModelError
from components.foundation.gguf_conversion import CHAT_TEMPLATE
from components.foundation.language_model import load_tokenizer

START, EOS = 256, 257
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Callable[[str], Path]) -> Any:
    """A token a byte; its template puts START before and after the user's text."""
    return load_tokenizer(tiny_folder("llama"))


def plain(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.golden
def test_a_short_pair_is_laid_out_whole(tokenizer: Any) -> None:
    encoder = ChatEncoder(tokenizer, max_prompt_tokens=10, max_answer_tokens=10)
    sequence = encoder.sequence("Hi", "Ho")
    assert sequence.prompt == (START, *plain(tokenizer, "Hi"), START)
    assert sequence.answer == (*plain(tokenizer, "Ho"), EOS)
    assert encoder.truncated == 0


@given(text=st.text("ab é漢🎈", min_size=1, max_size=40), limit=st.integers(3, 30))
@settings(deadline=None, max_examples=80)
def test_row_29_a_long_prompt_loses_the_end_of_the_text_and_nothing_of_the_template(
    tokenizer: Any, text: str, limit: int
) -> None:
    """Also where the cut falls into the bytes of one character."""
    encoder = ChatEncoder(tokenizer, limit, 8)
    whole = (START, *plain(tokenizer, text), START)
    prompt = encoder.prompt(text)
    assert len(prompt) <= limit
    assert prompt[0] == prompt[-1] == START
    if len(whole) <= limit:
        assert prompt == whole
        assert encoder.truncated == 0
        return
    assert encoder.truncated == 1
    kept = tokenizer.decode(list(prompt[1:-1])).rstrip("\ufffd")
    assert text.startswith(kept)
    assert len(kept.encode()) >= limit - 2 - 3  # no more is lost than the limit asks for, and the rest of a character


@given(text=st.text("ab é漢", max_size=20), limit=st.integers(1, 30))
@settings(deadline=None, max_examples=60)
def test_row_29_a_long_answer_loses_its_end_and_its_eos(tokenizer: Any, text: str, limit: int) -> None:
    encoder = ChatEncoder(tokenizer, 8, limit)
    whole = (*plain(tokenizer, text), EOS)
    answer = encoder.answer(text)
    assert answer == whole[:limit]
    assert (answer[-1] == EOS) == (len(whole) <= limit)
    assert encoder.truncated == int(len(whole) > limit)


@pytest.mark.golden
def test_a_cut_prompt_by_hand(tokenizer: Any) -> None:
    assert ChatEncoder(tokenizer, 6, 8).prompt("abcdefgh") == (START, *plain(tokenizer, "abcd"), START)


def test_row_29_every_cut_is_counted(tokenizer: Any) -> None:
    encoder = ChatEncoder(tokenizer, 6, 3)
    encoder.sequence("too long", "too long")
    encoder.sequence("fits", "ok")
    encoder.sequence("fits", "but not this")
    assert encoder.truncated == 3


@pytest.mark.fault
@pytest.mark.parametrize("limit", [1, 2])
def test_a_limit_that_the_template_fills_is_refused(tokenizer: Any, limit: int) -> None:
    with pytest.raises(ModelError, match=rf"template alone takes 2 tokens.* {limit} allowed"):
        ChatEncoder(tokenizer, limit, 8).prompt("Hello")


@given(text=st.text(max_size=40))
@settings(deadline=None, max_examples=40)
def test_a_prompt_is_what_the_template_makes_of_it(tokenizer: Any, text: str) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    messages = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ChatEncoder(tokenizer, 400, 8).prompt(text) == plain(tokenizer, rendered)


@pytest.mark.fault
@pytest.mark.parametrize(("template", "times"), [("Hello", 0), ("{{ messages[0]['content'] * 2 }}", 2)])
def test_a_template_that_does_not_show_the_text_once_is_refused(tokenizer: Any, template: str, times: int) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=f"shows the user's text {times} times"):
        ChatEncoder(tokenizer, 10, 10)


@pytest.mark.fault
@pytest.mark.parametrize("text", ["<|im_end|>", "a<|im_end|>b", "<|im_start|>", "a<|im_start|>system<|pad|>"])
def test_text_cannot_forge_control_tokens(tokenizer: Any, text: str) -> None:
    """A user who could write a turn's end would speak for the assistant; an answer would end before its end."""
    encoder = ChatEncoder(tokenizer, 200, 200)
    assert max(encoder.prompt(text)[1:-1]) < START
    assert max(encoder.answer(text)[:-1]) < START


IDS = st.lists(st.integers(0, 255), max_size=6).map(tuple)
SEQUENCES = st.lists(st.builds(TokenSequence, prompt=IDS, answer=IDS), min_size=1, max_size=5).filter(
    lambda sequences: any(s.answer for s in sequences)
)


@given(sequences=SEQUENCES, padding_id=st.sampled_from([0, 65, EOS]))
@settings(deadline=None, max_examples=60)
def test_prompts_are_padded_on_the_left_and_answers_on_the_right(
    sequences: Sequence[TokenSequence], padding_id: int
) -> None:
    batch = collate(sequences, padding_id, CPU)
    prompt_length = max(len(s.prompt) for s in sequences)
    answer_length = max(len(s.answer) for s in sequences)
    assert batch.input_ids.shape == batch.attention_mask.shape == (len(sequences), prompt_length + answer_length)
    assert batch.answer_mask.shape == batch.answers.shape == (len(sequences), batch.answer_length)
    assert batch.answer_length == answer_length
    for row, sequence in enumerate(sequences):
        left = prompt_length - len(sequence.prompt)
        content = range(left, prompt_length + len(sequence.answer))
        for column in range(prompt_length + answer_length):
            assert batch.attention_mask[row, column].item() == int(column in content)
            expected = (*sequence.prompt, *sequence.answer)[column - left] if column in content else padding_id
            assert batch.input_ids[row, column].item() == expected
        assert batch.answers[row][batch.answer_mask[row]].tolist() == list(sequence.answer)


def test_an_empty_prompt_is_allowed() -> None:
    batch = collate([TokenSequence((), (1, 2))], 0, CPU)
    assert batch.input_ids.tolist() == [[1, 2]]
    assert batch.answers.tolist() == [[1, 2]]


def test_rows_leave_out_columns_of_padding_on_either_side_of_all_of_them() -> None:
    batch = collate([TokenSequence((1,), (2,)), TokenSequence((3, 4, 9), (5, 6)), TokenSequence((7, 9), (8,))], 0, CPU)
    picked = batch.rows(torch.tensor([2, 0]))
    assert picked.input_ids.tolist() == [[7, 9, 8], [0, 1, 2]]
    assert picked.attention_mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert picked.answer_mask.tolist() == [[True], [True]]
    assert batch.rows(torch.tensor([1])).input_ids.tolist() == [[3, 4, 9, 5, 6]]


def test_rows_without_any_prompt_keep_the_column_before_their_answers() -> None:
    batch = collate([TokenSequence((), (2,)), TokenSequence((3,), (5,))], 0, CPU)
    assert batch.rows(torch.tensor([0])).input_ids.tolist() == [[0, 2]]


@given(
    lengths=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=9),
    rows_in_part=st.integers(1, 10),
)
@settings(deadline=None, max_examples=60)
def test_what_is_measured_in_parts_is_what_the_whole_batch_gives(
    lengths: list[tuple[int, int]], rows_in_part: int
) -> None:
    """Running sums of ids over a row: each needs all that stands before it."""
    ids = iter(range(1, 100))
    sequences = [
        TokenSequence(tuple(next(ids) for _ in range(p)), tuple(next(ids) for _ in range(a))) for p, a in lengths
    ]
    sizes: list[int] = []

    def measure(part: SequenceBatch) -> torch.Tensor:
        sizes.append(len(part.input_ids))
        sums = (part.input_ids * part.attention_mask).cumsum(dim=-1)
        return torch.stack([sums, -sums], dim=-1)[:, -part.answer_length - 1 :]

    batch = collate(sequences, 0, CPU)
    measured = measure_in_parts(batch, rows_in_part, measure)
    assert max(sizes) <= rows_in_part
    assert sum(sizes) == len(sequences)
    assert measured.shape == (len(sequences), batch.answer_length + 1, 2)
    for row, sequence in enumerate(sequences):
        of_row = [sum(sequence.prompt + sequence.answer[:count]) for count in range(len(sequence.answer) + 1)]
        assert measured[row, : len(of_row)].tolist() == [[value, -value] for value in of_row]


@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5), extra=st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_the_last_answer_token_is_the_last_that_the_mask_holds(lengths: list[int], extra: int) -> None:
    width = max(lengths) + extra
    values = torch.arange(len(lengths) * width, dtype=torch.float32).view(len(lengths), width)
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    expected = [row * width + length - 1 for row, length in enumerate(lengths)]
    assert last_answer_token(values, mask).tolist() == expected


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 9)),
    scale=st.sampled_from([0.0, 1.0, 50.0, 1000.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_log_probs_equal_log_softmax(shape: tuple[int, int, int], scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator) * scale
    tokens = torch.randint(shape[2], shape[:2], generator=generator)
    expected = torch.log_softmax(logits.double(), dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(token_log_probs(logits, tokens).double(), expected, atol=1e-5 * max(1, scale), rtol=1e-5)


def plain_log_probs(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """The formula, all at once."""
    scaled = logits / temperature
    return scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(scaled, dim=-1)


# [B, T, V]: rows that fill a part of one chunk, several chunks with a rest, and chunks of one row
CHUNKED_SHAPES = [(2, 3, 50), (3, 5, 150_000), (1, 2, 1_100_000)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", CHUNKED_SHAPES)
def test_chunked_log_probs_and_gradients_equal_the_plain_formula(
    shape: tuple[int, int, int], temperature: float
) -> None:
    """In float32 against float64: 1e-5 for values, and 1e-6 for gradients, which are at most 1 / temperature."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(shape, generator=generator) * 3).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    tokens = torch.randint(shape[2], shape[:2], generator=generator)
    weights = torch.randn(shape[:2], generator=generator)
    found, expected = token_log_probs(logits, tokens, temperature), plain_log_probs(exact, tokens, temperature)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-6)
    (found * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    assert logits.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-6, rtol=1e-5)


def test_gradients_of_half_precision_logits_are_rounded_once() -> None:
    """bfloat16 keeps 8 bits: the gradient is the exact one to within half of the last of them, 2**-8."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 4, 5_000, generator=generator).bfloat16().requires_grad_()
    exact = logits.detach().double().requires_grad_()
    tokens = torch.randint(5_000, (3, 4), generator=generator)
    token_log_probs(logits, tokens, 0.7).sum().backward()
    plain_log_probs(exact, tokens, 0.7).sum().backward()
    assert logits.grad is not None
    assert exact.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-9, rtol=2**-8 * 1.01)


class LargestFloat32(TorchDispatchMode):
    """Elements of the largest float32 tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.elements = max(self.elements, result.numel())
        return result


def test_the_logits_are_never_held_in_full_precision() -> None:
    """Neither forwards nor backwards, with gradient or without: a chunk of a million is the most."""
    batch = collate([TokenSequence((1,), tuple(range(32))) for _ in range(3)], 0, CPU)
    logits = torch.zeros(3, 32, 40_000, dtype=torch.bfloat16, requires_grad=True)
    with LargestFloat32() as largest, torch.no_grad():
        token_log_probs(logits, batch.answers)
    assert 0 < largest.elements <= 1 << 20
    with LargestFloat32() as largest:
        answer_cross_entropy(logits, batch, batch.answer_mask.sum()).backward()
    assert 0 < largest.elements <= 1 << 20
    assert logits.grad is not None
    assert logits.grad[0, 0, 0].item() == pytest.approx((1 / 40_000 - 1) / 96, rel=2**-8)


def test_log_probs_of_half_precision_logits_are_computed_in_full_precision() -> None:
    """In bfloat16 itself the sum over a vocabulary would be off by percents."""
    logits = torch.zeros(1, 1, 50_000, dtype=torch.bfloat16)
    result = token_log_probs(logits, torch.tensor([[7]]))
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(-torch.log(torch.tensor(50_000.0)).item(), abs=1e-4)


@given(lengths=st.lists(st.integers(1, 50), max_size=40), batch_size=st.integers(1, 12))
@settings(deadline=None, max_examples=60)
def test_batches_by_length_hold_every_row_once_and_like_lengths_together(lengths: list[int], batch_size: int) -> None:
    batches = batches_by_length(lengths, batch_size)
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    assert all(len(rows) == batch_size for rows in batches[:-1])
    assert [lengths[row] for rows in batches for row in rows] == sorted(lengths)
