"""A file of schedules: what should run when. It is checked whole before anything is asked of the server."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from components.foundation.errors import SettingsError
from components.foundation.scheduling import explain
from components.foundation.settings import resolve_settings
from components.foundation.untrusted import read_yaml
from pipelines.kubeflow.client import EXPERIMENT
from pipelines.kubeflow.compiled_pipeline import RunChoice, refuse_files_of_this_machine
from pipelines.kubeflow.cron import check_cron
from pipelines.kubeflow.versions import LATEST


def _checked_cron(cron: str) -> str:
    try:
        check_cron(cron)
    except SettingsError as error:
        raise ValueError(str(error)) from None
    return " ".join(cron.split())


class Schedule(BaseModel):
    """When to run which version of the pipeline with what. Times without a zone are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    cron: Annotated[str, AfterValidator(_checked_cron)]
    start: AwareDatetime | None = None
    end: AwareDatetime | None = None
    profile: str = "smol"
    seed: int = Field(0, ge=0, strict=True)
    settings: list[str] = Field([], description="`key=value`, as of --set")
    version: str = Field(LATEST, min_length=1, description="a name, latest, or the compiled file that was uploaded")
    experiment: str = Field(EXPERIMENT, min_length=1)
    service_account: str = Field("", description="of the steps; empty: the server's default")
    enabled: bool | None = Field(None, strict=True, description="left out: a new one runs, an old one stays as it is")

    @model_validator(mode="after")
    def _ends_after_its_start(self) -> Schedule:
        if self.start is not None and self.end is not None and self.end <= self.start:
            raise ValueError(f"end {self.end.isoformat()} is not after start {self.start.isoformat()}")
        return self

    @property
    def choice(self) -> RunChoice:
        return RunChoice(self.profile, self.seed, tuple(self.settings))


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    schedules: list[Schedule] = Field(min_length=1)


def read_schedules(file: Path) -> list[Schedule]:
    """Read and check a file of schedules; a compiled pipeline that it names is looked for beside it.

    Raises:
        SettingsError: something in it is refused; the message names the schedule's place and the field.
    """
    try:
        tree = read_yaml(file)
    except OSError as error:
        raise SettingsError(f"schedule file {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(f"schedule file {file} is not YAML: {error}") from error
    try:
        schedules = _File.model_validate(tree).schedules
    except ValidationError as error:
        raise SettingsError(explain(error, f"schedule file {file}")) from None
    (name, times), *_ = Counter(schedule.name for schedule in schedules).most_common(1)
    if times > 1:
        raise SettingsError(f"schedule file {file} has {times} schedules with the name {name!r}")
    for schedule in schedules:
        try:
            # how many rounds there are, its version says: that a run starts at one of them is checked with it
            overrides = ["rounds=20", *schedule.settings]
            refuse_files_of_this_machine(resolve_settings(schedule.profile, schedule.seed, overrides))
        except SettingsError as error:
            raise SettingsError(f"schedule file {file}: schedule {schedule.name}: {error}") from None
    return [_beside(schedule, file) for schedule in schedules]


def _beside(schedule: Schedule, file: Path) -> Schedule:
    if not schedule.version.endswith((".yaml", ".yml")):
        return schedule
    return schedule.model_copy(update={"version": str(file.parent / schedule.version)})
