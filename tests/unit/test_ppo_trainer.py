"""One PPO-Lagrangian step on a tiny model: what the critics see, and what the PTX term holds on to."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from components.foundation.backbone import REFERENCE, Backbone
from components.foundation.batching import SequenceBatch, TokenSequence, answer_cross_entropy, collate, token_log_probs
from components.foundation.errors import DataError
from components.foundation.policy import ACTOR
from components.foundation.ppo_settings import PpoSettings
from components.foundation.preference import (
    Demonstration,
    DualPreference,
    PromptRecord,
    demonstrations_for_ptx,
    demonstrations_on_attacks,
    labelled_safe_on_attacks,
)
from components.foundation.preference_trainer import pair_batch, scores_of_pairs
from components.foundation.rollout import Rollout, Sampling
from components.foundation.rollout.transformers_engine import TransformersEngine
from components.foundation.setting_sections import LoraSettings
from components.foundation.settings import resolve_settings
from components.ppo_lagrangian.episode import (
    COST,
    COST_CRITIC,
    REWARD,
    REWARD_CRITIC,
    compute_advantages,
    safe_sequences,
    score_episode,
    shape_signals,
    weigh_tokens,
)
from components.ppo_lagrangian.multiplier import CostConstraint
from components.ppo_lagrangian.ppo_lagrangian import place_roles
from components.ppo_lagrangian.trainer import PpoLagrangian

LoadTiny = Callable[[str], Backbone]
LORA = LoraSettings(rank=4, alpha=8)
PROMPTS = [(256, 72, 105, 256), (256, 1, 2, 3, 256), (5,), (256, 30, 256)]
SEQUENCES = [TokenSequence(prompt, (79, 107, 3 + i, 257)[i:]) for i, prompt in enumerate(PROMPTS)]
DEMONSTRATIONS = [TokenSequence((256, 90 + i, 256), (60, 61, 62 + i, 257)) for i in range(3)]
SETTINGS = PpoSettings(
    episodes_per_step=4,
    minibatch_size=2,
    max_new_tokens=6,
    actor_learning_rate=5e-3,
    critic_learning_rate=1e-2,
    lambda_learning_rate=0.1,
)


@pytest.fixture
def load_roles(load_tiny: LoadTiny) -> Callable[[str], Backbone]:
    """Six roles with critics of the given kind; models and critics score by strong random weights."""

    def load(critics: str) -> Backbone:
        backbone = load_tiny("tiny-llama")
        backbone.add_role(ACTOR, LORA, scored=False)
        for seed, (model, critic) in enumerate(((REWARD, REWARD_CRITIC), (COST, COST_CRITIC))):
            backbone.add_role(model, LORA, scored=True)
            _randomize(backbone, model, seed)
            if critics == "head":
                backbone.add_head(critic, model)
            else:
                backbone.add_role(critic, LORA, scored=True)
                _randomize(backbone, critic, seed)
        return backbone

    return load


def _randomize(backbone: Backbone, role: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.trainable_parameters(role):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def _trainer(
    backbone: Backbone,
    settings: PpoSettings,
    demonstrations: Sequence[TokenSequence] = (),
    attack_demonstrations: Sequence[TokenSequence] = (),
) -> PpoLagrangian:
    engine = TransformersEngine(backbone, ACTOR)
    trainer = PpoLagrangian(backbone, engine, settings, CostConstraint(0.0), 0, demonstrations)
    trainer.attack_demonstrations = attack_demonstrations
    return trainer


def _log_probs(backbone: Backbone, role: str, batch: SequenceBatch) -> torch.Tensor:
    with backbone.role(role):
        logits = backbone.answer_logits(batch.input_ids, batch.attention_mask, batch.answer_length)
        return token_log_probs(logits, batch.answers) * batch.answer_mask


def _demonstration_loss(backbone: Backbone, demonstrations: Sequence[TokenSequence]) -> float:
    batch = collate(demonstrations, backbone.eos_token_id, backbone.device)
    with backbone.role(ACTOR):
        logits = backbone.answer_logits(batch.input_ids, batch.attention_mask, batch.answer_length)
        return answer_cross_entropy(logits, batch, batch.answer_mask.sum()).item()


@pytest.mark.parametrize("reads_prompt", [False, True])
def test_an_answer_costs_what_it_cost_in_training(load_tiny: LoadTiny, reads_prompt: bool) -> None:
    backbone = load_tiny("tiny-llama")
    backbone.add_role(ACTOR, LORA, scored=False)
    for seed, (model, critic) in enumerate(((REWARD, REWARD_CRITIC), (COST, COST_CRITIC))):
        backbone.add_role(model, LORA, scored=True, reads_prompt=reads_prompt and model == COST)
        _randomize(backbone, model, seed)
        backbone.add_head(critic, model)
    found = score_episode(backbone, SEQUENCES, SETTINGS).cost.score
    pairs = [(sequence, replace(sequence, answer=(1, 2, 257))) for sequence in SEQUENCES]
    with backbone.role(COST):
        in_training = scores_of_pairs(backbone, COST, pair_batch(backbone, pairs))[:, 0]
    torch.testing.assert_close(found, in_training, atol=1e-4, rtol=1e-4)


@pytest.mark.golden
@pytest.mark.parametrize("critics", ["adapter", "head"])
def test_a_critic_reads_the_text_up_to_each_token(load_roles: Callable[[str], Backbone], critics: str) -> None:
    """An adapter's first values are what the model's head says there, read one text at a time; so are the features."""
    backbone = load_roles(critics)
    episode = score_episode(backbone, SEQUENCES, SETTINGS)
    for model, appraisal in ((REWARD, episode.reward), (COST, episode.cost)):
        assert (appraisal.features is None) == (critics == "adapter")
        for row, sequence in enumerate(SEQUENCES):
            ids = torch.tensor([[*sequence.prompt, *sequence.answer]])
            with backbone.role(model):
                alone = backbone.scores(model, ids, torch.ones_like(ids))[0]
                hidden = backbone.hidden_states(ids, torch.ones_like(ids))[0]
            before = slice(len(sequence.prompt) - 1, -1)
            found, expected = appraisal.values, alone[before]
            if appraisal.features is not None:
                found, expected = appraisal.features, hidden[before]
            torch.testing.assert_close(found[row, : len(sequence.answer)], expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(appraisal.score[row], alone[-1], atol=1e-4, rtol=1e-4)


def test_a_critic_that_is_a_head_learns_and_leaves_its_model_alone(load_roles: Callable[[str], Backbone]) -> None:
    """Costs of answers are what the head predicts from the hidden states, so the errors of a fit fall to nearly 0."""
    backbone = load_roles("head")
    before = score_episode(backbone, SEQUENCES, SETTINGS)
    heads = copy.deepcopy([p.detach() for p in backbone.trainable_parameters(REWARD_CRITIC)])
    changes = {"actor_learning_rate": 1e-9, "critic_ridge": 1e-4, "critic_memory": 1.0}  # a policy that stays the same
    trainer = _trainer(backbone, SETTINGS.model_copy(update=changes))
    losses = [trainer.step(PROMPTS, step).reward_critic_loss for step in range(30)]
    after = score_episode(backbone, SEQUENCES, SETTINGS)
    assert torch.equal(before.reward.score, after.reward.score)
    assert torch.equal(before.cost.score, after.cost.score)
    trained = backbone.trainable_parameters(REWARD_CRITIC)
    assert len(trained) == 2  # weight and bias: no adapter
    assert not torch.equal(heads[0], trained[0])
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("critics", ["adapter", "head"])
def test_one_step_changes_actor_and_critics_and_nothing_else(
    load_roles: Callable[[str], Backbone], critics: str
) -> None:
    backbone = load_roles(critics)
    before = score_episode(backbone, SEQUENCES, SETTINGS)
    roles = (REWARD_CRITIC, COST_CRITIC)
    critics_before = {role: backbone.role_state(role) for role in roles}
    metrics = _trainer(backbone, SETTINGS).step(PROMPTS, step=0)
    after = score_episode(backbone, SEQUENCES, SETTINGS)
    assert torch.equal(before.reference_log_probs, after.reference_log_probs)
    assert torch.equal(before.reward.score, after.reward.score)
    assert torch.equal(before.cost.score, after.cost.score)
    assert not torch.equal(before.log_probs, after.log_probs)
    for role in roles:
        now = backbone.role_state(role)
        assert any(not torch.equal(tensor, now[name]) for name, tensor in critics_before[role].items())
    assert metrics.ptx_loss == 0.0


@pytest.mark.golden
def test_the_ptx_term_is_the_language_model_loss_of_the_demonstrations(load_roles: Callable[[str], Backbone]) -> None:
    """One demonstration, one update: the reported loss is its mean negative log-probability before that update."""
    backbone = load_roles("head")
    settings = SETTINGS.model_copy(update={"minibatch_size": 4, "ptx_coefficient": 1.0})
    batch = collate(DEMONSTRATIONS[:1], backbone.eos_token_id, backbone.device)
    expected = -_log_probs(backbone, REFERENCE, batch).sum() / 4  # the actor is still the reference; four answer tokens
    metrics = _trainer(backbone, settings, DEMONSTRATIONS[:1]).step(PROMPTS, step=0)
    assert metrics.ptx_loss == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.golden
@pytest.mark.parametrize(("share", "on_attacks"), [(0.0, 0), (0.25, 1), (0.6, 2), (1.0, 4)])
def test_ptx_draws_its_share_of_answers_to_attacks(
    load_roles: Callable[[str], Backbone], share: float, on_attacks: int
) -> None:
    """One demonstration of either sort, so each draw is the same one: the loss tells how many there were of each."""
    backbone = load_roles("head")
    changes = {"minibatch_size": 4, "ptx_coefficient": 1.0, "red_team_share": share}
    attack = TokenSequence((256, 7, 256), (70, 257))
    drawn = [attack] * on_attacks + [DEMONSTRATIONS[0]] * (4 - on_attacks)
    expected = _demonstration_loss(backbone, drawn)
    trainer = _trainer(backbone, SETTINGS.model_copy(update=changes), DEMONSTRATIONS[:1], [attack])
    assert trainer.step(PROMPTS, step=0).ptx_loss == pytest.approx(expected, rel=1e-4)


def test_answers_are_safe_by_the_sign_of_their_cost(load_roles: Callable[[str], Backbone]) -> None:
    """Eleven of them, more than one pass takes."""
    backbone = load_roles("head")
    sequences = [TokenSequence((256, 30 + i, 256), (60 + i, 3, 257)[i % 2 :]) for i in range(11)]
    costs = [score_episode(backbone, [sequence], SETTINGS).costs[0] for sequence in sequences]
    assert min(costs) < 0 < max(costs)
    assert safe_sequences(backbone, sequences) == [s for s, cost in zip(sequences, costs, strict=True) if cost <= 0]
    assert safe_sequences(backbone, []) == []


def test_only_with_a_ptx_term_do_demonstrations_grow_likelier(load_roles: Callable[[str], Backbone]) -> None:
    def loss_after(coefficient: float) -> float:
        backbone = load_roles("head")
        settings = SETTINGS.model_copy(update={"ptx_coefficient": coefficient})
        trainer = _trainer(backbone, settings, DEMONSTRATIONS)
        for step in range(25):
            trainer.step(PROMPTS, step)
        return _demonstration_loss(backbone, DEMONSTRATIONS)

    without, with_term = loss_after(0.0), loss_after(4.0)
    assert with_term < 0.92 * without


def test_under_reward_shaping_one_critic_learns_and_lambda_is_the_weight(load_roles: Callable[[str], Backbone]) -> None:
    backbone = load_roles("adapter")
    before = score_episode(backbone, SEQUENCES, SETTINGS)
    metrics = _trainer(backbone, SETTINGS.model_copy(update={"reward_shaping": 3.0})).step(PROMPTS, step=0)
    after = score_episode(backbone, SEQUENCES, SETTINGS)
    assert torch.equal(before.cost.values, after.cost.values)
    assert not torch.equal(before.reward.values, after.reward.values)
    assert not torch.equal(before.log_probs, after.log_probs)
    assert (metrics.multiplier, metrics.cost_critic_loss) == (pytest.approx(3.0), 0.0)


@pytest.mark.golden
def test_reward_shaping_is_the_plain_reward_less_the_weighted_cost(load_roles: Callable[[str], Backbone]) -> None:
    """The advantages are those of a single signal r - nu c, whatever lambda is."""
    backbone = load_roles("adapter")
    episode = score_episode(backbone, SEQUENCES, SETTINGS)
    settings = SETTINGS.model_copy(update={"reward_shaping": 0.7})
    shaped = replace(episode.reward, score=episode.reward.score - 0.7 * episode.cost.score)
    nothing = replace(episode.cost, score=torch.zeros(4), values=torch.zeros_like(episode.cost.values))
    found = compute_advantages(episode, shape_signals(episode, settings), settings, multiplier=9.0)
    # lambda 0 leaves the reward side alone
    plain = replace(episode, reward=shaped, cost=nothing)
    expected = compute_advantages(plain, shape_signals(plain, SETTINGS), SETTINGS, multiplier=0.0)
    torch.testing.assert_close(found.combined, expected.combined)
    torch.testing.assert_close(found.reward_returns, expected.reward_returns)
    assert found.cost_returns is None


def test_pid_moves_the_multiplier_by_its_own_rule(load_roles: Callable[[str], Backbone]) -> None:
    settings = SETTINGS.model_copy(
        update={"lagrangian": "pid", "pid_proportional": 2.0, "pid_integral": 0.5, "pid_derivative": 0.0}
    )
    trainer = _trainer(load_roles("head"), settings)
    assert trainer.multiplier.value == pytest.approx(settings.lambda_init)
    metrics = trainer.step(PROMPTS, step=0)
    cost = metrics.cost_moving_average  # threshold 0: it is the violation
    expected = 2.0 * cost + 0.5 * max(settings.lambda_init / 0.5 + cost, 0.0)
    assert metrics.multiplier == pytest.approx(min(max(expected, settings.lambda_min), settings.lambda_max))


@pytest.mark.parametrize("window", [2, 6])
def test_a_window_that_cuts_a_batch_holds_attacks_as_often_as_other_prompts(
    load_roles: Callable[[str], Backbone], window: int
) -> None:
    """A batch begins with its attacks. Here they cost 1 and the others 0, and half of the prompts are attacks."""
    backbone = load_roles("head")
    trainer = _trainer(backbone, SETTINGS.model_copy(update={"cost_window": window, "max_new_tokens": 1}))
    found = [
        trainer.step(
            PROMPTS, step, lambda s: replace(score_episode(backbone, s, SETTINGS), costs=[1.0, 1.0, 0.0, 0.0])
        ).cost_moving_average
        for step in range(16)
    ]
    assert sum(found) / len(found) == pytest.approx(0.5, abs=0.1)
    assert len(set(found)) > 1


def test_an_ngram_of_one_token_is_plain_token_ppo_bit_for_bit(load_roles: Callable[[str], Backbone]) -> None:
    changes = ({}, {"macro_action": "ngram", "macro_action_length": 1})
    plain, macro, other = (
        _trained(load_roles("adapter"), SETTINGS.model_copy(update=change))
        for change in (*changes, {"macro_action": "ngram", "macro_action_length": 3})
    )
    assert all(torch.equal(plain[name], macro[name]) for name in plain)
    assert any(not torch.equal(plain[name], other[name]) for name in plain)


def test_perplexity_decides_where_a_macro_action_ends(load_roles: Callable[[str], Backbone]) -> None:
    """Tokens that the actor finds unlikely, likely, unlikely, likely are macro actions of two: a step on such answers
    is that of pairs, bit for bit, and no other's."""

    def actor_after(macro_action: str, length: int = 3) -> dict[str, torch.Tensor]:
        backbone = load_roles("adapter")
        _randomize(backbone, ACTOR, 7)  # else the reference would find the same tokens likely
        engine = RecitingEngine([_least_and_most_likely_in_turn(backbone, prompt) for prompt in PROMPTS])
        settings = SETTINGS.model_copy(update={"macro_action": macro_action, "macro_action_length": length})
        PpoLagrangian(backbone, engine, settings, CostConstraint(0.0), 0).step(PROMPTS, 0)
        return backbone.role_state(ACTOR)

    def equal(other: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(tensor, other[name]) for name, tensor in by_perplexity.items())

    by_perplexity = actor_after("perplexity")
    assert equal(actor_after("ngram", 2))
    assert not any(equal(actor_after("ngram", length)) for length in (1, 3, 4))


