"""The pipeline as it is compiled for each shipped platform, read back field by field.

.venv/bin/python -m tests.unit.test_compiled     prints the table of every platform
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from google.protobuf import json_format

from pipelines.cluster.compiling import compile_to
from pipelines.cluster.executors import Step, form_field, read_steps, row, table
from pipelines.cluster.platform_file import read_platform, shipped_platforms
from pipelines.stages import STAGES

COMPILED = Path(__file__).parents[2] / "pipelines" / "compiled"
NAMES = shipped_platforms()
KUBERNETES = ("1.31", "1.37")
ROUND = ("collect", "annotate", "reward_model", "cost_model", "ppo_lagrangian", "evaluate")
SECRET_KEYS = {
    "saferlhf-s3": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
    "saferlhf-mlflow": {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"},
    "saferlhf-judge": {"SAFERLHF_JUDGE_KEY"},
}

Shallow = Callable[..., Any]


def golden(name: str) -> str:
    return (COMPILED / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def steps() -> dict[str, list[Step]]:
    """Platform -> its steps, parsed strictly into KFP's messages."""
    return {name: read_steps(golden(name)) for name in NAMES}


@pytest.mark.golden
def test_every_platform_file_has_its_stored_pipeline_and_its_rows_here() -> None:
    assert [path.stem for path in sorted(COMPILED.glob("*.yaml"))] == NAMES == sorted(POOLS)


@pytest.mark.golden
@pytest.mark.parametrize("name", NAMES)
def test_the_stored_pipeline_is_what_compiles_today(shallow: Shallow, tmp_path: Path, name: str) -> None:
    shallow(compile_to, tmp_path / "p.yaml", 3, read_platform(name))
    stored, now = golden(name).splitlines(), (tmp_path / "p.yaml").read_text(encoding="utf-8").splitlines()
    changes = "\n".join(list(difflib.unified_diff(stored, now, "stored", "now", lineterm="", n=1))[:40])
    assert not changes, f"pipelines/compiled/{name}.yaml is out of date: run `make compiled`, read the diff\n{changes}"


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_of_every_round_is_there_once(steps: dict[str, list[Step]], name: str) -> None:
    assert {step.stage for step in steps[name]} == set(STAGES)
    for number in (1, 2, 3):
        assert sorted(s.stage for s in steps[name] if s.path[:2] == ("training", f"round {number}")) == sorted(ROUND)
    assert len(steps[name]) == 3 * len(ROUND) + 9
    paths = [step.path for step in steps[name]]
    assert len(set(paths)) == len(paths), "no two boxes look alike"
    assert {path for path in paths if path[0] != "training"} == {("check settings, start run",), ("prepare data",)}
    assert ("training", "evaluate the SFT model") in paths
    assert ("training", "round 3", "PPO-Lagrangian") in paths


@pytest.mark.parametrize("name", NAMES)
def test_what_holds_for_every_step(steps: dict[str, list[Step]], name: str) -> None:
    for step in steps[name]:
        where = "/".join(step.path)
        assert re.fullmatch(r"registry\.example\.com/saferlhf/[a-z]+@sha256:[0-9a-f]{64}", step.container.image), where
        assert "latest" not in step.container.image
        assert not step.task.caching_options.enable_cache, where
        assert 1 <= step.task.retry_policy.max_retry_count <= 5, where
        assert 30 <= step.task.retry_policy.backoff_duration.seconds <= 120, where
        assert step.task.retry_policy.backoff_factor == 2.0, where
        assert 900 <= step.pod.active_deadline_seconds <= 24 * 3600, where
        user = step.pod.security_context
        assert (user.run_as_user, user.run_as_group, user.run_as_non_root) == (10001, 10001, True), where
        environment = {variable.name: variable.value for variable in step.container.env}
        assert environment.pop("SAFERLHF_IMAGE_DIGEST") == step.container.image.partition("@")[2], where
        a_rank_a_gpu = STAGES[step.stage].trains and name != "local"
        assert environment == ({"SAFERLHF_PROCESSES": "1"} if a_rank_a_gpu else {}), where
        assert "pip install" not in " ".join(step.container.command)


@pytest.mark.parametrize("name", NAMES)
def test_the_last_attempt_has_its_time_too(steps: dict[str, list[Step]], name: str) -> None:
    """Argo counts `maxDuration` from the start of the first attempt, and ends what runs later."""
    for step in steps[name]:
        retry = step.task.retry_policy
        pauses = sum(retry.backoff_duration.seconds * 2**number for number in range(retry.max_retry_count))
        attempts = (retry.max_retry_count + 1) * step.pod.active_deadline_seconds
        waiting = retry.backoff_max_duration.seconds - attempts - pauses
        assert waiting == (retry.max_retry_count + 1) * 24 * 3600, step.stage


