"""A platform file: the pools of one cluster, and which stage runs on which. See platforms/README.md.

Everything that can be wrong in it is refused here, by name, before anything is compiled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from kubernetes.utils import parse_quantity
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from components.foundation.errors import SettingsError
from components.foundation.scheduling import Affinity, NodeSelector, Toleration, explain
from components.foundation.settings import resolve_settings
from components.foundation.untrusted import read_yaml, shown
from pipelines.stages import STAGES, ImageName

_SHIPPED = Path(__file__).parents[1] / "platforms"
_IMAGE = re.compile(r"^[a-z0-9][a-z0-9._:/-]*@sha256:[0-9a-f]{64}$")

ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
NameInLabel = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")]
Cpu = Annotated[str, BeforeValidator(str), Field(pattern=r"^(\d+(\.\d+)?|\d+m)$")]
Memory = Annotated[str, BeforeValidator(str), Field(pattern=r"^\d+(Ki|Mi|Gi|Ti|M|G|T)?$")]
Duration = Annotated[str, BeforeValidator(str), Field(pattern=r"^[1-9][0-9]{0,7}[smh]$")]


_WAIT_FOR_NODE = 24 * 3600


def _seconds(duration: str) -> int:
    return int(duration[:-1]) * {"s": 1, "m": 60, "h": 3600}[duration[-1]]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Range(_Part):
    @model_validator(mode="after")
    def _request_within_limit(self) -> Any:
        request, limit = (parse_quantity(text) for text in (self.request, self.limit))  # type: ignore[attr-defined]
        if not 0 < request <= limit:
            raise ValueError(f"{self!r} must have 0 < request <= limit")
        return self


class CpuRange(_Range):
    """Cores, such as 4 or 500m."""

    request: Cpu
    limit: Cpu


class MemoryRange(_Range):
    """Bytes, such as 64Gi."""

    request: Memory
    limit: Memory


class Accelerator(_Part):
    resource: Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")] = "nvidia.com/gpu"
    count: int = Field(ge=0, description="devices of a step; on several nodes, of each node")


class NodeMarks(_Part):
    """How nodes of a kind are marked on this cluster."""

    node_selector: NodeSelector = {}
    tolerations: list[Toleration] = []


class Pool(NodeMarks):
    """A kind of node, and how much of one a step takes."""

    cpu: CpuRange
    memory: MemoryRange
    accelerator: Accelerator | None = None
    shm: Memory | None = Field(None, description="size of /dev/shm; it counts as memory of the step")
    affinity: Affinity = Affinity()
    capacity: Literal["on_demand", "spot"] = "on_demand"
    queue: NameInLabel | None = Field(None, description="Kueue LocalQueue")
    priority: NameInLabel | None = Field(None, description="Kueue WorkloadPriorityClass: who goes first in the queue")
    nodes: int = Field(1, ge=1, description="more than one: the stage's ranks are a TrainJob over so many nodes")

    @model_validator(mode="after")
    def _shm_within_memory(self) -> Pool:
        if self.shm is not None and parse_quantity(self.shm) >= parse_quantity(self.memory.limit):
            raise ValueError(f"shm={self.shm} must be less than memory.limit={self.memory.limit}, which it is part of")
        return self

    @model_validator(mode="after")
    def _priority_is_of_a_queue(self) -> Pool:
        if self.priority is not None and self.queue is None:
            raise ValueError(f"priority={self.priority} is Kueue's, which orders what waits in a queue: name the queue")
        return self

    @property
    def gpus(self) -> int:
        return self.accelerator.count if self.accelerator else 0


class StagePlace(_Part):
    """Where a stage runs and how long it is given."""

    pool: str
    image: ImageName | None = Field(None, description="empty: the stage's usual image")
    retries: int = Field(2, ge=0, le=8)
    back_off: Duration = Field("1m", description="before the first retry; doubles with each")
    timeout: Duration = Field(description="of one attempt")

    @property
    def timeout_seconds(self) -> int:
        return _seconds(self.timeout)

    @property
    def patience_seconds(self) -> int:
        """From the first attempt's start to the last one's end, if each uses its timeout and waits a day for a node."""
        pauses = _seconds(self.back_off) * ((1 << self.retries) - 1)
        return (self.retries + 1) * (self.timeout_seconds + _WAIT_FOR_NODE) + pauses


class Images(_Part):
    """The three images, pinned: what was tested is what runs."""

    trainer: str
    rollout: str
    service: str

    @field_validator("*")
    @classmethod
    def _pinned(cls, image: str, info: ValidationInfo) -> str:
        name, _, _ = image.partition("@")
        if name.endswith(":latest"):
            raise ValueError(f"{image} has the tag latest, which moves: name the version, or the digest alone")
        if not _IMAGE.fullmatch(image):
            raise ValueError(f"{image} is not pinned: write NAME@sha256:<64 hexadecimal digits>")
        return image


class Secrets(_Part):
    """Existing Secrets; the keys of each are in platforms/README.md. One that is not there is left out."""

    store: ObjectName = "saferlhf-s3"
    tracking: ObjectName = "saferlhf-mlflow"
    judge: ObjectName = "saferlhf-judge"
    webhook: ObjectName | None = None


class Platform(_Part):
    """One cluster, and where on it the stages run."""

    name: ObjectName
    images: Images
    config_map: ObjectName = "saferlhf-platform"
    secrets: Secrets = Secrets()
    service_account: ObjectName = "saferlhf"
    user_id: int = Field(10001, ge=1, description="user and group of every step; never root")
    settings: list[str] = Field([], description="`key=value` settings that the run form shows")
    cpu_training: bool = Field(False, description="training without an accelerator is meant")
    spot: NodeMarks | None = Field(None, description="added to pools of spot capacity")
    form_pool: str | None = Field(None, description="pool whose nodes the run form may change")
    pools: dict[str, Pool]
    stages: dict[str, StagePlace]

    def pool_of(self, stage: str) -> Pool:
        return self.pools[self.stages[stage].pool]

    def image_of(self, stage: str) -> str:
        return str(getattr(self.images, self.stages[stage].image or STAGES[stage].image))

    def node_selector(self, pool: Pool) -> dict[str, str]:
        """The pool's labels, and those of spot nodes where it is spot."""
        return {**pool.node_selector, **self._spot(pool).node_selector}

    def tolerations(self, pool: Pool) -> list[Toleration]:
        return [*pool.tolerations, *self._spot(pool).tolerations]

    @property
    def example_images(self) -> list[str]:
        """The images, by `trainer`, `rollout`, `service`, that are still examples of the shipped files."""
        return [name for name, image in self.images.model_dump().items() if is_example_image(image)]

    def _spot(self, pool: Pool) -> NodeMarks:
        return (self.spot if pool.capacity == "spot" else None) or NodeMarks()

    @model_validator(mode="after")
    def _every_stage_has_a_pool(self) -> Platform:
        pools = ", ".join(self.pools)
        for stage in STAGES:
            if stage not in self.stages:
                raise ValueError(f"stage {stage} has no pool: give it one under stages")
        for name, place in self.stages.items():
            if name not in STAGES:
                raise ValueError(f"unknown stage {name!r}: the stages are {', '.join(STAGES)}")
            if place.pool not in self.pools:
                raise ValueError(f"stage {name} asks for pool {place.pool!r}, which is none of {pools}")
        if self.form_pool is not None and self.form_pool not in self.pools:
            raise ValueError(f"form_pool={self.form_pool!r} is none of {pools}")
        return self

    @model_validator(mode="after")
    def _pools_fit_their_stages(self) -> Platform:
        for name, place in self.stages.items():
            pool, trains = self.pools[place.pool], STAGES[name].trains
            if trains and not pool.gpus and not self.cpu_training:
                raise ValueError(
                    f"stage {name} trains a model, and pool {place.pool!r} has 0 accelerators: "
                    "give it some, or set cpu_training: true"
                )
            if pool.nodes > 1 and not trains:
                raise ValueError(f"stage {name} runs on one node, and pool {place.pool!r} has nodes={pool.nodes}")
        for name, pool in self.pools.items():
            if pool.nodes > 1 and name == self.form_pool:
                raise ValueError(
                    f"pool {name!r} has nodes={pool.nodes}, and a TrainJob takes its nodes from this file: "
                    "it cannot be form_pool"
                )
            if pool.capacity == "spot" and self.spot is None:
                raise ValueError(
                    f"pool {name!r} is spot capacity, and nothing says how spot nodes are marked: add spot"
                )
        return self


