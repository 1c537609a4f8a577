"""The commands for annotation by people: export a batch, import its labels, look at both."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from components.annotate.human.batch_store import BatchStore
from components.annotate.human.formats import ARGILLA, LABEL_STUDIO
from components.annotate.human.label_import import ImportReport, import_labels
from components.annotate.human.results import LabelResult, result_table, summarize
from components.annotate.human.waiting import waiting_words
from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import SettingsError
from components.foundation.run_context import RunContext, open_run
from components.foundation.setting_sections import StoreSettings
from pipelines.local.services import services_in_environment

annotations_app = typer.Typer(help="Batches for people to label, and their labels.", no_args_is_help=True)

_PROBLEMS_SHOWN = 50


class ToolFormat(StrEnum):
    """Annotation tools that a batch is written for."""

    label_studio = LABEL_STUDIO
    argilla = ARGILLA


Run = Annotated[
    str,
    typer.Argument(help="the run's id in the store (SAFERLHF_STORE_URI, or that of `saferlhf run`), or its s3:// URI"),
]
Round = Annotated[int, typer.Option("--round", help="default: the newest round that has a batch")]
WorkDir = Annotated[Path, typer.Option(help="folder of the servers' data, unless the environment names servers")]


@annotations_app.command()
def export(
    run: Run,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write; it must not exist yet")],
    round_number: Round = 0,
    format_: Annotated[ToolFormat, typer.Option("--format")] = ToolFormat.label_studio,
    workdir: WorkDir = Path("runs"),
) -> None:
    """Write what annotators need: tasks, the tool's configuration, guidelines. The key stays in the store."""
    if output.exists():
        raise SettingsError(f"--output {output} exists: name a new folder")
    with open_batch(run, round_number, workdir) as (_, batch):
        shutil.copytree(batch.folder() / format_.value, output, copy_function=shutil.copyfile)
        typer.echo(f"wrote {len(batch.items())} items of round {batch.round} to {output}")


@annotations_app.command(name="import")
def import_(
    run: Run,
    files: Annotated[list[Path], typer.Argument(help="Label Studio's JSON export, Argilla's JSON, or flat JSONL")],
    round_number: Round = 0,
    workdir: WorkDir = Path("runs"),
) -> None:
    """Check labels and store them, all or none. Exit status 1 where a row is refused; then nothing is stored."""
    with open_batch(run, round_number, workdir) as (context, batch):
        report = import_labels(batch, files)
        if report.problems:
            for line in problem_lines(report):
                typer.echo(line, err=True)
            raise typer.Exit(1)
        result = figures(context, batch)
        if not batch.has_preferences():
            batch.write_result(result)
        typer.echo(f"{len(report.new)} new labels, {report.known} known already\n")
        typer.echo(standing(context, batch, result))


@annotations_app.command()
def status(run: Run, round_number: Round = 0, workdir: WorkDir = Path("runs")) -> None:
    """What a round's batch has and lacks, its annotators, and how far they agree."""
    with open_batch(run, round_number, workdir) as (context, batch):
        typer.echo(standing(context, batch, figures(context, batch)))


@contextmanager
def open_batch(run: str, round_number: int, workdir: Path) -> Iterator[tuple[RunContext, BatchStore]]:
    """A run and the batch of one of its rounds (0: the newest that has one).

    Raises:
        SettingsError: there is no such work folder, run or batch.
    """
    with services_in_environment(workdir):
        store_uri = os.environ.get("SAFERLHF_STORE_URI", "").rstrip("/") or StoreSettings().uri
        uri = run if run.startswith("s3://") else f"{store_uri}/runs/{run}"
        if not CheckpointStore(store_uri).has_text(f"{uri}/run.json"):
            raise SettingsError(f"there is no run {uri}: give its id or s3:// URI, and the --workdir that it has")
        context = open_run(uri)
        rounds = [round_number] if round_number else range(context.settings.rounds, 0, -1)
        batches = [batch for number in rounds if (batch := BatchStore(context, number)).batch_uri() is not None]
        if not batches:
            where = f"round {round_number}" if round_number else "any round"
            raise SettingsError(
                f"run {context.run_id} has no batch for people in {where}: is annotate.annotator=human?"
            )
        yield context, batches[0]


def figures(context: RunContext, batch: BatchStore) -> LabelResult:
    """All figures of the labels so far."""
    exclude = context.settings.annotate.exclude_careless
    return summarize(batch.batch_uri() or "", batch.items(), batch.labels(), exclude)


def standing(context: RunContext, batch: BatchStore, result: LabelResult) -> str:
    """The table of figures, and what comes next."""
    if batch.has_preferences():
        last = f"round {batch.round} has taken these labels over"
    elif result.labels_missing:
        last = waiting_words(context, result)
    else:
        last = (
            f"all labels are there: go on with --resume {context.run_id}, or on a cluster with Retry or the schedule's "
            "next run"
        )
    return f"{result_table(result)}\n{last}"


def problem_lines(report: ImportReport) -> list[str]:
    """One line for each refused row, and what it means."""
    shown = report.problems[:_PROBLEMS_SHOWN]
    lines = [f"{p.file} row {p.row}: {p.reason}" if p.row else f"{p.file}: {p.reason}" for p in shown]
    more = len(report.problems) - len(shown)
    total = f"refused for {len(report.problems)} reasons" + (f", {more} of them not shown" if more else "")
    return [*lines, f"saferlhf: {total}: nothing was imported; mend the files and import them again"]