def _least_and_most_likely_in_turn(backbone: Backbone, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """Four tokens, each the least or the most likely for the actor after all before it."""
    answer: tuple[int, ...] = ()
    for largest in (False, True, False, True):
        ids = torch.tensor([[*prompt, *answer, backbone.eos_token_id]], device=backbone.device)
        with backbone.role(ACTOR):
            logits = backbone.answer_logits(ids, torch.ones_like(ids), 1)[0, 0]
        answer += (int(logits.argmax() if largest else logits.argmin()),)
    return answer


class RecitingEngine:
    """Gives the answers that it was told, whatever the policy."""

    def __init__(self, answers: Sequence[tuple[int, ...]]) -> None:
        self._answers = answers

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, rows: Sequence[int] | None = None
    ) -> Rollout:
        answers = [self._answers[row] for row in (range(len(prompts)) if rows is None else rows)]
        return Rollout(answers, [(0.0,) * len(answer) for answer in answers], exact=True)

    def close(self) -> None:
        """Nothing was started."""


def _trained(backbone: Backbone, settings: PpoSettings) -> dict[str, torch.Tensor]:
    """The actor's parameters after two steps."""
    trainer = _trainer(backbone, settings)
    for step in range(2):
        trainer.step(PROMPTS, step)
    return {name: tensor.detach().clone() for name, tensor in backbone.role_tensors(ACTOR).items()}


