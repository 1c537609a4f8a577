"""What the stage `annotate` does where people label: publish the batch once, wait for labels by ending, take them over.

A stage that waited as a running pod would hold a machine for days and lose everything with it. So it ends, says what is
missing, and is started again: it finds the batch, and what has been imported since.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from components.annotate.human.batch import Mixture, build_items
from components.annotate.human.batch_store import BatchStore
from components.annotate.human.majority import majority_verdicts, preference_of
from components.annotate.human.results import LabelResult, result_table, summarize
from components.foundation.errors import LabelsAwaited
from components.foundation.judging import AnswerPair
from components.foundation.preference import LABELS_FILE, TRAINING_FILE, VALIDATION_FILE, DualPreference, read_jsonl
from components.foundation.results import to_json, write_records
from components.foundation.run_context import RunContext, Stage, finished_uri
from components.foundation.setting_sections import StoreSettings
from components.foundation.waiting_runs import remember_waiting


@dataclass(frozen=True)
class LabelledPairs:
    """What people's labels became: usable preferences, from which batch."""

    preferences: list[DualPreference]
    batch_uri: str
    result: LabelResult

    def metrics(self) -> dict[str, float]:
        """For MLflow; agreement where it says something."""
        figures = {"annotate/annotators": float(len(self.result.annotators))}
        for measured in self.result.agreement:
            if measured.alpha is not None:
                figures[f"annotate/alpha_{measured.question.replace(' ', '_')}"] = measured.alpha
        return figures


def labels_of_people(stage: Stage, pairs: Sequence[AnswerPair], answers_uri: str) -> LabelledPairs:
    """Preferences by majority. The stage's folder gets the labels, the figures and their table.

    Raises:
        LabelsAwaited: labels are missing. The run waits in MLflow, and for the next run of the same settings.
    """
    context, settings = stage.context, stage.context.settings.annotate
    batch = BatchStore(context, stage.round)
    batch_uri = batch.batch_uri()
    if batch_uri is None:
        data_uri = finished_uri(context, "prepare_data", 0)
        mixture = Mixture(settings.overlap_share, settings.overlap_annotators, settings.gold_share)
        items = build_items(pairs, _known_preferences(context, data_uri), mixture, stage.seed)
        batch_uri = batch.publish(items, [answers_uri, data_uri])
    items, labels = batch.items(), batch.labels()
    result = summarize(batch_uri, items, labels, settings.exclude_careless)
    if result.labels_missing:
        remember_waiting(context, stage.name, stage.round)
        context.tracker.finish_pipeline_run(context.mlflow_run_id, "SCHEDULED")
        raise LabelsAwaited(waiting_words(context, result))
    excluded = {a.name for a in result.annotators if a.excluded}
    verdicts = majority_verdicts(items, labels, excluded)
    write_records(stage.folder / LABELS_FILE, labels)
    (stage.folder / "label_result.json").write_text(to_json(result), encoding="utf-8")
    (stage.folder / "label_result.md").write_text(result_table(result), encoding="utf-8")
    preferences = [preference_of(item, verdicts[item.item_id]) for item in items if item.item_id in verdicts]
    return LabelledPairs(preferences, batch_uri, result)


def waiting_words(context: RunContext, result: LabelResult) -> str:
    """What is missing, and what to do."""
    usual = context.run_uri == f"{StoreSettings().uri}/runs/{context.run_id}"
    run = context.run_id if usual else context.run_uri
    return (
        f"waiting for labels: {result.items} items at {result.batch_uri} lack {result.labels_missing} labels; export "
        f"them with `saferlhf annotations export {run} -o FOLDER`, bring labels back with `saferlhf annotations import "
        f"{run} FILE`, and go on with --resume {context.run_id}, or on a cluster "
        "with Retry or the schedule's next run"
    )


def _known_preferences(context: RunContext, data_uri: str) -> list[DualPreference]:
    folder = context.store.fetch(data_uri)
    parts = (TRAINING_FILE, VALIDATION_FILE)
    return [record for part in parts for record in read_jsonl(folder / part, DualPreference)]
