"""The `saferlhf` command."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import sys
import textwrap
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from components.foundation.errors import LabelsAwaited, NothingNew, SaferlhfError, SettingsError
from components.foundation.exit_codes import NOTHING_NEW_EXIT_CODE, WAITING_EXIT_CODE
from components.foundation.settings import SettingDescription, describe_settings, resolve_settings
from components.foundation.untrusted import shown
from pipelines import registry, serving
from pipelines.annotations import annotations_app
from pipelines.kubeflow import commands as kubeflow
from pipelines.options import INTERRUPTED, FromRound, FromRun, Overrides, Profile, Seed, with_start
from pipelines.own_command import own_command
from pipelines.validate import RecordKind, validate_file

app = typer.Typer(
    help="Safe RLHF as a Kubeflow pipeline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # they may hold keys
)
data_app = typer.Typer(help="Look at data files.", no_args_is_help=True)
models_app = typer.Typer(help="Base models.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(models_app, name="models")
app.add_typer(registry.registry_app, name="registry")
app.add_typer(annotations_app, name="annotations")
app.add_typer(kubeflow.schedule_app, name="schedule")
app.add_typer(serving.serve_app, name="serve")

_INDENT = 4 * " "

WorkDir = Annotated[Path, typer.Option(help="folder of the servers' data and of the run's results")]


@app.command()
def run(
    profile: Profile = "smol",
    workdir: WorkDir = Path("runs"),
    seed: Seed = 0,
    set_: Overrides = None,
    resume: Annotated[str, typer.Option(help="id of a run that stopped: its finished stages are not run again")] = "",
    from_run: FromRun = "",
    from_round: FromRound = 0,
) -> None:
    """Run the whole pipeline on this machine.

    It starts S3 and MLflow in the work folder (or uses those that AWS_ENDPOINT_URL and MLFLOW_TRACKING_URI name) and
    runs prepare_data, sft, the rounds, the gate and the report. The exit status is 0 only if every stage did its work,
    75 where people have to label first, and 3 where the data hold too little that is new (data.min_new_pairs).
    """
    overrides = with_start(set_, from_run, from_round)
    settings = resolve_settings(profile, seed, overrides)
    from pipelines.local.run import LocalRun, run_here

    run_id = resume or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    options = [word for override in overrides for word in ("--set", override)]
    place = ("--profile", profile, "--workdir", str(workdir), "--seed", str(seed))
    go_on = own_command("run", *place, *options, "--resume", run_id)
    try:
        run_here(LocalRun(settings, overrides, workdir, run_id, resumed=bool(resume), go_on=go_on))
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # a terminal that was closed
            typer.echo(f"saferlhf: interrupted; to go on: {go_on}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except LabelsAwaited as waiting:
        typer.echo(f"{waiting}; all with --workdir {workdir}; to go on here: {go_on}")
        raise typer.Exit(WAITING_EXIT_CODE) from None
    except NothingNew as end:
        typer.echo(str(end))
        raise typer.Exit(NOTHING_NEW_EXIT_CODE) from None


@app.command()
def settings(
    prefix: Annotated[str, typer.Argument(help="print only what begins with this, for instance ppo.")] = "",
    profile: Profile = "smol",
    seed: Seed = 0,
    set_: Overrides = None,
    describe: Annotated[
        bool, typer.Option("--describe", help="say below each what it is for, and its choices")
    ] = False,
) -> None:
    """Print every setting with its resolved value."""
    values = resolve_settings(profile, seed, set_ or ()).flat()
    wanted = [key for key in values if key.startswith(prefix)]
    if not wanted:
        raise SettingsError(f"no setting begins with {shown(prefix)}: `saferlhf settings` lists all of them")
    descriptions = describe_settings() if describe else {}
    for key in wanted:
        typer.echo(f"{key}={values[key]}")
        if describe:
            typer.echo(_indented(descriptions[key]))


def _indented(described: SettingDescription) -> str:
    """What is said below a setting, on a terminal of 100 columns."""
    choices = [f"one of: {', '.join(described.choices)}"] if described.choices else []
    return "\n".join(
        textwrap.fill(line, 100, initial_indent=_INDENT, subsequent_indent=_INDENT)
        for line in (described.text, *choices)
    )


@app.command(name="compile")
def compile_(
    output: Annotated[Path, typer.Option("--output", "-o", help="YAML file to write")],
    platform: Annotated[str, typer.Option(help="gke, eks, on_prem, local, or a platform file of your own")],
    rounds: Annotated[int, typer.Option(min=1, max=20)] = 3,
    image_trainer: Annotated[str, typer.Option(help="NAME@sha256:DIGEST, instead of the platform file's")] = "",
    image_rollout: Annotated[str, typer.Option(help="the same")] = "",
    image_service: Annotated[str, typer.Option(help="the same")] = "",
    table: Annotated[bool, typer.Option("--table", help="print what each step asks of the cluster")] = False,
    example_images: Annotated[
        bool, typer.Option("--example-images", help="keep the shipped files' images, which nobody can pull: to look at")
    ] = False,
) -> None:
    """Compile the pipeline to the YAML that Kubeflow Pipelines runs, placed on a cluster's pools by --platform."""
    if output.suffix not in (".yaml", ".yml"):
        raise SettingsError(f"--output {output} must end with .yaml")
    images = {"trainer": image_trainer, "rollout": image_rollout, "service": image_service}
    from pipelines.cluster import executors
    from pipelines.cluster.compiling import compile_to
    from pipelines.cluster.platform_file import read_platform

    cluster = read_platform(platform, {name: image for name, image in images.items() if image})
    if cluster.example_images and not example_images:
        raise SettingsError(
            f"platform {platform} has only examples of the images {', '.join(cluster.example_images)}: give yours with "
            f"{', '.join(f'--image-{name}' for name in cluster.example_images)}, as `make -s images-push` prints them, "
            "or in a copy of its file"
        )
    compile_to(output, rounds, cluster)
    if table:
        typer.echo(executors.table(executors.read_steps(output.read_text(encoding="utf-8"))))
    typer.echo(f"wrote {output}")
    typer.echo(f"start its runs with the service account {cluster.service_account}")