@pytest.mark.parametrize("reference", ["sft", "previous"])
def test_the_reference_is_the_sft_model_or_the_policy_of_the_round_before(
    load_tiny: LoadTiny, tmp_path: Path, reference: str
) -> None:
    """A second round: with `previous` the KL to the reference is 0 at its first step, with `sft` it is not."""
    backbone = load_tiny("tiny-llama")
    for seed, (role, scored) in enumerate(((ACTOR, False), (REWARD, True), (COST, True))):
        backbone.add_role(role, LORA, scored=scored)
        _randomize(backbone, role, seed)
        backbone.save_role(role, tmp_path / role)
    fresh = load_tiny("tiny-llama")
    place_roles(
        fresh,
        resolve_settings("tiny", overrides=[f"ppo.reference={reference}"]),
        *(tmp_path / role for role in (ACTOR, REWARD, COST)),
    )
    episode = score_episode(fresh, SEQUENCES, SETTINGS)
    assert torch.equal(episode.log_probs, episode.reference_log_probs) == (reference == "previous")


def test_demonstrations_are_sorted_by_what_their_prompt_is_listed_as() -> None:
    """Of a prompt that is not listed, or without a kind, nobody has said whether it is an attack."""
    prompts = [
        PromptRecord("attack", "red_team", "theft"),
        PromptRecord("harmless", "benign"),
        PromptRecord("looks unsafe", "lookalike"),
        PromptRecord("without a kind"),
    ]
    names = ["attack", "harmless", "looks unsafe", "without a kind", "unlisted"]
    demonstrations = [Demonstration(name, "yes") for name in names]
    found = demonstrations_for_ptx(1.0, demonstrations, prompts)
    assert [d.prompt for d in found] == ["harmless", "looks unsafe"]
    assert [d.prompt for d in demonstrations_on_attacks(demonstrations, prompts)] == ["attack"]
    assert demonstrations_for_ptx(0.0, demonstrations, prompts[:1]) == []
    with pytest.raises(DataError, match=r"ptx_coefficient=1.0 needs demonstrations .* benign or lookalike: list them"):
        demonstrations_for_ptx(1.0, demonstrations, prompts[:1])


