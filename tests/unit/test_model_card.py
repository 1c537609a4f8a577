"""The model card of an exported policy: what it says of data, licence, base model, judging, evaluation and limits."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from components.foundation.results import PpoTrace, PreferenceModelResult
from components.foundation.settings import resolve_settings
from components.ppo_lagrangian.model_card import CardEvidence, model_card

DIGESTS = {"preferences_train.jsonl": "a" * 64, "prompts.jsonl": "b" * 64}
REWARD = PreferenceModelResult(accuracy=0.75, training_pairs=90, validation_pairs=40)
COST = PreferenceModelResult(accuracy=0.8, training_pairs=90, validation_pairs=40, auc=0.9)
TRACE = PpoTrace(0.25, [4.0, 2.0], [1.0, 0.5], [1.0, 0.5], [0.1, 0.2], [0.01, 0.02])
JUDGE = ["annotate.judge_url=http://judge/v1", "annotate.judge_model=big-judge"]
RULES_SAY = "written rules, which see English words and not their meaning; no person looked."
MODEL_SAYS = "a language model, `big-judge`; no person looked."
PEOPLE_SAY = "people, each pair in an order that chance decides; a majority counts where several looked."
NOT_THEIRS = " It cannot wait for people: its figures are not their view."


def card(*overrides: str, profile: str = "smol") -> str:
    chosen = resolve_settings(profile, 7, overrides)
    return model_card(chosen, "run-1", 2, TRACE, CardEvidence(DIGESTS, (REWARD, COST)))


def head(page: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(page.split("---\n", 2)[1])
    return found


def section(page: str, title: str) -> str:
    return page.split(f"\n## {title}\n\n")[1].split("\n## ")[0].strip()


@pytest.mark.golden
def test_a_card_states_base_model_data_licence_evaluation_and_limits() -> None:
    page = card()
    assert head(page) == {
        "license": "apache-2.0",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["safe-rlhf", "ppo-lagrangian"],
    }
    assert "| base model | `smollm2-135m-instruct` |" in page
    assert section(page, "Evaluation") == (
        "Of held-out pairs, the reward model ranks 75.0% as labelled (40 pairs), the cost model 80.0% (40 pairs, AUC "
        "of unsafe against safe 0.900).\n"
        "The held-out unsafe rate, win rate, over-refusal and the regression suite are measured after this card is "
        "written: they\nare tags of the registered version that names this folder, and the evaluation is the commit "
        "`evaluation_uri` there."
    )
    assert section(page, "Data").splitlines()[2:] == [
        f"| `preferences_train.jsonl` | `{'a' * 64}` |",
        f"| `prompts.jsonl` | `{'b' * 64}` |",
    ]
    assert section(page, "Limits") == (
        "- A learned cost model is not a guarantee: evaluate on your own prompts before you serve it.\n"
        "- The policy is as safe as those who judged can tell (see Judging).\n"
        "- It was trained and is measured on single questions of at most 48 tokens, not on\n"
        "  conversations; longer ones, and other languages than the data's, were not looked at."
    )
    assert section(page, "Licence") == (
        "apache-2.0, as of the base model. All records are those that saferlhf ships, which are apache-2.0."
    )


@pytest.mark.golden
@pytest.mark.parametrize(
    ("overrides", "rounds", "evaluation"),
    [
        (["annotate.annotator=rules"], RULES_SAY, RULES_SAY),
        (["annotate.annotator=rules", *JUDGE], RULES_SAY, RULES_SAY),
        (["annotate.annotator=judge", *JUDGE], MODEL_SAYS, MODEL_SAYS),
        (["annotate.annotator=human"], PEOPLE_SAY, RULES_SAY + NOT_THEIRS),
        (["annotate.annotator=human", *JUDGE], PEOPLE_SAY, MODEL_SAYS + NOT_THEIRS),
    ],
)
def test_a_card_says_who_judged_what(overrides: list[str], rounds: str, evaluation: str) -> None:
    assert section(card(*overrides), "Judging") == (
        "- The preference pairs of the prepared data carry the labels that they came with.\n"
        f"- The answers of the rounds were judged by {rounds}\n"
        f"- The held-out answers of the evaluation are judged by {evaluation}"
    )


@pytest.mark.parametrize(
    ("overrides", "known", "sentences"),
    [
        (["base_model=tiny-gpt2"], "apache-2.0", ["apache-2.0, as of the base model. All records are"]),
        (["base_model=some/model"], "unknown", ["That of the base model, `some/model`, which is not known here"]),
        (
            ["data.preferences=mine.jsonl", "data.prompts=asked.jsonl", "data.held_out=kept.jsonl"],
            "unknown",
            ["apache-2.0, as of the base model.", "The records of `data.preferences`, `data.prompts` went into"],
        ),
    ],
)
def test_a_licence_that_cannot_be_known_is_not_claimed(overrides: list[str], known: str, sentences: list[str]) -> None:
    page = card(*overrides)
    assert head(page)["license"] == known
    for sentence in sentences:
        assert sentence in section(page, "Licence")


@pytest.mark.parametrize(
    ("overrides", "said", "not_said"),
    [
        ([], ["subject to a limit on a cost model", "cost threshold d", "KL to the fine-tuned model"], []),
        (
            ["ppo.reward_shaping=2"],
            ["minus 2 times a cost model for harm, without a limit"],
            ["subject to", "cost threshold", "lambda at the end"],
        ),
        ([], ["mean of the actor after each of the last 4 steps"], []),
        (["ppo.average_steps=40"], ["mean of the actor after each of the last 12 steps"], []),
        (["ppo.average_steps=1"], ["lambda at the end"], ["mean of the actor"]),
        (["ppo.reference=previous"], ["KL to the policy of round 1, last step"], ["KL to the fine-tuned model"]),
    ],
)
def test_a_card_claims_no_limit_no_mean_and_no_reference_that_there_was_not(
    overrides: list[str], said: list[str], not_said: list[str]
) -> None:
    page = card(*overrides)
    assert all(text in page for text in said)
    assert not any(text in page for text in not_said)
