"""The transformers rollout engine against a loop with no cache, no batch and no padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from components.foundation.architecture import layers_of
from components.foundation.backbone import REFERENCE, Backbone
from components.foundation.base_model import TINY_ARCHITECTURES
from components.foundation.batching import batches_by_length
from components.foundation.language_model import load_tokenizer
from components.foundation.rollout import Sampling
from components.foundation.rollout.transformers_engine import TransformersEngine, draw, truncate
from components.foundation.setting_sections import LoraSettings

LoadTiny = Callable[[str], Backbone]
MakeTiny = Callable[[str], Path]
LoadPlain = Callable[[Path], Any]
EOS = 257
PROMPTS: list[tuple[int, ...]] = [
    (256, 72, 105, 256),
    (256, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 256),
    (9,),
    (256, 200, 199, 256),
    (256, 72, 105, 33, 33, 33, 256),
    (256, 72, 105, 256),
]
GREEDY = Sampling(temperature=0.0, max_new_tokens=12, seed=0)
SAMPLED = Sampling(temperature=1.0, max_new_tokens=40, seed=3)

every_architecture = pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)


def with_actor(backbone: Backbone) -> Backbone:
    """An actor whose adapter differs strongly from the base, so that its greedy answers have some variety."""
    backbone.add_role("actor", LoraSettings(rank=4, alpha=8), scored=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.trainable_parameters("actor"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return backbone


def naive_greedy(model: Any, prompt: Sequence[int], limit: int) -> tuple[int, ...]:
    ids = list(prompt)
    for _ in range(limit):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids], device=model.device)).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return tuple(ids[len(prompt) :])


@every_architecture
def test_greedy_equals_a_naive_loop(
    load_tiny: LoadTiny, tiny_folder: MakeTiny, load_plain: LoadPlain, architecture: str, tmp_path: Path
) -> None:
    """As the reference against the plain base model; as the actor against its merged and exported weights."""
    backbone = with_actor(load_tiny(architecture))
    answers = {
        role: TransformersEngine(backbone, role).generate(PROMPTS, GREEDY).answers for role in (REFERENCE, "actor")
    }
    assert len(set(answers["actor"])) > 2
    backbone.merge_role("actor")
    backbone.export(tmp_path)
    for role, folder in ((REFERENCE, tiny_folder(architecture)), ("actor", tmp_path)):
        plain = load_plain(folder)
        assert answers[role] == [naive_greedy(plain, prompt, GREEDY.max_new_tokens) for prompt in PROMPTS]


@every_architecture
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_order_is_kept_though_batches_are_sorted_by_length(
    load_tiny: LoadTiny, architecture: str, batch_size: int
) -> None:
    backbone = with_actor(load_tiny(architecture))
    together = TransformersEngine(backbone, "actor", batch_size).generate(PROMPTS, GREEDY).answers
    assert together == [TransformersEngine(backbone, "actor").generate([p], GREEDY).answers[0] for p in PROMPTS]
    assert together[0] == together[5]


@every_architecture
@pytest.mark.parametrize("batch_size", [128, 50])
def test_no_token_goes_through_a_layer_twice(
    tiny_folder: MakeTiny, load_plain: LoadPlain, architecture: str, batch_size: int
) -> None:
    """A batch's prompts at once, then at each step the last token of every row that goes on, and of no other; the
    product with the vocabulary is of one position a row at any time."""
    model = load_plain(tiny_folder(architecture))
    modules = [*layers_of(model)[1], model.get_output_embeddings()]
    seen: list[list[tuple[int, int]]] = [[] for _ in modules]
    for module, shapes in zip(modules, seen, strict=True):
        module.register_forward_pre_hook(
            lambda _, args, kwargs, shapes=shapes: shapes.append((args or (kwargs["hidden_states"],))[0].shape[:2]),
            with_kwargs=True,
        )
    backbone = with_actor(Backbone(model, load_tokenizer(tiny_folder(architecture))))
    prompts = PROMPTS * 20
    wanted = [row for row in range(len(prompts)) if row % 7]
    often_ended = replace(SAMPLED, temperature=9.0)
    answers = TransformersEngine(backbone, "actor", batch_size).generate(prompts, often_ended, wanted).answers
    lengths = dict(zip(wanted, map(len, answers), strict=True))
    assert len(set(lengths.values())) > 3
    in_layers, in_head = list[tuple[int, int]](), list[tuple[int, int]]()
    for group in batches_by_length([len(prompt) for prompt in prompts], batch_size):
        own = [row for row in group if row in lengths]
        running = [sum(lengths[row] > step for row in own) for step in range(max(lengths[row] for row in own))]
        in_layers += [(len(own), max(len(prompts[row]) for row in own)), *((rows, 1) for rows in running[1:])]
        in_head += [(rows, 1) for rows in running]
    assert seen == [*[in_layers] * (len(modules) - 1), in_head]


@every_architecture
def test_sampled_answers_stop_at_eos_or_at_the_limit(load_tiny: LoadTiny, architecture: str) -> None:
    backbone = load_tiny(architecture)
    answers = TransformersEngine(backbone, REFERENCE).generate(PROMPTS * 20, SAMPLED).answers
    assert len(answers) == len(PROMPTS) * 20
    ended = [answer for answer in answers if answer[-1] == EOS]
    assert 0 < len(ended) < len(answers)
    assert all(EOS not in answer[:-1] for answer in answers)
    assert all(len(answer) == SAMPLED.max_new_tokens for answer in answers if answer[-1] != EOS)
    assert len({len(answer) for answer in ended}) > 3


def test_the_same_seed_gives_the_same_answers(load_tiny: LoadTiny) -> None:
    backbone = load_tiny("llama")
    engine = TransformersEngine(backbone, REFERENCE, batch_size=4)
    first = engine.generate(PROMPTS, SAMPLED)
    torch.rand(3)  # whatever else was drawn in the process
    assert engine.generate(PROMPTS, SAMPLED) == first
    other = Sampling(SAMPLED.temperature, SAMPLED.max_new_tokens, seed=4)
    assert engine.generate(PROMPTS, other).answers != first.answers
    assert first.answers[0] != first.answers[5]  # the same prompt twice, drawn independently


def test_a_low_temperature_comes_to_the_greedy_answer(load_tiny: LoadTiny) -> None:
    backbone = with_actor(load_tiny("llama"))
    engine = TransformersEngine(backbone, "actor")
    cold = Sampling(1e-6, GREEDY.max_new_tokens, seed=1)
    assert engine.generate(PROMPTS, cold).answers == engine.generate(PROMPTS, GREEDY).answers


def test_generating_leaves_training_possible(load_tiny: LoadTiny) -> None:
    backbone = with_actor(load_tiny("llama"))
    TransformersEngine(backbone, "actor").generate(PROMPTS, SAMPLED)
    ids = torch.tensor([PROMPTS[0]], device=backbone.device)
    with backbone.role("actor", train=True):
        backbone.answer_logits(ids, torch.ones_like(ids), 2).var().backward()
    assert all(p.grad is not None for p in backbone.trainable_parameters("actor"))


def test_no_prompts_give_no_answers(load_tiny: LoadTiny) -> None:
    assert TransformersEngine(load_tiny("llama"), REFERENCE).generate([], GREEDY).answers == []


def test_an_answer_does_not_depend_on_when_its_neighbours_end(load_tiny: LoadTiny) -> None:
    """Answers of a batch that is stopped early are the beginnings of those of one that goes on."""
    backbone = load_tiny("llama")
    engine = TransformersEngine(backbone, REFERENCE)
    long = engine.generate(PROMPTS * 10, SAMPLED).answers
    short = engine.generate(PROMPTS * 10, Sampling(SAMPLED.temperature, 9, SAMPLED.seed)).answers
    assert short == [answer[:9] for answer in long]


@every_architecture
def test_an_answer_does_not_depend_on_who_ends_beside_it(load_tiny: LoadTiny, architecture: str) -> None:
    """Rows that ended leave the batch; those that stay draw the numbers of their own place all the same."""
    backbone = with_actor(load_tiny(architecture))
    engine = TransformersEngine(backbone, "actor")
    kept = PROMPTS[0]

    def generate(neighbour: tuple[int, ...]) -> tuple[list[tuple[int, ...]], list[int]]:
        """Answers of the rows that keep their prompt, every second one, and the lengths of the others."""
        answers = engine.generate([kept, neighbour] * 20, SAMPLED).answers
        return answers[::2], [len(answer) for answer in answers[1::2]]

    first, first_lengths = generate((256, 200, 199, 256))
    second, second_lengths = generate((256, 3, 4, 256))
    assert first_lengths != second_lengths
    assert first == second


def tempered(temperature: float, top_p: float = 1.0, top_k: int = 0) -> Sampling:
    return Sampling(temperature, max_new_tokens=1, seed=0, top_p=top_p, top_k=top_k)


def uniform(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 1, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    """Chi-square at a fixed seed; the token of weight zero is never drawn."""
    logits = torch.tensor([1.0, -1.0, 0.3, -math.inf, 2.0, 0.0, -2.0])
    n = 20_000
    drawn, _ = draw(logits.expand(n, -1), tempered(temperature), uniform(n))
    counts = torch.bincount(drawn, minlength=len(logits))
    expected = torch.softmax(logits.double() / temperature, dim=-1) * n
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert chisquare(counts[possible].numpy(), expected[possible].numpy()).pvalue > 0.01


@pytest.mark.golden
def test_draws_by_hand() -> None:
    """Weights 0.25, 0.5, 0.25: the uniform number falls into one of three intervals, each closed on the left."""
    logits = torch.tensor([0.25, 0.5, 0.25]).log()
    numbers = torch.tensor([[0.0], [0.2], [0.3], [0.7], [0.8], [0.999]])
    tokens, log_probs = draw(logits.expand(6, -1), tempered(1.0), numbers)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(log_probs, torch.tensor([0.25, 0.25, 0.5, 0.5, 0.25, 0.25]).log())


@given(
    rows=st.lists(st.lists(st.integers(-50, 50), min_size=4, max_size=4, unique=True), min_size=1, max_size=5),
    temperature=st.sampled_from([0.0, 1e-4, 1e-2]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=50)
def test_no_temperature_takes_the_most_likely(rows: list[list[int]], temperature: float, seed: int) -> None:
    logits = torch.tensor(rows, dtype=torch.float32)
    tokens, _ = draw(logits, tempered(temperature), uniform(len(rows), seed))
    assert tokens.tolist() == [row.index(max(row)) for row in rows]


@given(seed=st.integers(0, 10_000), size=st.integers(2, 200), impossible=st.sampled_from(["first", "last", "both"]))
@settings(deadline=None, max_examples=100)
def test_an_impossible_token_is_never_drawn(seed: int, size: int, impossible: str) -> None:
    """Even by the smallest and the largest number that can be drawn: the ends of a sum are where rounding bites."""
    logits = torch.randn(size + 2, generator=torch.Generator().manual_seed(seed))
    if impossible in ("first", "both"):
        logits[0] = -math.inf
    if impossible in ("last", "both"):
        logits[-1] = -math.inf
    numbers = torch.tensor([[0.0], [1.0 - 2.0**-24]])
    tokens, log_probs = draw(logits.expand(2, -1), tempered(1.0), numbers)
    assert all(logits[token] > -math.inf for token in tokens.tolist())
    assert log_probs.isfinite().all()


def kept_by_the_rule(logits: Sequence[float], top_p: float, top_k: int) -> dict[int, float]:
    """Token -> its probability after truncation, from the words of the definition."""
    ranked = sorted(range(len(logits)), key=lambda token: -logits[token])
    ranked = ranked[:top_k] if top_k else ranked
    weights = {token: math.exp(logits[token] - logits[ranked[0]]) for token in ranked}
    kept, reached, total = [], 0.0, sum(weights.values())
    for token in ranked:
        if reached < top_p:
            kept.append(token)
        reached += weights[token] / total
    return {token: weights[token] / sum(weights[other] for other in kept) for token in kept}


@given(
    seed=st.integers(0, 10_000),
    size=st.integers(2, 40),
    top_p=st.sampled_from([0.05, 0.3, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 100]),
)
@settings(deadline=None, max_examples=80)
def test_truncated_draws_and_their_log_probs_follow_the_definition(
    seed: int, size: int, top_p: float, top_k: int
) -> None:
    """Over many uniform numbers: only kept tokens come, and each with the log-probability it is really drawn by."""
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = kept_by_the_rule((logits / 0.7).tolist(), top_p, top_k)
    numbers = torch.linspace(0, 1 - 2**-24, 500).unsqueeze(-1)
    tokens, log_probs = draw(logits.float().expand(500, -1), tempered(0.7, top_p, top_k), numbers)
    for token, log_prob in zip(tokens.tolist(), log_probs.tolist(), strict=True):
        assert log_prob == pytest.approx(math.log(expected[token]), abs=1e-4)
    assert all(token in tokens.tolist() for token, probability in expected.items() if probability > 0.01)


@pytest.mark.golden
def test_truncation_by_hand() -> None:
    """0.5, 0.3, 0.15, 0.05: 0.6 is reached by the first two; a sum that is reached exactly takes no further token."""
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    possible = {
        (0.6, 0): [1, 3],
        (0.49, 0): [1],
        (0.81, 0): [0, 1, 3],
        (1.0, 3): [0, 1, 3],
        (0.6, 1): [1],
        (0.51, 2): [1],  # 0.5 of the 0.8 that are left is 0.625
    }
    for (top_p, top_k), tokens in possible.items():
        kept = truncate(logits, top_p, top_k)
        assert kept.isfinite().nonzero()[:, 1].tolist() == tokens
        assert torch.equal(kept[:, tokens], logits[:, tokens])


@every_architecture
@pytest.mark.parametrize("sampling", [SAMPLED, replace(SAMPLED, temperature=0.7, top_p=0.8, top_k=40)])
def test_log_probs_are_those_of_the_whole_text_at_once(
    load_tiny: LoadTiny, architecture: str, sampling: Sampling
) -> None:
    """Without cache and batch, by one pass over prompt and answer."""
    backbone = with_actor(load_tiny(architecture))
    rollout = TransformersEngine(backbone, "actor").generate(PROMPTS, sampling)
    assert rollout.exact == (sampling is SAMPLED)
    for prompt, answer, log_probs in zip(PROMPTS, rollout.answers, rollout.log_probs, strict=True):
        ids = torch.tensor([[*prompt, *answer]], device=backbone.device)
        with backbone.role("actor"):
            logits = backbone.answer_logits(ids, torch.ones_like(ids), len(answer))[0].double() / sampling.temperature
        expected = [
            math.log(kept_by_the_rule(row, sampling.top_p, sampling.top_k)[token])
            for row, token in zip(logits.tolist(), answer, strict=True)
        ]
        assert log_probs == pytest.approx(expected, abs=1e-3)


def test_greedy_tokens_are_certain(load_tiny: LoadTiny) -> None:
    rollout = TransformersEngine(with_actor(load_tiny("llama")), "actor").generate(PROMPTS, GREEDY)
    assert [len(p) for p in rollout.log_probs] == [len(a) for a in rollout.answers]
    assert {value for log_probs in rollout.log_probs for value in log_probs} == {0.0}