def test_of_preferences_the_safe_answers_to_attacks_serve_ptx_once_each() -> None:
    prompts = [PromptRecord("attack", "red_team", "theft"), PromptRecord("harmless", "benign"), PromptRecord("other")]

    def pair(prompt: str, answers: tuple[str, str], safe: tuple[bool, bool]) -> DualPreference:
        return DualPreference(prompt, *answers, 0, 0, *safe)

    preferences = [
        pair("attack", ("no", "do this"), (True, False)),
        pair("attack", ("no", "never"), (True, True)),
        pair("attack", ("do this", "and that"), (False, False)),
        pair("harmless", ("sure", "here"), (True, True)),
        pair("other", ("no", "do this"), (True, False)),
        pair("unlisted", ("no", "do this"), (True, False)),
    ]
    assert labelled_safe_on_attacks(preferences, prompts) == [
        Demonstration("attack", "no"),
        Demonstration("attack", "never"),
    ]


@pytest.mark.golden
@pytest.mark.parametrize(
    ("schedule", "warmup", "step", "factor"),
    [
        ("constant", 0.0, 3, 1.0),
        ("cosine", 0.0, 0, 1.0),
        ("cosine", 0.0, 2, 0.5),
        ("cosine", 0.0, 3, (1 - 0.5**0.5) / 2),
        ("cosine", 0.5, 0, 0.5),
        ("cosine", 0.5, 1, 1.0),
        ("cosine", 0.5, 3, 0.5),
        ("trapezoid", 0.5, 0, 0.5),
        ("trapezoid", 0.5, 2, 1.0),
    ],
)
def test_the_actors_learning_rate_follows_its_schedule(
    load_roles: Callable[[str], Backbone], schedule: str, warmup: float, step: int, factor: float
) -> None:
    """Adam's first step moves a weight by the learning rate, whatever its gradient; of four steps the third has half
    of it and the last cosine(3/4 pi). With half of them to warm up, the two others fall. A trapezoid stays up till its
    last quarter."""
    backbone = load_roles("head")
    before = {name: tensor.detach().clone() for name, tensor in backbone.role_tensors(ACTOR).items()}
    changes = {"actor_schedule": schedule, "actor_warmup_share": warmup, "steps": 4, "minibatch_size": 4}
    _trainer(backbone, SETTINGS.model_copy(update=changes)).step(PROMPTS, step)
    moved = max(
        float((tensor.detach() - before[name]).abs().max()) for name, tensor in backbone.role_tensors(ACTOR).items()
    )
    assert moved == pytest.approx(SETTINGS.actor_learning_rate * factor, rel=0.01)


