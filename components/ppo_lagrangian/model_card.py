"""The model card that lies beside an exported policy, in the format of Hugging Face model repositories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from components.foundation.base_model import TINY_ARCHITECTURES
from components.foundation.default_model import SMOL
from components.foundation.results import PpoTrace, PreferenceModelResult
from components.foundation.setting_sections import BUILTIN
from components.foundation.settings import Settings
from components.foundation.untrusted import markdown_code

_RANDOM = ("tiny", *(f"tiny-{architecture}" for architecture in TINY_ARCHITECTURES))
_LICENSES = {
    SMOL: ("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    **dict.fromkeys(_RANDOM, ("apache-2.0", "")),
}
"""Of the base models that are known here: licence, and name on the Hugging Face hub (empty: it is not there)."""


@dataclass(frozen=True)
class CardEvidence:
    """What a card can prove.

    Attributes:
        data_digests: file of the prepared data -> its SHA-256.
        results: held-out quality of reward and cost model; None where there were none.
    """

    data_digests: Mapping[str, str]
    results: tuple[PreferenceModelResult, PreferenceModelResult] | None


def _objective(settings: Settings) -> str:
    if settings.ppo.advantage_source == "preference_oracle":
        return "it is as helpful as an annotator's comparisons say, subject to a limit on the share of unsafe answers."
    if (nu := settings.ppo.reward_shaping) is not None:
        return f"it maximises a reward model for helpfulness minus {nu:g} times a cost model for harm, without a limit."
    return "it maximises a reward model for helpfulness subject to a limit on a cost model for harm."


def model_card(settings: Settings, run_id: str, round_number: int, trace: PpoTrace, evidence: CardEvidence) -> str:
    """Markdown with a YAML head: what the weights are, how they came about, what to be careful of."""
    steps = len(trace.cost)
    return f"""---
{_head(settings)}library_name: transformers
pipeline_tag: text-generation
tags: [safe-rlhf, ppo-lagrangian]
---
# Policy of round {round_number}, run {markdown_code(run_id)}

{markdown_code(settings.base_model)}, fine-tuned on demonstrations and then aligned by PPO-Lagrangian
(Safe RLHF, arXiv 2310.12773):
{_objective(settings)}

| | |
|---|---|
| base model | {markdown_code(settings.base_model)} |
| rounds so far | {round_number} of {settings.rounds} |
| steps in this round | {steps} batches of {settings.ppo.episodes_per_step} answers |
{_constraint(settings, trace)}| mean cost, first and last step | {trace.cost[0]:.3f}, {trace.cost[-1]:.3f} |
{_average(settings)}| KL to {_reference(settings, round_number)}, last step | {trace.kl[-1]:.3f} nats a token |
| sampling temperature in training | {settings.ppo.temperature} |
| longest prompt and answer in training | {settings.ppo.max_prompt_tokens} and {settings.ppo.max_new_tokens} tokens |
| seed, settings digest | {settings.seed}, {settings.digest()[:12]} |

```python
from transformers import pipeline
chat = pipeline("text-generation", "path/to/this/folder")
print(chat([{{"role": "user", "content": "How do I repot an orchid?"}}]))
```

## Evaluation

{_quality(evidence)}
The held-out unsafe rate, win rate, over-refusal and the regression suite are measured after this card is written: they
are tags of the registered version that names this folder, and the evaluation is the commit `evaluation_uri` there.

## Judging

- The preference pairs of the prepared data carry the labels that they came with.
- The answers of the rounds were judged by {_judge(settings)}
- The held-out answers of the evaluation are judged by {_evaluator(settings)}

## Data

| file | SHA-256 |
|---|---|
{_digests(evidence.data_digests)}

## Limits

- A learned cost model is not a guarantee: evaluate on your own prompts before you serve it.
- The policy is as safe as those who judged can tell (see Judging).
- It was trained and is measured on single questions of at most {settings.ppo.max_prompt_tokens} tokens, not on
  conversations; longer ones, and other languages than the data's, were not looked at.

## Licence

{_license(settings)}
"""


def _constraint(settings: Settings, trace: PpoTrace) -> str:
    if settings.ppo.reward_shaping is not None:
        return ""
    return f"| cost threshold d | {trace.threshold:.3f} |\n| lambda at the end | {trace.multiplier[-1]:.3f} |\n"


def _average(settings: Settings) -> str:
    """What is said of the steps is said of the actors that drew their answers, and a mean has drawn none."""
    count = min(settings.ppo.average_steps, settings.ppo.steps)
    return f"| these weights | mean of the actor after each of the last {count} steps |\n" if count > 1 else ""


def _reference(settings: Settings, round_number: int) -> str:
    previous = settings.ppo.reference == "previous" and round_number > 1
    return f"the policy of round {round_number - 1}" if previous else "the fine-tuned model"


def _head(settings: Settings) -> str:
    """Names of the licence and the base model for the hub; `unknown` is its word where it cannot be told from here."""
    license_id, base_name = _LICENSES.get(settings.base_model, ("unknown", ""))
    name = f"base_model: {base_name}\n" if base_name else ""
    return f"license: {'unknown' if _own_data(settings) else license_id}\n{name}"


def _quality(evidence: CardEvidence) -> str:
    if evidence.results is None:
        return "There are no fitted models to measure: the annotator compared the answers."
    reward, cost = evidence.results
    auc = "" if cost.auc is None else f", AUC of unsafe against safe {cost.auc:.3f}"
    return (
        f"Of held-out pairs, the reward model ranks {reward.accuracy:.1%} as labelled ({reward.validation_pairs} "
        f"pairs), the cost model {cost.accuracy:.1%} ({cost.validation_pairs} pairs{auc})."
    )


def _digests(digests: Mapping[str, str]) -> str:
    return "\n".join(f"| {markdown_code(name)} | {markdown_code(digest)} |" for name, digest in sorted(digests.items()))


def _judge(settings: Settings) -> str:
    """Who judged the answers that the models learn from, as the end of a sentence."""
    if settings.annotate.annotator == "human":
        return "people, each pair in an order that chance decides; a majority counts where several looked."
    return _automatic_judge(settings)


def _evaluator(settings: Settings) -> str:
    if settings.annotate.annotator == "human":
        return f"{_automatic_judge(settings)} It cannot wait for people: its figures are not their view."
    return _automatic_judge(settings)


def _automatic_judge(settings: Settings) -> str:
    """As `make_judge` chooses: with people, a model where one is named."""
    annotate = settings.annotate
    if annotate.annotator == "judge" or (annotate.annotator == "human" and annotate.judge_url):
        return f"a language model, {markdown_code(annotate.judge_model)}; no person looked."
    return "written rules, which see English words and not their meaning; no person looked."


def _own_data(settings: Settings) -> list[str]:
    """The settings by which other records than the shipped ones went into the weights."""
    data = settings.data
    sources = {"preferences": data.preferences, "demonstrations": data.demonstrations, "prompts": data.prompts}
    return [f"`data.{name}`" for name, source in sources.items() if source != BUILTIN]


def _license(settings: Settings) -> str:
    license_id, _ = _LICENSES.get(settings.base_model, ("", ""))
    base = (
        f"{license_id}, as of the base model."
        if license_id
        else f"That of the base model, {markdown_code(settings.base_model)}, which is not known here: look there first."
    )
    own = _own_data(settings)
    data = (
        f"The records of {', '.join(own)} went into the weights, too: what their licence asks is asked here."
        if own
        else "All records are those that saferlhf ships, which are apache-2.0."
    )
    return f"{base} {data}"
