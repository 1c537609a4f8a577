"""The stage that the reward model and the cost model share: read, train, measure, commit.

What differs (which answer should score higher, the loss, the measures) the two stages pass in.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from components.foundation.backbone import Backbone
from components.foundation.batching import ChatEncoder
from components.foundation.errors import SettingsError
from components.foundation.optimization import batch_count
from components.foundation.preference import NEWEST_FILE, TRAINING_FILE, VALIDATION_FILE, DualPreference, read_jsonl
from components.foundation.preference_trainer import (
    PreferenceLoss,
    PreferenceScores,
    ScoredPair,
    score_validation,
    train_preference_model,
)
from components.foundation.progress import Progress
from components.foundation.results import PreferenceModelResult, to_json
from components.foundation.run_context import finished_uri, open_stage
from components.foundation.setting_sections import PreferenceModelSettings
from components.foundation.settings import Settings
from components.foundation.training_checkpoints import TrainingCheckpoints

_VALIDATION_PAIRS = 8
"""In one forward pass: on a CPU more are no faster, as what a pass holds of them outgrows its cache."""


def run_preference_stage(
    run_uri: str,
    name: str,
    round_number: int,
    sft_uri: str,
    preferences_uri: str,
    *,
    settings_of: Callable[[Settings], PreferenceModelSettings],
    pair_of: Callable[[DualPreference, ChatEncoder], ScoredPair],
    loss_of: Callable[[Settings], PreferenceLoss],
    result_of: Callable[[PreferenceScores, PreferenceScores | None, int], PreferenceModelResult],
    scores_newest: bool = False,
    reads_prompt_of: Callable[[Settings], bool] = lambda _: False,
) -> str:
    """Train one score model; returns the URI of its adapter with result.json beside it.

    Args:
        result_of: the scores of the held-out pairs, those of the newest round's pairs, and how many it was trained on.
        reads_prompt_of: whether scores are also read at the prompt's last token; the model of the round
            before, from which it may go on, must be read alike.
        scores_newest: whether the newest round's pairs are scored, where they are told apart.

    Raises:
        SettingsError: the model of the round before, from which this one goes on, is read elsewhere.
    """
    with open_stage(run_uri, name, round_number) as stage:
        if (done := stage.finished()) is not None:
            return done
        run_settings, store = stage.context.settings, stage.context.store
        settings = settings_of(run_settings)
        backbone = Backbone.load(
            store.fetch(sft_uri),
            run_settings.dtype,
            seed=stage.seed,
            checkpoints_activations=run_settings.distributed.activation_checkpointing,
        )
        encoder = ChatEncoder(backbone.tokenizer, settings.max_length // 2, settings.max_length // 2)
        data = store.fetch(preferences_uri)

        def pairs_in(file: str) -> list[ScoredPair]:
            return [pair_of(record, encoder) for record in read_jsonl(data / file, DualPreference)]

        training, validation = map(pairs_in, (TRAINING_FILE, VALIDATION_FILE))
        stage.mlflow.log_params({"truncated": str(encoder.truncated)})
        if round_number > 1:
            settings = in_later_round(settings)
        training = draw_pairs(training, settings, random.Random(stage.seed))
        progress = Progress(name, batch_count(len(training), settings.batch_size, settings.epochs), "steps")

        def on_step(step: int, total: int, metrics: dict[str, float]) -> None:
            stage.report({f"{name}/{key}": value for key, value in metrics.items()}, step)
            progress.update(step)

        parents = [sft_uri, preferences_uri]
        reads_prompt = reads_prompt_of(run_settings)
        if round_number > 1 and settings.start == "previous":
            parents.append(finished_uri(stage.context, name, round_number - 1))
            backbone.load_role(name, store.fetch(parents[-1]))
            if backbone.reads_prompt(name) != reads_prompt:  # rounds that were taken over from a run of other settings
                raise SettingsError(
                    f"{name}.readout says {'prompt_and_end' if reads_prompt else 'end'}, and the model of round "
                    f"{round_number - 1}, from which {name}.start=previous goes on, is read the other way: set "
                    f"{name}.readout as it was there, or {name}.start=sft"
                )
        else:
            backbone.add_role(name, run_settings.adapters, scored=True, reads_prompt=reads_prompt)
        with TrainingCheckpoints(stage, backbone, parents) as checkpoints:
            train_preference_model(
                backbone, name, training, settings, loss_of(run_settings), stage.seed, on_step, checkpoints
            )

        newest = pairs_in(NEWEST_FILE) if scores_newest and (data / NEWEST_FILE).exists() else []
        result = result_of(
            score_validation(backbone, name, validation, _VALIDATION_PAIRS),
            score_validation(backbone, name, newest, _VALIDATION_PAIRS) if newest else None,
            len(training),
        )
        measured = {"accuracy": result.accuracy, "sign_accuracy": result.sign_accuracy, "auc": result.auc}
        stage.mlflow.log_metrics({f"{name}/{k}": v for k, v in measured.items() if v is not None}, len(training))
        backbone.save_role(name, stage.folder / "out")
        (stage.folder / "out").mkdir(exist_ok=True)
        (stage.folder / "out" / "result.json").write_text(to_json(result))
        return stage.commit(stage.folder / "out", step=len(training), parents=parents)


def in_later_round(settings: PreferenceModelSettings) -> PreferenceModelSettings:
    """The settings with what is different in a later round: how many pairs, and the learning rate."""
    return settings.model_copy(
        update={
            "max_pairs": settings.later_max_pairs or settings.max_pairs,
            "learning_rate": settings.later_learning_rate or settings.learning_rate,
        }
    )


def draw_pairs(pairs: Sequence[ScoredPair], settings: PreferenceModelSettings, rng: random.Random) -> list[ScoredPair]:
    """At most `max_pairs` of the pairs, which stand in the order in which they were judged (0: all of them).

    `unsafe_share` of the drawn ones hold an unsafe answer, as far as there are as many: a cost model that sees few
    unsafe answers puts its zero too high and lets most of them pass. `recent_share` of them are the newest: judgements
    of what the current policy says are few among the shipped ones, and worth more.
    """
    count = settings.max_pairs
    if not 0 < count < len(pairs):
        return list(pairs)
    if settings.unsafe_share is None:
        return _draw(pairs, count, settings.recent_share, rng)
    unsafe = [pair for pair in pairs if max(pair.high_sign, pair.low_sign) > 0]
    safe = [pair for pair in pairs if max(pair.high_sign, pair.low_sign) < 0]
    n_unsafe = min(len(unsafe), max(round(settings.unsafe_share * count), count - len(safe)))
    drawn = ((unsafe, n_unsafe), (safe, count - n_unsafe))
    return [pair for group, n in drawn for pair in _draw(group, n, settings.recent_share, rng)]


def _draw(pairs: Sequence[ScoredPair], count: int, recent_share: float, rng: random.Random) -> list[ScoredPair]:
    """The newest `recent_share` of `count`, the others from all that is left."""
    n_recent = round(recent_share * count)
    earlier, recent = pairs[: len(pairs) - n_recent], pairs[len(pairs) - n_recent :]
    return [*recent, *rng.sample(earlier, count - n_recent)]


def encode_pair(record: DualPreference, high_id: int, encoder: ChatEncoder) -> ScoredPair:
    """A record -> the pair whose answer `high_id` (0 or 1) should score higher."""
    answers = (record.response_0, record.response_1)
    signs = tuple(-1 if safe else +1 for safe in (record.is_response_0_safe, record.is_response_1_safe))
    severities = (record.severity(0), record.severity(1))
    return ScoredPair(
        high=encoder.sequence(record.prompt, answers[high_id]),
        low=encoder.sequence(record.prompt, answers[1 - high_id]),
        high_sign=signs[high_id],
        low_sign=signs[1 - high_id],
        high_severity=severities[high_id],
        low_severity=severities[1 - high_id],
    )