@pytest.mark.parametrize("name", NAMES)
def test_addresses_come_from_the_config_map_and_keys_from_secrets(steps: dict[str, list[Step]], name: str) -> None:
    for step in steps[name]:
        required, optional = step.pod.config_map_as_env
        assert {required.config_map_name, optional.config_map_name} == {"saferlhf-platform"}
        assert [key.env_var for key in required.key_to_env] == [
            "SAFERLHF_STORE_URI",
            "MLFLOW_TRACKING_URI",
            "AWS_DEFAULT_REGION",
        ]
        assert [key.env_var for key in optional.key_to_env] == [
            "AWS_ENDPOINT_URL",
            "SAFERLHF_LOG_FORMAT",
            "SAFERLHF_METRICS_ADDRESS",
            "SAFERLHF_METRICS_PORT",
        ]
        assert (required.optional, optional.optional) == (False, True)
        secrets = {secret.secret_name: secret for secret in step.pod.secret_as_env}
        judge = {"saferlhf-judge"} if step.stage in ("annotate", "evaluate", "ppo_lagrangian") else set()
        assert set(secrets) == {"saferlhf-s3", "saferlhf-mlflow"} | judge
        for secret_name, secret in secrets.items():
            assert secret.optional, "with workload identity there are no keys"
            assert {key.secret_key for key in secret.key_to_env} == SECRET_KEYS[secret_name]
            assert all(key.secret_key == key.env_var for key in secret.key_to_env)


Terms = list[dict[str, Any]]


@dataclass(frozen=True)
class Pool:
    """What a step on a pool asks the cluster for, written by hand. CPU and memory are request and limit."""

    cpu: str
    memory: str
    gpus: int = 0
    shm: str = "-"
    queue: str = "-"
    priority: str = "-"
    selector: dict[str, str] = field(default_factory=dict)
    tolerations: Terms = field(default_factory=list)
    required: Terms = field(default_factory=list)
    preferred: Terms = field(default_factory=list)


def gpu(cpu: str, memory: str, shm: str, **nodes: Any) -> Pool:
    return Pool(cpu, memory, 1, shm, "saferlhf", **nodes)


def among(key: str, *values: str, operator: str = "In") -> dict[str, Any]:
    return {"key": key, "operator": operator, "values": list(values)}