def test_a_step_is_a_function_of_its_seed(load_roles: Callable[[str], Backbone]) -> None:
    settings = SETTINGS.model_copy(update={"ptx_coefficient": 1.0})
    first, second = (
        replace(_trainer(load_roles("head"), settings, DEMONSTRATIONS).step(PROMPTS, 3), rollout_tokens_per_second=0.0)
        for _ in range(2)
    )
    assert first == second


def test_sampling_and_scoring_agree_on_log_probabilities(load_roles: Callable[[str], Backbone]) -> None:
    """The engine samples from the distribution that the update measures: at temperature 0 its tokens are the argmax."""
    backbone = load_roles("head")
    answers = TransformersEngine(backbone, ACTOR).generate(PROMPTS, Sampling(0.0, 6, seed=0)).answers
    batch = collate(
        [TokenSequence(p, a) for p, a in zip(PROMPTS, answers, strict=True)], backbone.eos_token_id, backbone.device
    )
    with backbone.role(ACTOR):
        logits = backbone.answer_logits(batch.input_ids, batch.attention_mask, batch.answer_length)
    assert torch.equal(logits.argmax(-1)[batch.answer_mask], batch.answers[batch.answer_mask])


class DriftingEngine:
    """The transformers engine, whose log-probabilities are shifted and which does not call itself exact."""

    def __init__(self, backbone: Backbone, shift: float) -> None:
        self._engine, self._shift = TransformersEngine(backbone, ACTOR), shift

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, rows: Sequence[int] | None = None
    ) -> Rollout:
        rollout = self._engine.generate(prompts, sampling, rows)
        shifted = [tuple(value + self._shift for value in row) for row in rollout.log_probs]
        return Rollout(rollout.answers, shifted, exact=False)

    def close(self) -> None:
        self._engine.close()


