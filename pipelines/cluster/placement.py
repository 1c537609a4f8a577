"""Puts the pipeline's tasks where a platform file says, with kfp-kubernetes.

KFP takes such settings on the steps themselves, never on a nested pipeline, so `safe_rlhf.py` and `alignment_round.py`
hand their tasks over where they make them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from kfp import kubernetes

from pipelines.cluster.platform_file import Platform, Pool
from pipelines.stages import STAGES

Keys = tuple[str, ...]

_CONFIG: Keys = ("SAFERLHF_STORE_URI", "MLFLOW_TRACKING_URI", "AWS_DEFAULT_REGION")
_OPTIONAL_CONFIG: Keys = (
    "AWS_ENDPOINT_URL",
    "SAFERLHF_LOG_FORMAT",
    "SAFERLHF_METRICS_ADDRESS",
    "SAFERLHF_METRICS_PORT",
)
_STORE_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_TRACKING_KEYS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
_JUDGE_KEYS = ("SAFERLHF_JUDGE_KEY",)
_WEBHOOK_KEYS = ("SAFERLHF_WEBHOOK_URL",)
_QUEUE_LABEL, _PRIORITY_LABEL = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"


@dataclass(frozen=True)
class PoolChoice:
    """What the run form gives for the one pool that it may choose: two pipeline parameters, or nothing.

    Attributes:
        node_selector: object of texts.
        tolerations: list of tolerations.
    """

    node_selector: Any
    tolerations: Any


class Placement:
    """Settings that tasks get; without a platform, only what holds everywhere."""

    def __init__(self, platform: Platform | None) -> None:
        self._platform = platform
        self._form_pool = platform.pools[platform.form_pool] if platform and platform.form_pool else None

    @property
    def has_form_pool(self) -> bool:
        """Whether the run form may change the nodes of a pool."""
        return self._form_pool is not None

    @property
    def notifies(self) -> bool:
        """Whether a webhook is told how a run ended."""
        return self._platform is not None and self._platform.secrets.webhook is not None

    def form_defaults(self) -> PoolChoice:
        """What the form shows at first: what the platform file says of that pool."""
        if self._platform is None or self._form_pool is None:
            return PoolChoice({}, [])
        tolerations = [toleration.manifest() for toleration in self._platform.tolerations(self._form_pool)]
        return PoolChoice(self._platform.node_selector(self._form_pool), tolerations)

    def place(self, choice: PoolChoice, *tasks: Any) -> None:
        """Give each task its name on the screen and, on a platform, its place there. Nothing is ever cached."""
        for task in tasks:
            stage = task.component_spec.name.replace("-", "_")
            task.set_caching_options(False)
            task.set_display_name(STAGES[stage].title)
            if self._platform is not None:
                _identity(task, stage, self._platform)
                _patience(task, stage, self._platform)
                _environment(task, stage, self._platform)
                self._on_pool(task, stage, self._platform, choice)

    def place_notification(self, task: Any) -> None:
        """Give the exit handler the place of `start_run`, and the webhook's URL from its Secret."""
        task.set_caching_options(False)
        task.set_display_name("tell how the run ended")
        if self._platform is not None and self._platform.secrets.webhook is not None:
            _identity(task, "start_run", self._platform)
            _patience(task, "start_run", self._platform)
            _environment(task, "start_run", self._platform)
            kubernetes.use_secret_as_env(task, self._platform.secrets.webhook, {key: key for key in _WEBHOOK_KEYS})
            pool = self._platform.pool_of("start_run")
            _resources(task, pool)
            _nodes(task, pool, self._platform)
            _affinity(task, pool)

    def _on_pool(self, task: Any, stage: str, platform: Platform, choice: PoolChoice) -> None:
        pool = platform.pool_of(stage)
        if pool.nodes > 1:
            task.set_env_variable("SAFERLHF_TRAIN_JOB", json.dumps(_train_job(stage, platform), sort_keys=True))
            kubernetes.set_timeout(task, 0)  # the job has a deadline of its own, which waiting for nodes is no part of
            pool = platform.pool_of("start_run")  # this pod only submits the job and follows it
        elif STAGES[stage].trains and pool.gpus:
            task.set_env_variable("SAFERLHF_PROCESSES", str(pool.gpus))
        _resources(task, pool)
        if pool is self._form_pool:
            kubernetes.add_node_selector_json(task, choice.node_selector)
            kubernetes.add_toleration_json(task, choice.tolerations)
        else:
            _nodes(task, pool, platform)
        _affinity(task, pool)