@app.command()
def doctor(
    checks: Annotated[
        list[str] | None,
        typer.Argument(help="s3, mlflow, kfp, cluster, shm, disk, cache, gpus; none: what is set up here"),
    ] = None,
    workdir: WorkDir = Path("runs"),
    store: Annotated[str, typer.Option(help="s3://bucket/prefix: examine this store alone, and all it must do")] = "",
    json_: Annotated[bool, typer.Option("--json", help="print the findings for a program")] = False,
) -> None:
    """Check what a run needs, with the addresses and keys of the environment; status 1 where something is broken."""
    from pipelines.doctor import examination

    if store:
        if checks:
            raise SettingsError(f"--store examines the store alone: leave out {' '.join(checks)}")
        _examine_store(store, json_)
        return
    findings = examination.examine(checks or (), examination.Patient(os.environ, workdir))
    if json_:
        typer.echo(examination.as_json(findings))
    else:
        typer.echo("\n".join(examination.lines(findings)) if checks else examination.table(findings))
    if not examination.well(findings):
        raise typer.Exit(1)


def _examine_store(uri: str, as_json: bool) -> None:
    from components.foundation.store_conformance import conforms, examine
    from pipelines.doctor.store_report import store_json, store_table

    outcomes = examine(uri, os.environ)
    typer.echo(store_json(outcomes) if as_json else store_table(uri, outcomes))
    if not conforms(outcomes):
        raise typer.Exit(1)


@app.command()
def up(workdir: WorkDir = Path("runs")) -> None:
    """Start S3 and MLflow, print their addresses, and leave them running, for browsing."""
    from pipelines.local import services

    endpoints, started = services.up(workdir)
    typer.echo(f"{'started' if started else 'running already'}: MLflow {endpoints.tracking_uri}, S3 {endpoints.s3_url}")


@app.command()
def down(workdir: WorkDir = Path("runs")) -> None:
    """Stop what `up` started; the data stay."""
    from pipelines.local import services

    typer.echo("stopped" if services.down(workdir) else "nothing was running")


@app.command()
def env(workdir: WorkDir = Path("runs")) -> None:
    """Print what a shell needs to reach the servers of a work folder, keys too: eval "$(saferlhf env)".

    It starts them if they are not running, and they stay until `saferlhf down`. The folder must be that of a run.
    """
    from pipelines.local import services

    services.check_used(workdir)
    endpoints, started = services.up(workdir)
    if started:
        stop = own_command("down", "--workdir", str(workdir))
        typer.echo(f"saferlhf: started MLflow and S3, which stay; to stop them: {stop}", err=True)
    for name, value in {**endpoints.environment, "SAFERLHF_CACHE": str(workdir.resolve() / "cache")}.items():
        typer.echo(f"export {name}={shlex.quote(value)}")


@data_app.command()
def validate(
    file: str,
    kind: Annotated[
        RecordKind | None, typer.Option("--as", help="what the rows are for; told from their columns if left out")
    ] = None,
    max_bad_share: Annotated[float, typer.Option(min=0, max=1, help="of the rows; more is exit status 1")] = 0.05,
) -> None:
    """Check a data file: which rows can be used, why the others cannot, and how long the texts are."""
    table, good = validate_file(file, max_bad_share, kind)
    typer.echo(table)
    if not good:
        raise typer.Exit(1)


@models_app.command()
def pull() -> None:
    """Fetch the default base model, check its digest, convert it."""
    from components.foundation.base_model import pull_smol

    typer.echo(str(pull_smol()))


@models_app.command()
def push(folder: Path, uri: str) -> None:
    """Put a base model into the store, for --set base_model=s3://...: the steps of a cluster see no folder of yours."""
    from components.foundation.base_model import push_model

    typer.echo(push_model(folder, uri))


for command in (kubeflow.upload, kubeflow.submit, registry.promote, registry.rollback, registry.lineage):
    app.command()(command)


_NO_SUCH_PATH = (FileNotFoundError, NotADirectoryError, PermissionError, FileExistsError, IsADirectoryError)


def main() -> NoReturn:
    """Entry point: an error that we explain, or a path that cannot be used, is one sentence and status 1."""
    try:
        app(standalone_mode=True)
    except SaferlhfError as error:
        _end_with(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        advice = ": name a path whose folder is there and can be written" if isinstance(error, _NO_SUCH_PATH) else ""
        _end_with(f"{error.filename} cannot be used ({error.strerror}){advice}")
    sys.exit(0)


def _end_with(sentence: str) -> NoReturn:
    typer.echo(f"saferlhf: {sentence}", err=True)
    sys.exit(1)