def test_the_plain_engine_has_no_drift_and_its_tokens_weigh_the_same(load_roles: Callable[[str], Backbone]) -> None:
    backbone = load_roles("head")
    _randomize(backbone, ACTOR, 7)
    rollout = TransformersEngine(backbone, ACTOR).generate(PROMPTS, Sampling(0.7, 6, seed=0))
    sequences = [TokenSequence(p, a) for p, a in zip(PROMPTS, rollout.answers, strict=True)]
    settings = SETTINGS.model_copy(update={"temperature": 0.7})
    episode = weigh_tokens(score_episode(backbone, sequences, settings), rollout, cap=2.0)
    assert episode.weights is None
    assert 0 <= episode.drift < 1e-4


@pytest.mark.golden
def test_tokens_of_a_truncated_draw_weigh_the_probability_that_was_kept(
    load_roles: Callable[[str], Backbone],
) -> None:
    """Among the 5 most likely tokens q = pi / Z, so pi / q = Z, the sum of their probabilities."""
    backbone = load_roles("head")
    _randomize(backbone, ACTOR, 7)
    rollout = TransformersEngine(backbone, ACTOR).generate(PROMPTS, Sampling(1.0, 6, seed=0, top_k=5))
    sequences = [TokenSequence(p, a) for p, a in zip(PROMPTS, rollout.answers, strict=True)]
    episode = weigh_tokens(score_episode(backbone, sequences, SETTINGS), rollout, cap=2.0)
    batch = episode.batch
    with backbone.role(ACTOR):
        logits = backbone.answer_logits(batch.input_ids, batch.attention_mask, batch.answer_length)
    kept = torch.softmax(logits, dim=-1).topk(5).values.sum(dim=-1)
    assert episode.weights is not None
    torch.testing.assert_close(episode.weights, torch.where(batch.answer_mask, kept, 1.0), atol=1e-4, rtol=1e-4)
    assert episode.drift == pytest.approx(-kept[batch.answer_mask].log().mean().item(), abs=1e-4)


