"""A compiled pipeline as a run needs to know it: its rounds, the settings of its platform, and what its form takes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.foundation.errors import SettingsError
from components.foundation.setting_sections import BUILTIN
from components.foundation.settings import Settings, resolve_settings
from components.foundation.untrusted import parse_yaml
from pipelines.cluster.platform_file import is_example_image

DATA_SOURCES = ("preferences", "demonstrations", "prompts", "held_out")
"""Settings of `data` that name records."""


@dataclass(frozen=True)
class CompiledPipeline:
    """What `saferlhf compile` has put into the YAML.

    Attributes:
        source: the file, or the version on the server; for messages.
        rounds: that a run of it has.
        settings: `key=value`, of the platform that it was compiled for.
        images: that its steps run in.
    """

    source: str
    rounds: int
    settings: tuple[str, ...]
    images: tuple[str, ...]


@dataclass(frozen=True)
class RunChoice:
    """What a user chooses for a run; `overrides` are `key=value`."""

    profile: str = "smol"
    seed: int = 0
    overrides: tuple[str, ...] = ()


def read_compiled(file: Path) -> CompiledPipeline:
    """Read the YAML that `saferlhf compile` wrote.

    Raises:
        SettingsError: the file cannot be read, or is something else.
    """
    try:
        first = parse_yaml(read_bytes(file).decode("utf-8"), more_may_follow=True)
    except ValueError:
        first = None
    return pipeline_of(first, str(file))


def pipeline_of(spec: Any, source: str) -> CompiledPipeline:
    """The same of a PipelineSpec as a tree; KFP's API puts it beside a platform_spec where there is one.

    Raises:
        SettingsError: it is no pipeline of ours.
    """
    try:
        spec = spec.get("pipeline_spec", spec)
        parameters = spec["root"]["inputDefinitions"]["parameters"]
        start = spec["root"]["dag"]["tasks"]["start-run"]["inputs"]["parameters"]
        rounds = int(start["rounds"]["runtimeValue"]["constant"])
        settings = tuple(json.loads(parameters["run_set"]["defaultValue"]))
        for name in ("run_id", "run_profile", "run_seed"):
            parameters[name]["parameterType"]
        executors = spec["deploymentSpec"]["executors"].values()
        images = tuple(sorted({str(executor["container"]["image"]) for executor in executors}))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise SettingsError(f"{source} is no compiled pipeline of ours: make one with `saferlhf compile`") from None
    return CompiledPipeline(source, rounds, settings, images)


def run_parameters(pipeline: CompiledPipeline, choice: RunChoice) -> tuple[Settings, dict[str, str | int]]:
    """(the settings as the run will resolve them, values of the pipeline's parameters).

    Raises:
        SettingsError: a setting is refused, names what only this machine has, or asks for another number of rounds
            than the pipeline has; or its images are the examples of the shipped platform files.
    """
    refuse_example_images(pipeline)
    overrides = [*pipeline.settings, *choice.overrides]
    settings = resolve_settings(choice.profile, choice.seed, [f"rounds={pipeline.rounds}", *overrides])
    refuse_files_of_this_folder(settings)
    if settings.rounds != pipeline.rounds:
        raise SettingsError(
            f"rounds={settings.rounds} is asked of {pipeline.source}, which was compiled with {pipeline.rounds}: "
            "compile it anew"
        )
    return settings, {"run_profile": choice.profile, "run_seed": choice.seed, "run_set": json.dumps(overrides)}


def refuse_example_images(pipeline: CompiledPipeline) -> None:
    """Raises: SettingsError where its images are the examples of the shipped platform files, which nobody can pull."""
    for image in pipeline.images:
        if is_example_image(image):
            raise SettingsError(
                f"{pipeline.source} was compiled with the example image {image}: compile it with yours, with "
                "--image-trainer, --image-rollout and --image-service"
            )


def refuse_files_of_this_folder(settings: Settings) -> None:
    """Raises: SettingsError where a source or the base model lies beside us: the run's pods would look in vain."""
    sources = {f"data.{name}": getattr(settings.data, name) for name in DATA_SOURCES}
    for name, source in {**sources, "gate.regressions": settings.gate.regressions}.items():
        if source != BUILTIN and not source.startswith(("/", "s3://", "datasets:")):
            raise SettingsError(
                f"{name}={source} is a file of this machine, and the run's pods do not see it: put it into the "
                "store, for instance with `aws s3 cp`, and give its s3:// address (or the path of a volume that the "
                "pods have)"
            )
    model = settings.base_model
    if model.startswith(".") or (not model.startswith("/") and Path(model).is_dir()):
        raise SettingsError(
            f"base_model={model} is a folder of this machine, and the run's pods do not see it: put it into the store "
            f"with `saferlhf models push {model} s3://...` and give that address"
        )


def read_bytes(file: Path) -> bytes:
    """Raises: SettingsError if the file cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise SettingsError(f"{file} cannot be read ({error.strerror}): make it with `saferlhf compile`") from error
