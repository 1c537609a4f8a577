"""`saferlhf upload`, `submit` and `schedule`: what is asked of a Kubeflow cluster."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.options import INTERRUPTED, FromRound, FromRun, Overrides, Profile, Seed, with_start

if TYPE_CHECKING:
    from pipelines.kubeflow.client import KubeflowClient
    from pipelines.kubeflow.submit import SubmittedRun

schedule_app = typer.Typer(help="Runs that start by themselves on Kubeflow.", no_args_is_help=True)

POLL_SECONDS = 10

Host = Annotated[str, typer.Option(help="pipeline server; else KFP_HOST, KF_PIPELINES_ENDPOINT, the cluster's own")]
Namespace = Annotated[str, typer.Option(help="on a Kubeflow with several users; else KFP_NAMESPACE")]
TokenFile = Annotated[
    str, typer.Option(help="file with a token; else KFP_TOKEN_FILE, KF_PIPELINES_TOKEN, the pod's own for KFP")
]
Name = Annotated[str, typer.Argument(help="the schedule's name")]


def upload(
    file: Annotated[Path, typer.Argument(help="the pipeline's YAML, from `saferlhf compile`")],
    version: Annotated[str, typer.Option(help="start of the version's name")] = "saferlhf",
    host: Host = "",
    namespace: Namespace = "",
    token_file: TokenFile = "",
) -> None:
    """Upload a compiled pipeline to Kubeflow as a new version, unless it is there."""
    from pipelines.kubeflow.client import PIPELINE
    from pipelines.kubeflow.versions import upload_pipeline

    found = upload_pipeline(_connect(host, namespace, token_file), file, version)
    typer.echo(f"{PIPELINE}: version {found.name} {'uploaded' if found.new else 'is there already'}")


def submit(
    file: Annotated[Path | None, typer.Argument(help="the pipeline's YAML, from `saferlhf compile`")] = None,
    version: Annotated[str, typer.Option(help="instead: an uploaded version by its name, or latest")] = "",
    platform: Annotated[str, typer.Option(help="instead: a platform file of yours, compiled now")] = "",
    rounds: Annotated[int, typer.Option(min=0, max=20, help="0: as the pipeline or the profile has them")] = 0,
    profile: Profile = "smol",
    seed: Seed = 0,
    set_: Overrides = None,
    experiment: Annotated[str, typer.Option(help="Kubeflow's experiment; made if it is not there")] = "safe-rlhf",
    service_account: Annotated[str, typer.Option(help="of the steps; else the platform's, else Kubeflow's")] = "",
    resume: Annotated[str, typer.Option(help="id of a run that stopped: its finished stages are not run again")] = "",
    from_run: FromRun = "",
    from_round: FromRound = 0,
    wait: Annotated[bool, typer.Option("--wait", help="watch it to its end; status 0 only if it succeeded")] = False,
    host: Host = "",
    namespace: Namespace = "",
    token_file: TokenFile = "",
) -> None:
    """Start a run on Kubeflow. Settings are checked before anything is sent. Ctrl-C ends the watching, not the run."""
    from pipelines.kubeflow.client import access_from
    from pipelines.kubeflow.compiled_pipeline import RunChoice
    from pipelines.kubeflow.submit import Submission
    from pipelines.kubeflow.submit import submit as start

    choice = RunChoice(profile, seed, with_start(set_, from_run, from_round))
    wish = Submission(choice, file, version, platform, rounds, experiment, service_account, resume)
    run = start(wish, access_from(os.environ, host, namespace, token_file))
    typer.echo(f"run {run.run_id}: {run.name}\n{run.link}")
    if wait:
        _watch(run)


@schedule_app.command(name="apply")
def apply_(
    file: Annotated[Path, typer.Option("--file", "-f", help="YAML with schedules")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the differences, change nothing")] = False,
    host: Host = "",
    namespace: Namespace = "",
    token_file: TokenFile = "",
) -> None:
    """Make the schedules in Kubeflow what the file says. One that is so already is left alone."""
    from pipelines.kubeflow.schedule_file import read_schedules
    from pipelines.kubeflow.schedules import apply_schedules

    schedules = read_schedules(file)
    for line in apply_schedules(_connect(host, namespace, token_file), schedules, dry_run):
        typer.echo(line)


@schedule_app.command(name="list")
def list_(host: Host = "", namespace: Namespace = "", token_file: TokenFile = "") -> None:
    """List the schedules that saferlhf has made."""
    from pipelines.kubeflow.schedules import list_schedules

    typer.echo("\n".join(list_schedules(_connect(host, namespace, token_file))))


@schedule_app.command()
def pause(name: Name, host: Host = "", namespace: Namespace = "", token_file: TokenFile = "") -> None:
    """Start no more runs, until it is resumed; a run that goes on, goes on."""
    from pipelines.kubeflow.schedules import turn

    typer.echo(turn(_connect(host, namespace, token_file), name, on=False))


@schedule_app.command()
def resume(name: Name, host: Host = "", namespace: Namespace = "", token_file: TokenFile = "") -> None:
    """Start runs again; those that were missed are not caught up."""
    from pipelines.kubeflow.schedules import turn

    typer.echo(turn(_connect(host, namespace, token_file), name, on=True))


@schedule_app.command()
def delete(
    name: Name,
    ignore_missing: Annotated[bool, typer.Option("--ignore-missing", help="it is well if it is not there")] = False,
    host: Host = "",
    namespace: Namespace = "",
    token_file: TokenFile = "",
) -> None:
    """Delete a schedule; its past runs stay."""
    from pipelines.kubeflow.schedules import delete_schedule

    typer.echo(delete_schedule(_connect(host, namespace, token_file), name, ignore_missing))


def _connect(host: str, namespace: str, token_file: str) -> KubeflowClient:
    from pipelines.kubeflow.client import access_from, connect

    return connect(access_from(os.environ, host, namespace, token_file))


def _watch(run: SubmittedRun) -> None:
    from pipelines.kubeflow.watch import SUCCEEDED, watch

    def say(line: str) -> None:
        typer.echo(f"{time.strftime('%H:%M:%S')} {line}")

    try:
        state = watch(run.client, run.run_id, say, lambda: time.sleep(POLL_SECONDS))
    except KeyboardInterrupt:
        typer.echo(f"saferlhf: stopped watching; run {run.run_id} goes on: {run.link}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if state != SUCCEEDED:
        typer.echo(f"saferlhf: run {run.run_id} ended as {state}: the logs of its steps are at {run.link}", err=True)
        raise typer.Exit(1)