def test_an_update_counts_a_token_by_its_weight_up_to_the_cap(load_roles: Callable[[str], Backbone]) -> None:
    """All tokens half as likely for the trainer: half the loss. Far likelier: the cap times the loss."""
    losses = []
    for shift in (0.0, math.log(2), -10.0):
        backbone = load_roles("head")
        settings = SETTINGS.model_copy(update={"minibatch_size": 4, "whiten_advantages": False})
        metrics = PpoLagrangian(backbone, DriftingEngine(backbone, shift), settings, CostConstraint(0.0), 0).step(
            PROMPTS, step=0
        )
        assert metrics.drift == pytest.approx(abs(shift), abs=1e-4)
        losses.append(metrics.actor_loss)
    assert abs(losses[0]) > 1e-3
    assert losses[1] == pytest.approx(losses[0] / 2, rel=1e-3)
    assert losses[2] == pytest.approx(losses[0] * SETTINGS.importance_cap, rel=1e-3)


@pytest.mark.fault
def test_row_29_an_answer_without_eos_pays_its_penalty_and_its_cost_stays_as_it_is(
    load_roles: Callable[[str], Backbone],
) -> None:
    """The same answers, scored with a penalty of 0.6 and without one."""
    backbone = load_roles("adapter")
    answers = [(79, 107, 257), (79, 107, 108)]
    sequences = [TokenSequence(PROMPTS[0], answer) for answer in answers]
    free, paying = (
        score_episode(backbone, sequences, SETTINGS.model_copy(update={"missing_eos_penalty": penalty}))
        for penalty in (0.0, 0.6)
    )
    torch.testing.assert_close(free.reward.score - paying.reward.score, torch.tensor([0.0, 0.6]))
    assert free.costs == paying.costs
