"""Reads a compiled pipeline back: which pod each step asks the cluster for. `saferlhf compile --table` prints it.

The documents are parsed strictly into KFP's own messages, so a field that Kubeflow does not know is an error here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

from pipelines.stages import STAGES


@dataclass(frozen=True)
class Step:
    """One task of the compiled pipeline and the executor that runs it.

    Attributes:
        path: the displayed names from the outermost box to the task.
        stage: name of the component's function.
        task: its PipelineTaskSpec.
        container: its PipelineContainerSpec.
        pod: its KubernetesExecutorConfig.
    """

    path: tuple[str, ...]
    stage: str
    task: Any
    container: Any
    pod: Any


def read_steps(text: str) -> list[Step]:
    """Every task of a compiled pipeline that runs a container.

    Raises:
        google.protobuf.json_format.ParseError: a document is no PipelineSpec or PlatformSpec.
    """
    pipeline, *platform = yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return steps_of(
        json_format.ParseDict(pipeline, pipeline_spec_pb2.PipelineSpec()),
        json_format.ParseDict(platform[0] if platform else {}, pipeline_spec_pb2.PlatformSpec()),
    )


def steps_of(pipeline: Any, platform: Any) -> list[Step]:
    """The same of a PipelineSpec and a PlatformSpec."""
    executors = _parse(pipeline.deployment_spec, pipeline_spec_pb2.PipelineDeploymentConfig()).executors
    pods = {
        label: _parse(config, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
        for label, config in platform.platforms["kubernetes"].deployment_spec.executors.items()
    }
    steps = []
    for path, task in _tasks(pipeline, pipeline.root, ()):
        label = pipeline.components[task.component_ref.name].executor_label
        container = executors[label].container
        pod = pods.get(label, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
        steps.append(Step(path, container.args[-1], task, container, pod))
    return steps


def table(steps: list[Step]) -> str:
    """One line for each kind of step, in the order of a run; those of the rounds are alike, and counted."""
    order = {stage: number for number, stage in enumerate(STAGES)}
    rows = Counter(
        tuple(row(step).values()) for step in sorted(steps, key=lambda step: order.get(step.stage, len(order)))
    )
    lines = [(*row(steps[0]), "steps"), *((*cells, str(count)) for cells, count in rows.items())]
    widths = [max(len(cells[column]) for cells in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in lines
    )


def row(step: Step) -> dict[str, str]:
    """What the step asks of the cluster, as texts by column name."""
    resources, retry, user = step.container.resources, step.task.retry_policy, step.pod.security_context
    back_off, within = retry.backoff_duration.seconds, retry.backoff_max_duration.seconds
    return {
        "stage": step.stage,
        "image": _short(step.container.image),
        "cpu": _range(resources.resource_cpu_request, resources.resource_cpu_limit),
        "memory": _range(resources.resource_memory_request, resources.resource_memory_limit),
        "accelerator": _accelerator(step),
        "nodes": _nodes(step.pod),
        "tolerates": _tolerations(step.pod),
        "shm": next((mount.size_limit for mount in step.pod.empty_dir_mounts if mount.mount_path == "/dev/shm"), "-"),
        "queue": step.pod.pod_metadata.labels.get("kueue.x-k8s.io/queue-name", "-"),
        "priority": step.pod.pod_metadata.labels.get("kueue.x-k8s.io/priority-class", "-"),
        "retries": f"{retry.max_retry_count} after {back_off}s x {retry.backoff_factor:g} in {within // 3600}h",
        "timeout": f"{step.pod.active_deadline_seconds}s",
        "cached": "yes" if step.task.caching_options.enable_cache else "no",
        "secrets": ",".join(secret.secret_name for secret in step.pod.secret_as_env) or "-",
        "user": f"{user.run_as_user}:{user.run_as_group}" if user.run_as_non_root else "-",
    }


def form_field(parameter: Any) -> str:
    """The field of the run form that an input comes from: within a condition or an exit handler it has a prefix."""
    return str(parameter.component_input_parameter).removeprefix("pipelinechannel--")


def _parse(struct: Any, message: Any) -> Any:
    return json_format.ParseDict(json_format.MessageToDict(struct), message)


def _tasks(pipeline: Any, component: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for task in component.dag.tasks.values():
        inner, here = pipeline.components[task.component_ref.name], (*path, task.task_info.name)
        if inner.executor_label:
            yield here, task
        else:
            yield from _tasks(pipeline, inner, here)


def _short(image: str) -> str:
    name, _, digest = image.partition("@sha256:")
    return f"{name.rsplit('/', 1)[-1]}@{digest[:12]}" if digest else name


def _range(request: str, limit: str) -> str:
    return f"{request} to {limit}" if limit else "-"


def _accelerator(step: Step) -> str:
    """Of the step's pod; or of each node of the TrainJob that it submits."""
    jobs = [json.loads(variable.value) for variable in step.container.env if variable.name == "SAFERLHF_TRAIN_JOB"]
    if jobs:
        each = [f"{count} x {name}" for name, count in jobs[0]["resources"].items() if name not in ("cpu", "memory")]
        return " x ".join([f"{jobs[0]['nodes']} nodes", *each])
    own = step.container.resources.accelerator
    return " x ".join(filter(None, (own.resource_count, own.resource_type))) or "-"


def _nodes(pod: Any) -> str:
    parts = [f"{key}={value}" for key, value in sorted(pod.node_selector.labels.items())]
    if pod.node_selector.HasField("node_selector_json"):
        parts.append(f"(run form: {form_field(pod.node_selector.node_selector_json)})")
    for term in pod.node_affinity:
        lines = " and ".join(
            f"{line.key} {line.operator} {','.join(line.values)}".strip() for line in term.match_expressions
        )
        parts.append(f"prefers {lines}" if term.weight else lines)
    return "; ".join(parts) or "any"


def _tolerations(pod: Any) -> str:
    parts = []
    for toleration in pod.tolerations:
        if toleration.HasField("toleration_json"):
            parts.append(f"(run form: {form_field(toleration.toleration_json)})")
        else:
            parts.append("=".join(filter(None, (toleration.key, toleration.value))))
    return "; ".join(parts) or "-"
