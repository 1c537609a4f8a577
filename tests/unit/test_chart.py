"""The Helm chart, rendered with each of its values files by Helm's own engine."""

from __future__ import annotations

import base64
import functools
import re
from pathlib import Path
from typing import Any

import helm_python as helm
import pytest
import yaml
from jsonschema import ValidationError

from components.foundation.setting_sections import ServingSettings
from pipelines.cluster.platform_file import read_platform
from pipelines.doctor.cluster_rights import RIGHTS as STEP_RIGHTS
from pipelines.doctor.cluster_rights import Right
from pipelines.kubeflow.schedule_file import read_schedules
from tests.custom_kinds import check
from tests.unit.helm_chart import (
    CHART,
    IMAGE,
    NAMESPACE,
    PLATFORMS,
    find,
    names,
    platform_values,
    pods,
    render,
    render_text,
    selects,
)

DIGEST = re.compile(r".+@sha256:[0-9a-f]{64}")
EXECUTOR_RIGHTS = {("argoproj.io", "workflowtaskresults"): "create patch", ("", "configmaps"): "get"}
RIGHTS = {
    "saferlhf": {
        ("trainer.kubeflow.org", "trainjobs"): "create get list watch patch delete",
        ("", "pods"): "list watch",
        ("", "pods/log"): "get",
        ("", "events"): "list",
    },
    "saferlhf-steps": {**EXECUTOR_RIGHTS, ("", "secrets"): "get"},
    "saferlhf-upload": {
        ("pipelines.kubeflow.org", "pipelines"): "get list create",
        ("pipelines.kubeflow.org", "pipelines/versions"): "get list create",
        ("pipelines.kubeflow.org", "experiments"): "get list create",
        ("pipelines.kubeflow.org", "jobs"): "get list create delete enable disable",
        ("pipelines.kubeflow.org", "runs"): "list",
    },
}


KUBEFLOW = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kubeflow"}}}


@functools.cache
def rendered(platform: str) -> list[dict[str, Any]]:
    return render(platform_values(platform))


each_platform = pytest.mark.parametrize("platform", PLATFORMS)


@each_platform
def test_every_values_file_is_linted_without_a_warning(platform: str) -> None:
    report = helm.lint(CHART, platform_values(platform), strict=True, namespace=NAMESPACE)
    assert report["errors"] == []
    assert [m for m in report["messages"] if m["error"] != "icon is recommended"] == []


ALL_OPTIONS = {
    "priorityClass": {"create": True, "name": "saferlhf"},
    "kueue": {"create": True, "clusterQueue": "gpus"},
    "serving": {"create": True, "existingSecret": "reader"},
    "schedule": {"enabled": True},
    "metrics": {"enabled": True, "podMonitor": {"create": True}, "rules": {"create": True}},
}


CUSTOM_KINDS = {"LocalQueue": "spec", "PodMonitor": "spec", "PrometheusRule": "spec", "WorkloadPriorityClass": ""}
"""Those that are not Kubernetes' own, and where their fields are."""


@each_platform
def test_every_object_is_what_the_cluster_expects(platform: str) -> None:
    """As the values file is, and with all that can be switched on: no kind is left out."""
    everything = render(platform_values(platform, **ALL_OPTIONS))
    assert {*CUSTOM_KINDS, "PriorityClass"} <= {entry["kind"] for entry in everything}
    for entry in [*rendered(platform), *everything]:
        check(entry)


def test_an_image_alone_makes_a_chart_that_the_cluster_takes() -> None:
    """values.yaml as it is, with the one value that nobody can guess."""
    values = {"images": {"service": IMAGE}}
    assert helm.lint(CHART, values, strict=True, namespace=NAMESPACE)["errors"] == []
    objects = render(values)
    for entry in objects:
        check(entry)
    assert names(objects, "Deployment") == {"saferlhf-mlflow"}


