"""A policy handed over to KServe: by the real Kubernetes client, to an API server that checks what it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jsonschema import ValidationError
from kubernetes.client import Configuration

from components.foundation.errors import ClusterError
from components.foundation.setting_sections import ServingSettings
from components.foundation.train_job.kubernetes_api import Backoff, Cluster, KubernetesApi, new_client
from components.promote.deployment import apply_service
from components.promote.serving import ServedPolicy, inference_service
from pipelines.serving import cluster_of_context
from tests.custom_kinds import check
from tests.integration.kubernetes_server import KubernetesServer, kubeconfig
from tests.integration.kubernetes_state import INFERENCE_SERVICE_SPEC, Fault, prune

POLICY = ServedPolicy("7", "run-7", "s3://bucket/store/runs/run-7/round-3/ppo_lagrangian/step-16/model", "ab" * 32)
APPLY = "PATCH /apis/serving.kserve.io/v1beta1/namespaces/team/inferenceservices/saferlhf-policy"


def service(canary_share: float = 1.0, **settings: Any) -> dict[str, Any]:
    return inference_service(POLICY, ServingSettings(**settings), canary_share)


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def api(server: KubernetesServer, pauses: list[float]) -> KubernetesApi:
    configuration = Configuration(host=server.url)
    cluster = Cluster(new_client(configuration), "team", "", "")
    return KubernetesApi(cluster, Backoff(attempts=4, sleep=pauses.append))


def test_the_service_runs_the_commit_read_only_and_not_as_root() -> None:
    predictor = service(service_account="reader", memory="40Gi", gpus=2)["spec"]["predictor"]
    model = predictor["model"]
    assert model["storageUri"] == POLICY.model_uri
    assert model["modelFormat"] == {"name": "huggingface"} and model["args"] == ["--backend=vllm"]
    assert predictor["serviceAccountName"] == "reader"
    assert model["resources"]["limits"] == {"cpu": "4", "memory": "40Gi", "nvidia.com/gpu": "2"}
    assert model["resources"]["requests"] == model["resources"]["limits"]
    assert predictor["securityContext"]["runAsNonRoot"] and model["securityContext"]["runAsNonRoot"]
    assert model["securityContext"]["readOnlyRootFilesystem"]
    assert not model["securityContext"]["allowPrivilegeEscalation"]
    written = {mount["mountPath"] for mount in model["volumeMounts"]}
    assert {entry["value"] for entry in model["env"] if entry["name"] == "HOME"} <= written
    assert "nvidia.com/gpu" not in service(gpus=0)["spec"]["predictor"]["model"]["resources"]["limits"]


@pytest.mark.parametrize("canary_share", [0.0, 0.1, 1.0])
def test_every_field_is_one_that_kserve_has(canary_share: float) -> None:
    given = service(canary_share)
    assert prune(given["spec"], INFERENCE_SERVICE_SPEC) == given["spec"]
    check(given)
    predictor = given["spec"]["predictor"]
    for spec in (given["spec"] | {"colour": "red"}, {"predictor": predictor | {"colour": "red"}}):
        with pytest.raises(ValidationError, match="'colour' was unexpected"):
            check(given | {"spec": spec})
    percent = given["spec"]["predictor"].get("canaryTrafficPercent")
    assert percent == {0.0: 0, 0.1: 10, 1.0: None}[canary_share]


def test_a_second_apply_changes_the_object_and_ends_the_canary(server: KubernetesServer, api: KubernetesApi) -> None:
    first = apply_service(api, service(0.1))
    assert server.requests == [f"{APPLY}?fieldManager=saferlhf&force=true"]
    second = apply_service(api, service())
    assert first["metadata"]["uid"] == second["metadata"]["uid"]
    assert first["spec"]["predictor"]["canaryTrafficPercent"] == 10
    assert server.services["saferlhf-policy"]["spec"] == service()["spec"]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault("PATCH", status=409, times=2), [1.0, 2.0]),
        (Fault("PATCH", status=429, headers={"Retry-After": "7"}), [7.0]),
        (Fault("PATCH", status=503), [1.0]),
    ],
    ids=["conflict", "throttled", "away"],
)
def test_a_passing_fault_is_outlived(
    server: KubernetesServer, api: KubernetesApi, pauses: list[float], fault: Fault, expected: list[float]
) -> None:
    server.fault(fault)
    apply_service(api, service())
    assert pauses == expected
    assert list(server.services) == ["saferlhf-policy"]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("status", "times", "words"),
    [
        (409, 4, "conflicted 4 times, at last with: scripted 409"),
        (404, 1, "no such API or namespace .scripted 404.: install KServe"),
        (403, 1, "refused with 403"),
        (422, 1, "refused with 422"),
    ],
)
def test_what_does_not_pass_is_told(
    server: KubernetesServer, api: KubernetesApi, status: int, times: int, words: str
) -> None:
    server.fault(Fault("PATCH", status=status, times=times))
    with pytest.raises(ClusterError, match=words):
        apply_service(api, service())
    assert server.services == {}


def test_the_cluster_and_namespace_are_those_of_the_kubeconfig(server: KubernetesServer, tmp_path: Path) -> None:
    file = kubeconfig(tmp_path / "config", server.url, "team")
    with cluster_of_context("", file) as cluster:
        apply_service(KubernetesApi(cluster, Backoff(attempts=1)), service())
    assert server.tokens == ["Bearer a-token"]
    assert list(server.services) == ["saferlhf-policy"]
    with cluster_of_context("other", file) as cluster:
        assert cluster.namespace == "other"
    with cluster_of_context("", kubeconfig(tmp_path / "bare", server.url, "")) as cluster:
        assert cluster.namespace == "default"


@pytest.mark.fault
@pytest.mark.parametrize("text", [None, "a: [b"])
def test_no_kubeconfig_is_told(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config").write_text(text)
    with pytest.raises(ClusterError, match="set KUBECONFIG"), cluster_of_context("", str(tmp_path / "config")):
        pass