ON_GPU = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
GKE_SPOT, EKS_FAMILY = "cloud.google.com/gke-spot", "karpenter.k8s.aws/instance-family"
ON_GKE_SPOT = [ON_GPU, {"key": GKE_SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
L4, A100 = ({"cloud.google.com/gke-accelerator": f"nvidia-{name}"} for name in ("l4", "a100-80gb"))
EKS_SPOT, EKS_ON_DEMAND = ({"karpenter.sh/capacity-type": name} for name in ("spot", "on-demand"))
DEDICATED = {"key": "dedicated", "operator": "Equal", "value": "training", "effect": "NoSchedule"}
SMALL = Pool("500m to 2", "2Gi to 4Gi")
ON_CPU = Pool("1 to 4", "4Gi to 8Gi", shm="1Gi")
OF_MY_OWN = gpu(
    "8 to 16",
    "128Gi to 160Gi",
    "32Gi",
    selector={"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"},
    tolerations=[DEDICATED],
    priority="saferlhf",
)
POOLS = {
    "local": {"small": SMALL, "generate": ON_CPU, "train": ON_CPU, "ppo": ON_CPU},
    "gke": {
        "small": SMALL,
        "generate": gpu("4 to 8", "24Gi to 32Gi", "8Gi", selector=L4 | {GKE_SPOT: "true"}, tolerations=ON_GKE_SPOT),
        "train": gpu("8 to 12", "96Gi to 128Gi", "16Gi", selector=A100 | {GKE_SPOT: "true"}, tolerations=ON_GKE_SPOT),
        "ppo": gpu(
            "10 to 12",
            "128Gi to 160Gi",
            "32Gi",
            selector=A100,
            tolerations=[ON_GPU],
            preferred=[{"weight": 50} | among("cloud.google.com/gke-local-nvme-ssd", "true")],
        ),
    },
    "eks": {
        "small": SMALL,
        "generate": gpu(
            "4 to 8",
            "24Gi to 32Gi",
            "8Gi",
            selector=EKS_SPOT,
            tolerations=[ON_GPU],
            required=[among(EKS_FAMILY, "g6", "g5")],
            preferred=[{"weight": 80} | among(EKS_FAMILY, "g6")],
        ),
        "train": gpu(
            "8 to 12",
            "96Gi to 128Gi",
            "16Gi",
            selector=EKS_SPOT,
            tolerations=[ON_GPU],
            required=[among(EKS_FAMILY, "p4de", "p5")],
        ),
        "ppo": gpu(
            "10 to 12",
            "128Gi to 128Gi",
            "32Gi",
            selector=EKS_ON_DEMAND | {EKS_FAMILY: "p4de"},
            tolerations=[ON_GPU],
        ),
    },
    "on_prem": {
        "small": SMALL,
        "generate": gpu(
            "4 to 8",
            "24Gi to 32Gi",
            "8Gi",
            required=[
                among("nvidia.com/gpu.present", "true"),
                among("nvidia.com/gpu.memory", "23000", operator="Gt"),
            ],
            priority="saferlhf",
        ),
        "train": OF_MY_OWN,
        "ppo": OF_MY_OWN,
    },
}
RETRIES = {"local": 1, "gke": 5, "eks": 5, "on_prem": 2}  # of steps that run a model
PLACES = {  # stage: image, pool, retries where it runs no model, seconds before the first retry, seconds of an attempt
    "start_run": ("service", "small", 1, 30, 900),
    "prepare_data": ("service", "small", 2, 60, 3600),
    "sft": ("trainer", "train", 0, 60, 21600),
    "collect": ("rollout", "generate", 0, 60, 14400),
    "annotate": ("service", "small", 2, 60, 14400),
    "reward_model": ("trainer", "train", 0, 60, 21600),
    "cost_model": ("trainer", "train", 0, 60, 21600),
    "ppo_lagrangian": ("trainer", "ppo", 0, 120, 86400),
    "evaluate": ("trainer", "generate", 0, 60, 14400),
    "register": ("service", "small", 2, 60, 900),
    "gate": ("service", "small", 2, 60, 900),
    "set_alias": ("service", "small", 2, 60, 900),
    "report": ("service", "small", 2, 60, 1800),
}


@pytest.mark.golden
@pytest.mark.parametrize("name", NAMES)
def test_what_every_step_gets(steps: dict[str, list[Step]], name: str) -> None:
    form = form_defaults(name)
    for step in steps[name]:
        image, on, retries, back_off, seconds = PLACES[step.stage]
        pool, cells, where = POOLS[name][on], row(step), f"{name} {'/'.join(step.path)}"
        assert step.container.image.rpartition("/")[2].startswith(f"{image}@sha256:"), where
        assert (cells["cpu"], cells["memory"]) == (pool.cpu, pool.memory), where
        assert cells["accelerator"] == (f"{pool.gpus} x nvidia.com/gpu" if pool.gpus else "-"), where
        assert (cells["shm"], cells["queue"], cells["priority"]) == (pool.shm, pool.queue, pool.priority), where
        for mount in step.pod.empty_dir_mounts:
            assert (mount.mount_path, mount.medium) == ("/dev/shm", "Memory"), where
        assert node_selector(step.pod, form) == pool.selector, where
        assert tolerations(step.pod, form) == pool.tolerations, where
        assert affinity_terms(step.pod) == (pool.required, pool.preferred), where
        patience = (step.task.retry_policy.max_retry_count, step.task.retry_policy.backoff_duration.seconds)
        assert patience == (retries or RETRIES[name], back_off), where
        assert step.pod.active_deadline_seconds == seconds, where
        assert (cells["cached"], cells["user"]) == ("no", "10001:10001"), where
    printed = table(steps[name]).splitlines()
    assert sum(int(line.split()[-1]) for line in printed[1:]) == len(steps[name]), "the table leaves none out"


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", NAMES)
def test_kubernetes_accepts_the_pods(steps: dict[str, list[Step]], name: str, version: str) -> None:
    """The pod of every step, put together as KFP's driver does, against Kubernetes' own schema."""
    defaults = form_defaults(name)
    seen = set()
    for step in steps[name]:
        pod = pod_of(step, defaults)
        text = json.dumps(pod, sort_keys=True)
        if text not in seen:
            kubernetes_validate.validate(pod, version, strict=True)
            seen.add(text)
    assert len(seen) > len(STAGES) // 2


def test_the_schema_check_would_notice(steps: dict[str, list[Step]]) -> None:
    pod = pod_of(steps["gke"][0], form_defaults("gke"))
    pod["spec"]["containers"][0]["resources"]["limit"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, KUBERNETES[-1], strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_this_machine_is_in_the_file(name: str) -> None:
    for path in (Path.cwd(), Path.home(), COMPILED.parents[1]):
        assert len(path.parts) < 3 or str(path) not in golden(name)
    assert not re.search(r"20\d\d-\d\d-\d\d", golden(name))


def form_defaults(name: str) -> dict[str, Any]:
    """What the run form gives when nobody changes it."""
    pipeline = next(yaml.load_all(golden(name), Loader=yaml.CSafeLoader))
    inputs = pipeline["root"]["inputDefinitions"]["parameters"]
    return {key: definition["defaultValue"] for key, definition in inputs.items()}


def pod_of(step: Step, form: dict[str, Any]) -> dict[str, Any]:
    """The pod that KFP makes of a step, as far as the pipeline decides it."""
    container, pod = step.container, step.pod
    resources = container.resources
    limits = {"cpu": resources.resource_cpu_limit, "memory": resources.resource_memory_limit}
    if resources.HasField("accelerator"):
        limits[resources.accelerator.resource_type] = resources.accelerator.resource_count
    environment: list[dict[str, Any]] = [{"name": v.name, "value": v.value} for v in container.env]
    for source, kind in ((pod.config_map_as_env, "config_map"), (pod.secret_as_env, "secret")):
        for item in source:
            for key in item.key_to_env:
                reference = {
                    "name": getattr(item, f"{kind}_name"),
                    "key": getattr(key, f"{kind}_key"),
                    "optional": item.optional,
                }
                field = "configMapKeyRef" if kind == "config_map" else "secretKeyRef"
                environment.append({"name": key.env_var, "valueFrom": {field: reference}})
    spec: dict[str, Any] = {
        "activeDeadlineSeconds": pod.active_deadline_seconds,
        "nodeSelector": node_selector(pod, form),
        "tolerations": tolerations(pod, form),
        "affinity": affinity(pod),
        "containers": [
            {
                "name": "main",
                "image": container.image,
                "command": list(container.command),
                "args": list(container.args),
                "env": environment,
                "resources": {
                    "requests": {"cpu": resources.resource_cpu_request, "memory": resources.resource_memory_request},
                    "limits": limits,
                },
                "volumeMounts": [{"name": m.volume_name, "mountPath": m.mount_path} for m in pod.empty_dir_mounts],
                "securityContext": {
                    "runAsUser": pod.security_context.run_as_user,
                    "runAsGroup": pod.security_context.run_as_group,
                    "runAsNonRoot": pod.security_context.run_as_non_root,
                },
            }
        ],
        "volumes": [
            {"name": m.volume_name, "emptyDir": {"medium": m.medium, "sizeLimit": m.size_limit}}
            for m in pod.empty_dir_mounts
        ],
    }
    metadata = {"name": step.stage.replace("_", "-"), "labels": dict(pod.pod_metadata.labels)}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def node_selector(pod: Any, form: dict[str, Any]) -> dict[str, str]:
    if pod.node_selector.HasField("node_selector_json"):
        chosen: dict[str, str] = form[form_field(pod.node_selector.node_selector_json)]
        return chosen
    return dict(pod.node_selector.labels)


def tolerations(pod: Any, form: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for toleration in pod.tolerations:
        if toleration.HasField("toleration_json"):
            found += form[form_field(toleration.toleration_json)]
        else:
            found.append(json_format.MessageToDict(toleration))
    return found


def affinity_terms(pod: Any) -> tuple[Terms, Terms]:
    """The lines that must hold, in one term, and those that should, each with its weight."""
    node = affinity(pod).get("nodeAffinity", {})
    alternatives = node.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])
    assert len(alternatives) <= 1
    required = [line for term in alternatives for line in term["matchExpressions"]]
    preferred = node.get("preferredDuringSchedulingIgnoredDuringExecution", [])
    lines = [(entry["weight"], line) for entry in preferred for line in entry["preference"]["matchExpressions"]]
    return required, [{"weight": weight} | line for weight, line in lines]


def affinity(pod: Any) -> dict[str, Any]:
    """Terms without a weight are alternatives of the requirement."""
    required, preferred = [], []
    for term in pod.node_affinity:
        expressions = [json_format.MessageToDict(line) for line in term.match_expressions]
        if term.HasField("weight"):
            preferred.append({"weight": term.weight, "preference": {"matchExpressions": expressions}})
        else:
            required.append({"matchExpressions": expressions})
    node: dict[str, Any] = {}
    if required:
        node["requiredDuringSchedulingIgnoredDuringExecution"] = {"nodeSelectorTerms": required}
    if preferred:
        node["preferredDuringSchedulingIgnoredDuringExecution"] = preferred
    return {"nodeAffinity": node} if node else {}


if __name__ == "__main__":
    for platform in NAMES:
        print(f"{platform}\n\n{table(read_steps(golden(platform)))}\n")