@pytest.mark.fault
@pytest.mark.parametrize(("kind", "place"), CUSTOM_KINDS.items())
def test_a_field_that_a_kind_does_not_have_is_noticed(kind: str, place: str) -> None:
    everything = render(platform_values("eks", **ALL_OPTIONS))
    entry = next(entry for entry in everything if entry["kind"] == kind)
    with pytest.raises(ValidationError, match="'colour' was unexpected"):
        check(entry | ({place: entry[place] | {"colour": "red"}} if place else {"colour": "red"}))


@each_platform
def test_every_pod_meets_pod_security_restricted(platform: str) -> None:
    """The profile's controls, and what it does not ask: numeric user, read-only root, no token, no service links."""
    for pod in pods(rendered(platform)):
        context = pod.spec["securityContext"]
        assert (context["runAsNonRoot"], context["runAsUser"]) == (True, 10001), pod.name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod.spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys()
        allowed = {"configMap", "emptyDir", "projected", "persistentVolumeClaim"}
        assert {kind for volume in pod.spec["volumes"] for kind in volume if kind != "name"} <= allowed
        for container in pod.containers:
            security = container["securityContext"]
            assert security == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert not any("hostPort" in port for port in container.get("ports", []))
            assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"], pod.name


@each_platform
def test_every_server_has_probes_and_of_two_alike_one_goes_at_a_time(platform: str) -> None:
    budgets = [entry["spec"] for entry in rendered(platform) if entry["kind"] == "PodDisruptionBudget"]
    for entry in rendered(platform):
        if entry["kind"] in {"Deployment", "StatefulSet"}:
            template, replicas = entry["spec"]["template"], entry["spec"]["replicas"]
            (container,) = template["spec"]["containers"]
            ports = {port["name"] for port in container["ports"]}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert container[probe]["httpGet"]["port"] in ports, entry["metadata"]["name"]
            own = [budget for budget in budgets if selects(budget["selector"], template["metadata"]["labels"])]
            assert [budget["maxUnavailable"] for budget in own] == [1] * (replicas > 1)


@each_platform
def test_every_container_has_an_image_by_digest_and_requests_and_limits(platform: str) -> None:
    for pod in pods(rendered(platform)):
        for container in pod.containers:
            assert DIGEST.fullmatch(container["image"]), pod.name
            for kind in ("requests", "limits"):
                assert container["resources"][kind].keys() == {"cpu", "memory"}, pod.name


@each_platform
def test_no_object_holds_a_secret_but_the_one_made_for_trying_out(platform: str) -> None:
    secrets = [entry for entry in rendered(platform) if entry["kind"] == "Secret"]
    assert [entry["metadata"]["name"] for entry in secrets] == (["saferlhf-s3"] if platform == "try" else [])
    for pod in pods(rendered(platform)):
        for container in pod.containers:
            for variable in container.get("env", []):
                secret = re.search("KEY|PASSWORD", variable["name"])
                uri = variable["name"] == "MLFLOW_BACKEND_STORE_URI" and platform != "try"
                assert not (secret or uri) or "secretKeyRef" in variable["valueFrom"], (pod.name, variable)


@each_platform
def test_the_rights_are_exactly_these(platform: str) -> None:
    objects = rendered(platform)
    assert not names(objects, "ClusterRole") | names(objects, "ClusterRoleBinding")
    expected = {name: dict(rights) for name, rights in RIGHTS.items()}
    if platform == "on-prem":  # default-editor has them
        del expected["saferlhf-steps"]
    if platform == "try":  # no profiles
        del expected["saferlhf-upload"]
    assert names(objects, "Role") == names(objects, "RoleBinding") == set(expected)
    for name, rights in expected.items():
        rules = find(objects, "Role", name)["rules"]
        found = {
            (g, r): " ".join(rule["verbs"]) for rule in rules for g in rule["apiGroups"] for r in rule["resources"]
        }
        assert found == rights
        for rule in rules:
            if rule["resources"][0] in {"configmaps", "secrets"}:
                assert rule["resourceNames"] in (["kfp-launcher"], ["mlpipeline-minio-artifact"])
        (subject,) = find(objects, "RoleBinding", name)["subjects"]
        steps = "default-editor" if platform == "on-prem" else "saferlhf"
        assert subject["name"] == ("saferlhf-upload" if name == "saferlhf-upload" else steps)
        assert subject["namespace"] == NAMESPACE


