"""The model card that lies beside an exported policy, in the format of Hugging Face model repositories."""

from __future__ import annotations

from components.foundation.results import PpoTrace
from components.foundation.settings import Settings


def _objective(settings: Settings) -> str:
    if settings.ppo.advantage_source == "preference_oracle":
        return "it is as helpful as an annotator's comparisons say, subject to a limit on the share of unsafe answers."
    return "it maximises a reward model for helpfulness subject to a limit on a cost model for harm."


def model_card(settings: Settings, run_id: str, round_number: int, trace: PpoTrace) -> str:
    """Markdown with a YAML head: what the weights are, how they came about, what to be careful of."""
    steps = len(trace.cost)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [safe-rlhf, ppo-lagrangian]
---
# Policy of round {round_number}, run {run_id}

`{settings.base_model}`, fine-tuned on demonstrations and then aligned by PPO-Lagrangian (Safe RLHF, arXiv 2310.12773):
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

The held-out unsafe rate, win rate and over-refusal are tags of the registered version that names this folder.
A learned cost model is not a guarantee: evaluate on your own prompts before you serve it.
The licence is the base model's.
"""
