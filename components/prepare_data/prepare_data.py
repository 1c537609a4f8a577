"""Reads the record files, validates them, and writes what the later stages read.

Run: 1 load, 2 set bad rows aside, 3 limit, 4 split preferences by prompt, 5 write, 6 end the run where nothing is
new, 7 commit.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from components.foundation.errors import DataError
from components.foundation.preference import (
    KINDS,
    TRAINING_FILE,
    VALIDATION_FILE,
    Demonstration,
    DualPreference,
    LoadResult,
    PromptRecord,
    RegressionPrompt,
    check_bad_share,
    demonstrations_for_ptx,
    load_records,
    read_jsonl,
    split_by_prompt,
)
from components.foundation.results import write_records
from components.foundation.run_context import open_run, open_stage
from components.foundation.setting_sections import BUILTIN, DataSettings
from components.foundation.untrusted import markdown_code
from components.prepare_data.freshness import check_freshness

STAGE = "prepare_data"
BUILTIN_FOLDER = Path(__file__).parent / "builtin"
DEMONSTRATIONS_FILE = "demonstrations.jsonl"
_TABLE_FILE = "data_report.md"
T = TypeVar("T")
log = logging.getLogger("saferlhf")


@dataclass(frozen=True)
class PreparedData:
    """The sources as loaded; bad rows are in each result."""

    preferences: LoadResult[DualPreference]
    demonstrations: LoadResult[Demonstration]
    prompts: LoadResult[PromptRecord]
    held_out: LoadResult[PromptRecord]
    regressions: LoadResult[RegressionPrompt]

    def named(self) -> dict[str, LoadResult[Any]]:
        return {
            "preferences": self.preferences,
            "demonstrations": self.demonstrations,
            "prompts": self.prompts,
            "held_out": self.held_out,
            "regressions": self.regressions,
        }


def run_prepare_data(run_uri: str) -> str:
    """Stage: settings -> URI of the prepared records.

    Raises:
        DataError: a source is missing or holds too many bad rows, or PTX is asked for without demonstrations for it.
        NothingNew: the run has too little that the champion's data lack; nothing is committed.
    """
    with open_stage(run_uri, STAGE, 0) as stage:
        if (done := stage.finished()) is not None:
            return done
        settings = stage.context.settings
        data = load_all(settings.data, settings.gate.regressions)
        write_prepared(data, settings.data, stage.folder, stage.seed)
        demonstrations = read_jsonl(stage.folder / DEMONSTRATIONS_FILE, Demonstration)
        demonstrations_for_ptx(settings.ppo.ptx_coefficient, demonstrations, data.prompts.records)
        warn_of_missing_kinds(data.held_out)
        check_freshness(stage)
        for name, result in data.named().items():
            stage.mlflow.log_dataset(name, result.digest[:36], result.source, len(result.records))
        digest = hashlib.sha256((stage.folder / TRAINING_FILE).read_bytes()).hexdigest()
        stage.context.tracker.tag_pipeline_run(stage.context.mlflow_run_id, {"data_digest": digest})
        return stage.commit(stage.folder, step=0, parents=[])


def load_all(settings: DataSettings, regressions: str = BUILTIN) -> PreparedData:
    """Load and check the sources; `regressions` is that of the gate's regression prompts.

    Raises:
        DataError: a source is missing or holds too many bad rows.
    """

    sources = {**settings.model_dump(), "regressions": regressions}

    def load(name: str, kind: Any) -> Any:
        result = load_records(sources[name], kind, BUILTIN_FOLDER / f"{name}.jsonl")
        # a prompt that is to be right for ever must not get lost by a slip of the pen
        check_bad_share(result, 0.0 if name == "regressions" else settings.max_bad_share)
        return result

    return PreparedData(
        preferences=load("preferences", DualPreference),
        demonstrations=load("demonstrations", Demonstration),
        prompts=load("prompts", PromptRecord),
        held_out=load("held_out", PromptRecord),
        regressions=load("regressions", RegressionPrompt),
    )


def write_prepared(data: PreparedData, settings: DataSettings, folder: Path, seed: int) -> None:
    """Write the limited and split records, the quarantine files, and a table of it all."""
    preferences = _limit(data.preferences.records, settings.max_preferences, seed)
    training, validation = split_by_prompt(preferences, settings.validation_share, seed)
    if not training or not validation:
        raise DataError(
            f"data.preferences={data.preferences.source}: {len(preferences)} pairs do not split into training and "
            f"validation by prompt (data.validation_share={settings.validation_share}): add pairs with other prompts"
        )
    distinct = distinct_prompts(data.held_out)
    held_out = [
        record
        for kind in (*KINDS, "")
        for record in _limit([r for r in distinct if r.kind == kind], settings.max_held_out, seed)
    ]
    write_records(folder / TRAINING_FILE, training)
    write_records(folder / VALIDATION_FILE, validation)
    write_records(folder / DEMONSTRATIONS_FILE, _limit(data.demonstrations.records, settings.max_demonstrations, seed))
    write_records(folder / "prompts.jsonl", data.prompts.records)
    write_records(folder / "held_out.jsonl", held_out)
    write_records(folder / "regressions.jsonl", data.regressions.records)
    for name, result in data.named().items():
        if result.bad:
            write_records(folder / f"quarantine-{name}.jsonl", result.bad)
    (folder / _TABLE_FILE).write_text(data_table(data), encoding="utf-8")


def distinct_prompts(held_out: LoadResult[PromptRecord]) -> list[PromptRecord]:
    """The first of each prompt: one that is asked twice would count as two independent trials."""
    first: dict[str, PromptRecord] = {}
    for record in held_out.records:
        first.setdefault(record.prompt, record)
    distinct = list(first.values())
    if repeated := len(held_out.records) - len(distinct):
        log.warning("data.held_out=%s repeats %d prompts: each is asked once", held_out.source, repeated)
    return distinct


def missing_kinds(prompts: Sequence[PromptRecord]) -> list[str]:
    """The kinds that no prompt has."""
    return [kind for kind in KINDS if all(prompt.kind != kind for prompt in prompts)]


def warn_of_missing_kinds(held_out: LoadResult[PromptRecord]) -> None:
    """The gate needs prompts of every kind; a run that is to train alone may do without."""
    if missing := missing_kinds(held_out.records):
        log.warning(
            "data.held_out=%s has no prompt of kind %s: the gate will refuse the policy, as it cannot be measured",
            *(held_out.source, " or ".join(missing)),
        )


def stored_table(run_uri: str, uri: str) -> str:
    """The table that lies with prepared data."""
    return (open_run(run_uri).store.fetch(uri) / _TABLE_FILE).read_text(encoding="utf-8")


def data_table(data: PreparedData) -> str:
    """Markdown table of the sources."""
    lines = ["| records | source | usable | bad | sha256 |", "|---|---|---:|---:|---|"]
    for name, result in data.named().items():
        source = markdown_code(result.source)
        lines.append(f"| {name} | {source} | {len(result.records)} | {len(result.bad)} | {result.digest[:12]} |")
    return "\n".join(lines) + "\n"


def _limit(records: list[T], limit: int, seed: int) -> list[T]:
    """All records, or `limit` of them drawn by the seed (0: all)."""
    if not limit or len(records) <= limit:
        return records
    return random.Random(seed).sample(records, limit)