def is_example_image(image: str) -> bool:
    """Whether it is one of the shipped platform files', which nobody can pull."""
    return image.startswith("registry.example.com/")


def read_platform(source: str, images: Mapping[str, str] | None = None) -> Platform:
    """Read and check a platform file.

    Args:
        source: path of a file, or the name of a shipped one (local, gke, eks, on_prem).
        images: image name -> reference, instead of those in the file.

    Raises:
        SettingsError: there is no such file, or something in it is refused; the message names the field.
    """
    path = _SHIPPED / f"{source}.yaml" if source in shipped_platforms() else Path(source)
    try:
        if not path.is_file():
            raise SettingsError(f"no platform {shown(source)}: give a file, or one of {', '.join(shipped_platforms())}")
        tree = read_yaml(path)
    except OSError as error:
        raise SettingsError(f"platform file {shown(source)} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(f"platform file {source} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise SettingsError(f"platform file {source} holds no fields: platforms/README.md has an example")
    if images and isinstance(tree.setdefault("images", {}), dict):
        tree["images"].update(images)
    try:
        platform = Platform.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(explain(error, f"platform file {source}")) from None
    try:
        resolve_settings("smol", 0, platform.settings)
    except SettingsError as error:
        raise SettingsError(f"platform file {source}: settings: {error}") from None
    return platform


def shipped_platforms() -> list[str]:
    """Names of the platform files that come with the project."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))
