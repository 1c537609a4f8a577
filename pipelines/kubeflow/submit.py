"""`saferlhf submit`: one run on a cluster. Everything that can be refused here is refused before a call is made."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from components.foundation.checkpoint_store import git_sha
from components.foundation.errors import ClusterUnavailableError, SettingsError
from components.foundation.setting_sections import BUILTIN, DataSettings
from components.foundation.settings import Settings, resolve_settings
from components.prepare_data.prepare_data import BUILTIN_FOLDER
from components.prepare_data.start_run import check_run_id
from pipelines.cluster.compiling import compile_to
from pipelines.cluster.platform_file import read_platform
from pipelines.kubeflow.client import EXPERIMENT, Access, KubeflowClient, connect
from pipelines.kubeflow.compiled_pipeline import (
    DATA_SOURCES,
    CompiledPipeline,
    RunChoice,
    read_compiled,
    refuse_files_of_this_folder,
    run_parameters,
)
from pipelines.kubeflow.versions import find_version


@dataclass(frozen=True)
class Submission:
    """The command's arguments. One of `file`, `version` and `platform` says what to run.

    Attributes:
        rounds: 0: as the pipeline, or the settings, have them.
        resume: id of a run that stopped, whose finished stages are not run again; "" for a new one.
    """

    choice: RunChoice
    file: Path | None = None
    version: str = ""
    platform: str = ""
    rounds: int = 0
    experiment: str = EXPERIMENT
    service_account: str = ""
    resume: str = ""


@dataclass(frozen=True)
class SubmittedRun:
    """A run that KFP has taken."""

    client: KubeflowClient
    run_id: str
    name: str

    @property
    def link(self) -> str:
        return self.client.run_link(self.run_id)


def submit(wish: Submission, access: Access) -> SubmittedRun:
    """Start a run; returns when KFP has taken it.

    Raises:
        SettingsError: an argument or a setting is refused; nothing was started.
        ClusterError: the server cannot be reached or refuses a call.
    """
    if sum((wish.file is not None, bool(wish.version), bool(wish.platform))) != 1:
        raise SettingsError("say what to run: a compiled YAML, or --version of an uploaded one, or --platform")
    if wish.resume:
        check_run_id(wish.resume)
    if wish.rounds:
        wish = replace(wish, choice=replace(wish.choice, overrides=(*wish.choice.overrides, f"rounds={wish.rounds}")))
    # the pipeline's rounds are not known yet: so many as there can be
    settings = resolve_settings(wish.choice.profile, wish.choice.seed, ["rounds=20", *wish.choice.overrides])
    refuse_files_of_this_folder(settings)
    with tempfile.TemporaryDirectory() as folder:
        wish = _compiled_for_platform(wish, Path(folder) / "pipeline.yaml")
        local = read_compiled(wish.file) if wish.file else None
        if local is not None:
            run_parameters(local, wish.choice)
        return _start(connect(access), wish, local)


def run_name(settings: Settings, environment: dict[str, str], now: datetime) -> str:
    """For instance smol-3-rounds-data-1f0c88b2-git-5f2c9a1e-20261124-152017; the time is in UTC."""
    sha = git_sha(environment)[:8] or "unknown"
    data = data_digest(settings.data)[:8]
    rounds = f"{settings.rounds}-round{'' if settings.rounds == 1 else 's'}"
    return f"{settings.profile}-{rounds}-data-{data}-git-{sha}-{now.astimezone(UTC):%Y%m%d-%H%M%S}"


def data_digest(data: DataSettings) -> str:
    """SHA-256 over the four sources: a file's bytes where they can be read here, else its name."""
    parts = {}
    for name in DATA_SOURCES:
        source = getattr(data, name)
        file = BUILTIN_FOLDER / f"{name}.jsonl" if source == BUILTIN else Path(source)
        parts[name] = source
        with contextlib.suppress(OSError):
            parts[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _compiled_for_platform(wish: Submission, output: Path) -> Submission:
    """With --platform, the same wish of a file that was compiled for it now."""
    if not wish.platform:
        return wish
    platform = read_platform(wish.platform)
    if platform.example_images:
        raise SettingsError(
            f"platform {wish.platform} has example images: put yours in a copy of its file, or "
            "`saferlhf compile --platform ... --image-trainer ...` and submit that YAML"
        )
    choice = wish.choice
    settings = resolve_settings(choice.profile, choice.seed, [*platform.settings, *choice.overrides])
    compile_to(output, settings.rounds, platform)
    return replace(wish, file=output, service_account=wish.service_account or platform.service_account)


def _start(client: KubeflowClient, wish: Submission, local: CompiledPipeline | None) -> SubmittedRun:
    version, pipeline = (None, local) if local is not None else find_version(client, wish.version)
    settings, parameters = run_parameters(pipeline, wish.choice)
    if wish.resume:
        parameters["run_id"] = wish.resume
    name = run_name(settings, dict(os.environ), datetime.now(UTC))
    experiment = client.experiment_id(wish.experiment)
    try:
        with client.explained(f"start the run {name}"), contextlib.redirect_stdout(None):
            run = client.run_pipeline(
                experiment,
                name,
                pipeline_package_path=str(wish.file) if version is None else None,
                params=parameters,
                pipeline_id=version.pipeline_id if version else None,
                version_id=version.version_id if version else None,
                service_account=wish.service_account or None,
            )
    except ClusterUnavailableError as error:
        raise ClusterUnavailableError(f"{error}; look for that name before you try again: it may run") from None
    return SubmittedRun(client, str(run.run_id), name)