@each_platform
def test_the_chart_grants_what_doctor_asks_for_and_no_more(platform: str) -> None:
    rules = find(rendered(platform), "Role", "saferlhf")["rules"]
    granted = {
        Right(verb, resource, group)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert granted == set(STEP_RIGHTS)


def test_a_promotion_may_deploy_where_the_chart_says_so_and_nothing_else() -> None:
    objects = render(platform_values("gke", serving={"apply": True}))
    (rule,) = find(objects, "Role", "saferlhf-serving")["rules"]
    assert rule == {
        "apiGroups": ["serving.kserve.io"],
        "resources": ["inferenceservices"],
        "verbs": ["create", "patch"],
    }
    binding = find(objects, "RoleBinding", "saferlhf-serving")
    assert binding["roleRef"]["name"] == "saferlhf-serving"
    assert [subject["name"] for subject in binding["subjects"]] == ["saferlhf"]


@each_platform
def test_every_rule_says_why(platform: str) -> None:
    text = render_text(platform_values(platform))["saferlhf/templates/rbac.yaml"]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    rules = [i for i, line in enumerate(lines) if line.startswith("- apiGroups")]
    assert rules
    assert all(lines[i - 1].startswith("# ") for i in rules)


@each_platform
def test_the_network_policies_select_every_pod(platform: str) -> None:
    policies = [entry for entry in rendered(platform) if entry["kind"] == "NetworkPolicy"]
    deny = find(policies, "NetworkPolicy", "saferlhf-default-deny")["spec"]
    assert deny["policyTypes"] == ["Ingress", "Egress"]
    assert not deny.keys() & {"ingress", "egress"}
    for pod in pods(rendered(platform)):
        chosen = {p["metadata"]["name"] for p in policies if selects(p["spec"]["podSelector"], pod.labels)}
        assert {"saferlhf-default-deny", "saferlhf-dns"} < chosen, pod.name
        assert len(chosen) == 3, (pod.name, chosen)  # these two and the one that is its own


def reaches(objects: list[dict[str, Any]], source: dict[str, str], target: dict[str, str], port: int) -> bool:
    """May a pod open a connection to another pod of the namespace? As Kubernetes decides: both ends must allow it."""
    policies = [entry["spec"] for entry in objects if entry["kind"] == "NetworkPolicy"]

    def allows(direction: str, own: dict[str, str], peer: dict[str, str]) -> bool:
        key, side = ("egress", "to") if direction == "Egress" else ("ingress", "from")
        mine = [p for p in policies if direction in p["policyTypes"] and selects(p["podSelector"], own)]
        rules = [rule for policy in mine for rule in policy.get(key, [])]
        return not mine or any(
            port in {entry["port"] for entry in rule.get("ports", [{"port": port}])}
            and any(selects(p["podSelector"], peer) for p in rule.get(side, []) if p.keys() == {"podSelector"})
            for rule in rules
        )

    return allows("Egress", source, target) and allows("Ingress", target, source)


def test_who_reaches_whom() -> None:
    objects = rendered("try")
    labels = {pod.name: pod.labels for pod in pods(objects)}
    step = {"pipelines.kubeflow.org/v2_component": "true"}
    trainer = {"jobset.sigs.k8s.io/jobset-name": "ppo"}
    mlflow, store = labels["Deployment/saferlhf-mlflow"], labels["StatefulSet/saferlhf-s3"]
    upload, test_s3 = labels["Job/saferlhf-upload"], labels["Pod/saferlhf-test-s3"]
    yes = [(step, mlflow, 5000), (step, store, 8333), (trainer, store, 8333), (trainer, mlflow, 5000)]
    yes += [(mlflow, store, 8333), (test_s3, store, 8333), (labels["Job/saferlhf-bucket"], store, 8333)]
    yes += [(trainer, trainer, 29500)]
    no = [(store, mlflow, 5000), (upload, store, 8333), (upload, mlflow, 5000), (test_s3, mlflow, 5000)]
    no += [(step, step, 29500), (step, store, 9333), ({"app": "notebook"}, mlflow, 5000), (mlflow, step, 80)]
    assert [way for way in yes if not reaches(objects, *way)] == []
    assert [way for way in no if reaches(objects, *way)] == []


def test_each_way_out_of_the_namespace_is_named() -> None:
    """Ports and peers of the steps' egress, by hand, for a store and a judge elsewhere."""
    others = {
        "models": {"to": [{"ipBlock": {"cidr": "10.9.0.3/32"}}], "port": 3128},
        "judge": {"to": [{"ipBlock": {"cidr": "10.9.0.1/32"}}], "port": 8443},
        "webhook": {"to": [{"ipBlock": {"cidr": "10.9.0.2/32"}}], "port": 9443},
    }
    objects = render(platform_values("on-prem", networkPolicy=others))
    spec = find(objects, "NetworkPolicy", "saferlhf-steps")["spec"]
    ways = [([entry["port"] for entry in rule["ports"]], rule["to"][0]) for rule in spec["egress"]]
    assert ([443], {"ipBlock": {"cidr": "10.20.0.0/24"}}) in ways
    assert ([8888, 8887, 8080], KUBEFLOW) in ways
    assert ([8333], KUBEFLOW) in ways
    assert ([443, 6443], {"ipBlock": {"cidr": "0.0.0.0/0"}}) in ways
    assert ([8443], {"ipBlock": {"cidr": "10.9.0.1/32"}}) in ways
    assert ([9443], {"ipBlock": {"cidr": "10.9.0.2/32"}}) in ways
    assert ([3128], {"ipBlock": {"cidr": "10.9.0.3/32"}}) in ways
    assert len(ways) == 9  # and cluster DNS, and MLflow
    jobs = find(objects, "NetworkPolicy", "saferlhf-train-jobs")["spec"]["egress"]
    assert {"to": [{"ipBlock": {"cidr": "10.9.0.3/32"}}], "ports": [{"port": 3128}]} in jobs
    closed = render(platform_values("on-prem", networkPolicy=others | {"models": {"to": [], "port": 3128}}))
    for name in ("saferlhf-steps", "saferlhf-train-jobs"):
        rules = find(closed, "NetworkPolicy", name)["spec"]["egress"]
        assert not [rule for rule in rules if rule.get("ports") == [{"port": 3128}]]


def test_without_network_policies_there_are_none() -> None:
    objects = render(platform_values("gke", networkPolicy={"enabled": False}))
    assert not names(objects, "NetworkPolicy")
    steps_free = render(platform_values("gke", networkPolicy={"steps": False}))
    assert not names(steps_free, "NetworkPolicy") & {"saferlhf-steps", "saferlhf-train-jobs"}


def test_the_platform_config_map_holds_the_addresses_that_steps_read() -> None:
    assert find(rendered("try"), "ConfigMap", "saferlhf-platform")["data"] == {
        "AWS_ENDPOINT_URL": "http://saferlhf-s3.team-a.svc.cluster.local:8333",
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_TRACKING_URI": "http://saferlhf-mlflow.team-a.svc.cluster.local:5000",
        "SAFERLHF_STORE_URI": "s3://saferlhf",
    }
    assert "AWS_ENDPOINT_URL" not in find(rendered("eks"), "ConfigMap", "saferlhf-platform")["data"]


@pytest.mark.parametrize(
    ("platform", "endpoint", "plain", "credentials"),
    [
        ("eks", "s3.eu-west-1.amazonaws.com", False, {"fromEnv": True}),
        ("gke", "seaweedfs.kubeflow.svc.cluster.local:8333", True, None),
        ("try", "saferlhf-s3.team-a.svc.cluster.local:8333", True, None),
    ],
)
def test_kfps_launcher_is_told_where_the_store_is(
    platform: str, endpoint: str, plain: bool, credentials: dict[str, Any] | None
) -> None:
    objects = render(platform_values(platform, kfp={"launcher": {"create": True}}))
    data = find(objects, "ConfigMap", "kfp-launcher")["data"]
    store = find(rendered(platform), "ConfigMap", "saferlhf-platform")["data"]["SAFERLHF_STORE_URI"]
    keys = {"secretName": "saferlhf-s3", "accessKeyKey": "AWS_ACCESS_KEY_ID", "secretKeyKey": "AWS_SECRET_ACCESS_KEY"}
    default = yaml.safe_load(data["providers"])["s3"]["default"]
    assert data["defaultPipelineRoot"] == f"{store}/kfp"
    assert (default["endpoint"], default["disableSSL"], default["forcePathStyle"]) == (endpoint, plain, plain)
    assert default["credentials"] == (credentials or {"fromEnv": False, "secretRef": keys})
    rules = find(objects, "Role", "saferlhf-steps")["rules"]
    readable = [rule["resourceNames"] for rule in rules if rule["resources"] == ["secrets"]]
    assert readable == ([] if credentials else [["saferlhf-s3"]])
    egress = find(objects, "NetworkPolicy", "saferlhf-steps")["spec"]["egress"]
    assert not [rule for rule in egress if rule["ports"] == [{"port": 8333}] and rule["to"] == [KUBEFLOW]]


@each_platform
def test_kubeflows_own_launcher_configuration_is_left_alone(platform: str) -> None:
    """Kubeflow 2.17 has a kfp-launcher in each profile and in its own namespace: Helm would refuse to install."""
    objects = rendered(platform)
    assert "kfp-launcher" not in names(objects, "ConfigMap")
    egress = find(objects, "NetworkPolicy", "saferlhf-steps")["spec"]["egress"]
    assert {"to": [KUBEFLOW], "ports": [{"port": 8333}]} in egress
    keyless = render(platform_values("eks", kfp={"launcher": {"existingSecret": ""}}))
    assert not [rule for rule in find(keyless, "Role", "saferlhf-steps")["rules"] if rule["resources"] == ["secrets"]]


def test_iam_roles_are_on_the_accounts_of_steps_and_of_mlflow() -> None:
    for name, role in (("saferlhf", "saferlhf-steps"), ("saferlhf-mlflow", "saferlhf-mlflow")):
        annotations = find(rendered("eks"), "ServiceAccount", name)["metadata"]["annotations"]
        assert annotations == {"eks.amazonaws.com/role-arn": f"arn:aws:iam::111122223333:role/{role}"}
    assert "saferlhf" not in names(rendered("on-prem"), "ServiceAccount")


def test_mlflow_with_a_database_is_migrated_before_it_is_upgraded() -> None:
    objects = rendered("eks")
    job = find(objects, "Job", "saferlhf-mlflow-migrate")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert find(objects, "PodDisruptionBudget", "saferlhf-mlflow")["spec"]["maxUnavailable"] == 1
    server = find(objects, "Deployment", "saferlhf-mlflow")["spec"]
    assert (server["replicas"], server["strategy"]["type"]) == (2, "RollingUpdate")
    for spec in (job["spec"]["template"]["spec"], server["template"]["spec"]):
        uri = {"name": "saferlhf-mlflow-database", "key": "uri"}
        assert {"name": "MLFLOW_BACKEND_STORE_URI", "valueFrom": {"secretKeyRef": uri}} in spec["containers"][0]["env"]
    assert "initContainers" not in server["template"]["spec"]


def test_mlflow_with_sqlite_is_one_server_that_migrates_itself() -> None:
    objects = rendered("try")
    spec = find(objects, "Deployment", "saferlhf-mlflow")["spec"]
    assert spec["strategy"]["type"] == "Recreate"
    assert spec["template"]["spec"]["initContainers"][0]["name"] == "migrate"
    claim = find(objects, "PersistentVolumeClaim", "saferlhf-mlflow")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert "PodDisruptionBudget" not in {entry["kind"] for entry in objects}


def test_mlflow_of_somebody_else() -> None:
    mlflow = {"enabled": False, "trackingUri": "https://mlflow.example.com:8443", "existingLogin": "saferlhf-mlflow"}
    objects = render(platform_values("eks", mlflow=mlflow))
    assert names(objects, "Deployment") == set()
    data = find(objects, "ConfigMap", "saferlhf-platform")["data"]
    assert data["MLFLOW_TRACKING_URI"] == "https://mlflow.example.com:8443"
    (container,) = find(objects, "Pod", "saferlhf-test-mlflow")["spec"]["containers"]
    assert {"secretRef": {"name": "saferlhf-mlflow"}} in container["envFrom"]
    assert {"ports": [{"port": 8443}]} in find(objects, "NetworkPolicy", "saferlhf-steps")["spec"]["egress"]


def test_the_upload_has_the_pipeline_byte_for_byte(tmp_path: Path) -> None:
    text = "# <kfp> & 'co'\nname: {{inputs}}\nunicode: ü\n\n"
    objects = render(platform_values("eks", pipeline={"file": text}))
    assert find(objects, "ConfigMap", "saferlhf-pipeline")["data"]["pipeline.yaml"] == text
    job = find(objects, "Job", "saferlhf-upload")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "post-install,post-upgrade"
    (upload,) = job["spec"]["template"]["spec"]["initContainers"]
    assert upload["command"] == ["saferlhf", "upload", "/pipeline/pipeline.yaml"]
    assert upload["args"] == ["--version=0.1.0"]
    theirs = render(platform_values("eks", pipeline={"file": "", "existingConfigMap": "mine", "versionName": "v7"}))
    assert "saferlhf-pipeline" not in names(theirs, "ConfigMap")
    spec = find(theirs, "Job", "saferlhf-upload")["spec"]["template"]["spec"]
    assert {"name": "pipeline", "configMap": {"name": "mine"}} in spec["volumes"]
    assert spec["initContainers"][0]["args"] == ["--version=v7"]
    assert "saferlhf-upload" not in names(render(platform_values("eks", pipeline={"file": ""})), "Job")


def test_a_schedule_becomes_a_file_that_the_job_applies(tmp_path: Path) -> None:
    schedule = {"enabled": True, "cron": "0 30 1 * * 0", "seed": 10_000_000, "settings": ["ppo.steps=2"]}
    objects = render(platform_values("eks", schedule=schedule))
    spec = find(objects, "Job", "saferlhf-upload")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["command"] == ["saferlhf", "schedule", "apply"]
    assert container["args"] == ["--file=/schedules/schedules.yaml"]
    assert {"name": "schedules", "configMap": {"name": "saferlhf-schedules"}} in spec["volumes"]
    assert {"name": "schedules", "mountPath": "/schedules", "readOnly": True} in container["volumeMounts"]
    file = tmp_path / "schedules.yaml"
    file.write_text(find(objects, "ConfigMap", "saferlhf-schedules")["data"]["schedules.yaml"])
    (read,) = read_schedules(file)
    assert (read.name, read.cron, read.profile, read.seed) == ("safe-rlhf", "0 30 1 * * 0", "smol", 10_000_000)
    assert read.settings == ["store.uri=s3://example-saferlhf", "ppo.steps=2"]
    assert (read.version, read.service_account) == ("/pipeline/pipeline.yaml", "saferlhf")


def test_without_a_schedule_the_job_removes_what_there_was() -> None:
    objects = render(platform_values("eks"))
    (container,) = find(objects, "Job", "saferlhf-upload")["spec"]["template"]["spec"]["containers"]
    assert [*container["command"], *container["args"]] == [
        *("saferlhf", "schedule", "delete"),
        *("safe-rlhf", "--ignore-missing"),
    ]
    assert "saferlhf-schedules" not in names(objects, "ConfigMap")


def test_with_profiles_the_upload_carries_a_token_for_kfp_alone() -> None:
    spec = find(rendered("eks"), "Job", "saferlhf-upload")["spec"]["template"]["spec"]
    (token,) = [volume["projected"]["sources"] for volume in spec["volumes"] if "projected" in volume]
    assert token[0]["serviceAccountToken"]["audience"] == "pipelines.kubeflow.org"
    environment = {variable["name"]: variable["value"] for variable in spec["containers"][0]["env"]}
    assert environment["KFP_NAMESPACE"] == NAMESPACE
    alone = find(rendered("try"), "Job", "saferlhf-upload")["spec"]["template"]["spec"]
    assert not any("projected" in volume for volume in alone["volumes"])
    assert {variable["name"] for variable in alone["containers"][0]["env"]} == {"HOME", "KFP_HOST"}


@each_platform
def test_helm_test_asks_each_service_from_within(platform: str) -> None:
    tests = {entry["metadata"]["name"]: entry for entry in rendered(platform) if entry["kind"] == "Pod"}
    assert set(tests) == {"saferlhf-test-s3", "saferlhf-test-mlflow", "saferlhf-test-kfp"}
    for name, pod in tests.items():
        assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
        assert pod["spec"]["containers"][0]["command"] == ["saferlhf", "doctor", name.rpartition("-")[2]]


def test_the_keys_made_for_trying_out_are_long_and_new_each_time() -> None:
    """Offline, Helm's `lookup` finds nothing; `test_chart_upgrade.py` shows that a cluster's keys are kept."""
    first, second = (find(render(platform_values("try")), "Secret", "saferlhf-s3") for _ in range(2))
    assert first["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert [len(base64.b64decode(value)) for value in first["data"].values()] == [20, 40]
    assert first["data"] != second["data"]
    own = render(platform_values("try", seaweedfs={"existingSecret": "mine"}))
    assert not names(own, "Secret")
    (container,) = find(own, "StatefulSet", "saferlhf-s3")["spec"]["template"]["spec"]["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "mine"}}]


def test_priority_and_queue_only_where_they_are_asked_for() -> None:
    objects = render(platform_values("on-prem", priorityClass={"value": 5_000_000}))
    for kind in ("PriorityClass", "WorkloadPriorityClass"):
        assert find(objects, kind, "saferlhf")["value"] == 5_000_000
    queue = find(objects, "LocalQueue", "saferlhf")
    assert (queue["apiVersion"], queue["spec"]) == ("kueue.x-k8s.io/v1beta2", {"clusterQueue": "gpus"})
    without = render(platform_values("on-prem", kueue={"create": False}))
    assert (names(without, "PriorityClass"), names(without, "WorkloadPriorityClass")) == ({"saferlhf"}, set())
    assert not {"PriorityClass", "WorkloadPriorityClass", "LocalQueue"} & {entry["kind"] for entry in rendered("try")}


def test_the_servers_have_the_priority_class_and_no_hook_waits_for_one_that_is_not_there() -> None:
    """A hook before the install would be refused: the class is made with the release's other objects."""
    objects = render(platform_values("try", priorityClass={"name": "theirs"}))
    classes = {pod.name: pod.spec.get("priorityClassName") for pod in pods(objects)}
    servers = {"Deployment/saferlhf-mlflow", "StatefulSet/saferlhf-s3"}
    assert {name for name, used in classes.items() if used == "theirs"} == servers
    assert {used for name, used in classes.items() if name not in servers} == {None}
    assert not names(objects, "PriorityClass"), "it is somebody else's"
    assert not any("priorityClassName" in pod.spec for pod in pods(rendered("eks")))


@each_platform
def test_queue_and_priority_of_a_shipped_platform_file_are_what_its_values_file_makes(platform: str) -> None:
    """A pod that names a class which is not there waits for ever."""
    pools = read_platform({"on-prem": "on_prem", "try": "local"}.get(platform, platform)).pools.values()
    assert {pool.queue for pool in pools if pool.queue} == names(rendered(platform), "LocalQueue")
    assert {pool.priority for pool in pools if pool.priority} == names(rendered(platform), "WorkloadPriorityClass")


def test_where_the_pods_may_run_and_other_images() -> None:
    toleration = {"key": "pool", "operator": "Equal", "value": "system", "effect": "NoSchedule"}
    other = IMAGE.replace("service", "other")
    more = {
        "nodeSelector": {"pool": "system"},
        "tolerations": [toleration],
        "imagePullSecrets": ["registry"],
        "mlflow": {"image": other, "sqlite": {"storageClass": "fast"}},
        "seaweedfs": {"image": other, "storageClass": "fast"},
    }
    objects = render(platform_values("try", **more))
    for pod in pods(objects):
        assert pod.spec["nodeSelector"] == {"pool": "system"}
        assert pod.spec["tolerations"] == [toleration]
        assert pod.spec["imagePullSecrets"] == [{"name": "registry"}]
        servers = pod.name in {"Deployment/saferlhf-mlflow", "StatefulSet/saferlhf-s3"}
        assert {container["image"] for container in pod.containers} == {other if servers else IMAGE}
    assert find(objects, "ServiceAccount", "saferlhf")["imagePullSecrets"] == [{"name": "registry"}], "of the steps"
    assert find(objects, "PersistentVolumeClaim", "saferlhf-mlflow")["spec"]["storageClassName"] == "fast"
    (claim,) = find(objects, "StatefulSet", "saferlhf-s3")["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["storageClassName"] == "fast"


@each_platform
def test_the_notes_say_what_to_do_next(platform: str) -> None:
    notes = render_text(platform_values(platform))["saferlhf/templates/NOTES.txt"]
    assert "helm test saferlhf --namespace team-a --logs" in notes
    assert ("for trying out only" in notes) == (platform == "try")
    assert (
        "No pipeline was uploaded"
        in render_text(platform_values(platform, pipeline={"file": ""}))["saferlhf/templates/NOTES.txt"]
    )
    assert "schedule" not in notes
    scheduled = render_text(platform_values(platform, schedule={"enabled": True}))["saferlhf/templates/NOTES.txt"]
    assert "saferlhf schedule delete safe-rlhf --ignore-missing" in scheduled


def test_the_package_holds_the_values_files_and_renders_the_same(tmp_path: Path) -> None:
    archive = helm.package(CHART, destination=tmp_path)
    values = platform_values("eks")
    with helm.Chart.load(archive) as chart:
        packed = chart.render(values, name="saferlhf", namespace=NAMESPACE)
        assert {f"values-{platform}.yaml" for platform in PLATFORMS} <= {file["name"] for file in chart.files}
    assert packed == render_text(values)


def test_the_account_of_served_policies_is_the_one_that_the_settings_name() -> None:
    role = {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/reader"}
    objects = render(platform_values("eks", serving={"create": True, "annotations": role, "existingSecret": "keys"}))
    account = find(objects, "ServiceAccount", ServingSettings().service_account)
    assert (account["metadata"]["annotations"], account["secrets"]) == (role, [{"name": "keys"}])
    assert account["automountServiceAccountToken"] is False
    subjects = [s["name"] for entry in objects if entry["kind"] == "RoleBinding" for s in entry["subjects"]]
    assert account["metadata"]["name"] not in subjects
    assert ServingSettings().service_account not in names(rendered("eks"), "ServiceAccount")
