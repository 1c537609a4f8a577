"""Supervised fine-tuning: next-token cross-entropy on answer tokens (paper section 4.1; prompt tokens are masked).

Run: 1 read demonstrations, 2 encode, 3 train an adapter, 4 merge it into the weights, 5 export, 6 commit.
The merged model is the base that all later roles share, and the reference policy of PPO.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from components.foundation import distributed
from components.foundation.backbone import Backbone
from components.foundation.base_model import resolve_base_model
from components.foundation.batching import ChatEncoder, TokenSequence, answer_cross_entropy, answer_tokens, collate
from components.foundation.optimization import batch_count, cosine_factor, shuffled_batches
from components.foundation.policy import export_merged
from components.foundation.preference import Demonstration, read_jsonl
from components.foundation.preference_trainer import OnStep
from components.foundation.progress import Progress
from components.foundation.role_optimizer import UpdateGuard, make_optimizers
from components.foundation.run_context import open_stage
from components.foundation.setting_sections import SftSettings
from components.foundation.training_checkpoints import TrainingCheckpoints, TrainingState

STAGE = "sft"
_ROLE = "sft"


def run_sft(run_uri: str, data_uri: str) -> str:
    """Stage: demonstrations -> URI of a plain Hugging Face folder."""
    with open_stage(run_uri, STAGE, 0) as stage:
        if (done := stage.finished()) is not None:
            return done
        settings = stage.context.settings
        base = resolve_base_model(settings.base_model, stage.context.store)
        backbone = Backbone.load(
            base,
            settings.dtype,
            seed=stage.seed,
            checkpoints_activations=settings.distributed.activation_checkpointing,
        )
        records = read_jsonl(stage.context.store.fetch(data_uri) / "demonstrations.jsonl", Demonstration)
        encoder = ChatEncoder(backbone.tokenizer, settings.sft.max_length // 2, settings.sft.max_length // 2)
        examples = [encoder.sequence(r.prompt, r.response) for r in records]
        stage.mlflow.log_params({"examples": str(len(examples)), "truncated": str(encoder.truncated)})
        progress = Progress(STAGE, batch_count(len(examples), settings.sft.batch_size, settings.sft.epochs), "steps")

        def on_step(step: int, total: int, metrics: dict[str, float]) -> None:
            stage.report({f"sft/{key}": value for key, value in metrics.items()}, step)
            progress.update(step)

        # every layer: the adapter is merged, so no later role shares a trunk with it
        adapter = settings.adapters and settings.adapters.model_copy(update={"top_layers": 0})
        backbone.add_role(_ROLE, adapter, scored=False)
        with TrainingCheckpoints(stage, backbone, parents=[data_uri]) as checkpoints:
            steps = train_sft(backbone, _ROLE, examples, settings.sft, stage.seed, on_step, checkpoints)
        backbone.save_role(_ROLE, stage.folder / _ROLE)
        export_merged(backbone, _ROLE, base, stage.folder / _ROLE, stage.folder / "model")
        return stage.commit(stage.folder / "model", step=steps, parents=[data_uri])


def train_sft(
    backbone: Backbone,
    role: str,
    examples: Sequence[TokenSequence],
    settings: SftSettings,
    seed: int,
    on_step: OnStep,
    checkpoints: TrainingCheckpoints | None = None,
) -> int:
    """Train the adapter of `role` in place; returns the number of optimiser steps."""
    optimizer = make_optimizers(backbone, {role: settings.learning_rate})[role]
    total = batch_count(len(examples), settings.batch_size, settings.epochs)
    batches = enumerate(shuffled_batches(examples, settings.batch_size, settings.epochs, seed, length=len))
    guard = UpdateGuard()
    state = checkpoints.restore({role: optimizer}) if checkpoints else TrainingState()
    guard.resume(state.record)
    for step, examples_of_step in islice(batches, state.step, None):
        optimizer.set_learning_rate(settings.learning_rate * cosine_factor(step, total, settings.warmup_share))
        part = distributed.own_part(examples_of_step)
        batch = collate(part.items, backbone.eos_token_id, backbone.device)
        with backbone.role(role, train=True):
            logits = backbone.answer_logits(batch.input_ids, batch.attention_mask, batch.answer_length)
            loss = part.counts * answer_cross_entropy(logits, batch, answer_tokens(examples_of_step).sum())
            optimizer.backward(loss)
        norm = guard.update(role, optimizer, loss=loss.item(), max_gradient_norm=1.0, step=step + 1)
        on_step(step + 1, total, distributed.total_of({"loss": loss.item()}) | {"gradient_norm": norm})
        if checkpoints:
            checkpoints.after_step(step + 1, total, guard.record)
    return total
