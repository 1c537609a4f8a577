"""The model card that lies beside an exported policy, in the format of Hugging Face model repositories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from components.foundation.results import PpoTrace, PreferenceModelResult
from components.foundation.settings import Settings
from components.foundation.untrusted import markdown_code

_LICENSES = {"smollm2-135m-instruct": ("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")}
"""Of the base models that are known here: licence, and name on the Hugging Face hub."""


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
    return "it maximises a reward model for helpfulness subject to a limit on a cost model for harm."


def model_card(settings: Settings, run_id: str, round_number: int, trace: PpoTrace, evidence: CardEvidence) -> str:
    """Markdown with a YAML head: what the weights are, how they came about, what to be careful of."""
    steps = len(trace.cost)
    license_id, base_name = _LICENSES.get(settings.base_model, ("", ""))
    head = f"license: {license_id}\nbase_model: {base_name}\n" if license_id else ""
    return f"""---
{head}library_name: transformers
pipeline_tag: text-generation
tags: [safe-rlhf, ppo-lagrangian]
---
# Policy of round {round_number}, run {markdown_code(run_id)}

{markdown_code(settings.base_model)}, fine-tuned on demonstrations and then aligned by PPO-Lagrangian
(Safe RLHF, arXiv 2310.12773):
{_objective(settings)}

| | |
|---|---|
| rounds so far | {round_number} of {settings.rounds} |
| steps in this round | {steps} batches of {settings.ppo.episodes_per_step} answers |
| cost threshold d | {trace.threshold:.3f} |
| mean cost, first and last step | {trace.cost[0]:.3f}, {trace.cost[-1]:.3f} |
| lambda at the end | {trace.multiplier[-1]:.3f} |
| KL to the fine-tuned model at the end | {trace.kl[-1]:.3f} nats a token |
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

## Data

| file | SHA-256 |
|---|---|
{_digests(evidence.data_digests)}

## Limits

- A learned cost model is not a guarantee: evaluate on your own prompts before you serve it.
- Who judged was `{settings.annotate.annotator}`{_judge(settings)}: the policy is as safe as that judge can tell.
- It was trained and is measured on single questions of at most {settings.ppo.max_prompt_tokens} tokens, not on
  conversations; longer ones, and other languages than the data's, were not looked at.

## Licence

{_license(license_id)}
"""


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
    return (
        f" ({markdown_code(settings.annotate.judge_model)})"
        if settings.annotate.annotator == "judge"
        else " (written rules)"
    )


def _license(license_id: str) -> str:
    return f"{license_id}, as the base model." if license_id else "That of the base model, and of your data."