def _identity(task: Any, stage: str, platform: Platform) -> None:
    image = platform.image_of(stage)
    task.set_container_image(image)
    task.set_env_variable("SAFERLHF_IMAGE_DIGEST", image.partition("@")[2])
    kubernetes.set_security_context(task, platform.user_id, platform.user_id, run_as_non_root=True)


def _patience(task: Any, stage: str, platform: Platform) -> None:
    place = platform.stages[stage]
    within = f"{place.patience_seconds}s"  # KFP's default of an hour would end every longer step at its first failure
    task.set_retry(place.retries, place.back_off, backoff_factor=2.0, backoff_max_duration=within)
    kubernetes.set_timeout(task, place.timeout_seconds)


def _environment(task: Any, stage: str, platform: Platform) -> None:
    """Addresses from the ConfigMap, keys from Secrets; none of either is written into the pipeline."""
    for keys, optional in ((_CONFIG, False), (_OPTIONAL_CONFIG, True)):
        kubernetes.use_config_map_as_env(task, platform.config_map, {key: key for key in keys}, optional)
    secrets = _secrets(platform) + ([(platform.secrets.judge, _JUDGE_KEYS)] if STAGES[stage].judges else [])
    for secret, keys in secrets:
        kubernetes.use_secret_as_env(task, secret, {key: key for key in keys}, optional=True)


def _secrets(platform: Platform) -> list[tuple[str, Keys]]:
    """The Secrets that every stage may read, and the keys of each."""
    return [(platform.secrets.store, _STORE_KEYS), (platform.secrets.tracking, _TRACKING_KEYS)]


def _resources(task: Any, pool: Pool) -> None:
    task.set_cpu_request(pool.cpu.request).set_cpu_limit(pool.cpu.limit)
    task.set_memory_request(pool.memory.request).set_memory_limit(pool.memory.limit)
    if pool.accelerator is not None and pool.gpus:
        task.set_accelerator_type(pool.accelerator.resource).set_accelerator_limit(pool.gpus)
    if pool.shm is not None:
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=pool.shm)
    if pool.queue is not None:
        kubernetes.add_pod_label(task, _QUEUE_LABEL, pool.queue)
    if pool.priority is not None:
        kubernetes.add_pod_label(task, _PRIORITY_LABEL, pool.priority)


def _nodes(task: Any, pool: Pool, platform: Platform) -> None:
    for key, value in platform.node_selector(pool).items():
        kubernetes.add_node_selector(task, key, value)
    for toleration in platform.tolerations(pool):
        kubernetes.add_toleration(
            task,
            key=toleration.key,
            operator=toleration.operator,
            value=toleration.value,
            effect=toleration.effect,
            toleration_seconds=toleration.tolerationSeconds,
        )


def _affinity(task: Any, pool: Pool) -> None:
    """Required lines make one term, since Kubernetes takes several terms for alternatives."""
    if pool.affinity.required:
        kubernetes.add_node_affinity(task, [line.expression() for line in pool.affinity.required])
    for line in pool.affinity.preferred:
        kubernetes.add_node_affinity(task, [line.expression()], weight=line.weight)


def _train_job(stage: str, platform: Platform) -> dict[str, Any]:
    """What the stage's own pod must know to submit its TrainJob; named as the fields of `TrainJobSpec`."""
    pool, place = platform.pool_of(stage), platform.stages[stage]
    resources = {"cpu": pool.cpu.limit, "memory": pool.memory.limit}
    if pool.accelerator is not None and pool.gpus:
        resources[pool.accelerator.resource] = str(pool.gpus)
    return {
        "image": platform.image_of(stage),
        "nodes": pool.nodes,
        "processes_per_node": pool.gpus or 1,
        "resources": resources,
        "requests": {"cpu": pool.cpu.request, "memory": pool.memory.request},
        "shared_memory": pool.shm or "",
        "environment": [
            {"variable": key, "kind": kind, "name": name}
            for kind, name, keys in (
                ("configMap", platform.config_map, _CONFIG + _OPTIONAL_CONFIG),
                # no judge's key: the one stage that trains and judges does not judge on several ranks
                *(("secret", secret, keys) for secret, keys in _secrets(platform)),
            )
            for key in keys
        ],
        "service_account": platform.service_account,
        "user_id": platform.user_id,
        "node_selector": platform.node_selector(pool),
        "tolerations": [toleration.manifest() for toleration in platform.tolerations(pool)],
        "affinity": pool.affinity.model_dump(),
        "queue": pool.queue or "",
        "priority": pool.priority or "",
        "deadline_seconds": place.timeout_seconds,
        "retries": place.retries,
    }
