"""Helm's `lookup` against a server on the loopback interface that speaks the Kubernetes API: discovery, and objects.

Helm asks the cluster in a dry run ("server"), so what it would apply comes back and nothing is kept here.
"""

from __future__ import annotations

import base64
import functools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import helm_python as helm
import pytest
import yaml

from tests.unit.helm_chart import CHART, NAMESPACE, find, names, platform_values, render

KUBECONFIG = """
apiVersion: v1
kind: Config
clusters: [{{name: test, cluster: {{server: '{url}'}}}}]
users: [{{name: test, user: {{}}}}]
contexts: [{{name: test, context: {{cluster: test, user: test}}}}]
current-context: test
"""
Objects = dict[str, dict[str, Any]]


def resource_of(kind: str) -> str:
    return f"{kind[:-1].lower()}ies" if kind.endswith("y") else f"{kind.lower()}s"


@functools.cache
def kinds_of_the_chart() -> frozenset[tuple[str, str]]:
    return frozenset((entry["apiVersion"], entry["kind"]) for entry in render(platform_values("try")))


def group_of(version: str) -> dict[str, Any]:
    name, _, number = version.partition("/")
    entry = {"groupVersion": version, "version": number}
    return {"name": name, "versions": [entry], "preferredVersion": entry}


def discovery(path: str) -> dict[str, Any] | None:
    """The API of a cluster that has just the kinds of the chart."""
    kinds = kinds_of_the_chart()
    if path == "/version":
        return {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups = sorted({version for version, _ in kinds if "/" in version})
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [group_of(version) for version in groups]}
    version = path.removeprefix("/apis/").removeprefix("/api/")
    found = [kind for group, kind in sorted(kinds) if group == version]
    resources = [{"name": resource_of(k), "kind": k, "namespaced": True, "verbs": ["get", "list"]} for k in found]
    return {"kind": "APIResourceList", "groupVersion": version, "resources": resources} if found else None


@contextmanager
def kubernetes(objects: Objects) -> Iterator[str]:
    """URL of an API server that holds these objects, by path; no other call than a read is answered."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            answer = objects.get(path) or discovery(path)
            empty_schema = path == "/openapi/v2"
            if path.endswith("/secrets"):  # where Helm keeps its releases
                answer = {"kind": "SecretList", "apiVersion": "v1", "metadata": {}, "items": []}
            missing = {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}
            content = b"" if empty_schema else json.dumps(answer or missing).encode()
            self.send_response(200 if answer or empty_schema else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Say nothing."""

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}"
    finally:
        httpd.shutdown()
        httpd.server_close()


def installed(objects: Objects, **more: Any) -> list[dict[str, Any]]:
    """What Helm would apply in a cluster that holds these objects."""
    with kubernetes(objects) as url:
        kubeconfig = KUBECONFIG.format(url=url)
        with helm.Config(kubeconfig_content=kubeconfig, namespace=NAMESPACE) as config:
            release = config.install(CHART, "saferlhf", platform_values("try", **more), dry_run="server")
    return [entry for entry in yaml.safe_load_all(release["manifest"]) if entry]


def test_the_keys_of_the_store_that_are_in_the_cluster_are_kept() -> None:
    data = {
        "AWS_ACCESS_KEY_ID": base64.b64encode(b"the-old-name").decode(),
        "AWS_SECRET_ACCESS_KEY": base64.b64encode(b"the-old-key").decode(),
    }
    owner = {"meta.helm.sh/release-name": "saferlhf", "meta.helm.sh/release-namespace": NAMESPACE}
    metadata = {"labels": {"app.kubernetes.io/managed-by": "Helm"}, "annotations": owner}
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "saferlhf-s3", "namespace": NAMESPACE, **metadata},
        "data": data,
    }
    path = f"/api/v1/namespaces/{NAMESPACE}/secrets/saferlhf-s3"
    assert find(installed({path: secret}), "Secret", "saferlhf-s3")["data"] == data


def test_in_an_empty_cluster_keys_are_made() -> None:
    data = find(installed({}), "Secret", "saferlhf-s3")["data"]
    assert [len(base64.b64decode(value)) for value in data.values()] == [20, 40]


LAUNCHER = {
    "apiVersion": "v1",
    "kind": "ConfigMap",
    "metadata": {"name": "kfp-launcher", "namespace": NAMESPACE},
    "data": {"defaultPipelineRoot": "minio://mlpipeline/private-artifacts/team-a/v2/artifacts"},
}
"""As Kubeflow's profile controller makes it."""


def test_beside_kubeflows_own_launcher_configuration_the_chart_can_be_installed() -> None:
    path = f"/api/v1/namespaces/{NAMESPACE}/configmaps/kfp-launcher"
    assert "kfp-launcher" not in names(installed({path: LAUNCHER}), "ConfigMap")


@pytest.mark.fault
def test_kubeflows_own_launcher_configuration_is_not_taken_without_a_word() -> None:
    path = f"/api/v1/namespaces/{NAMESPACE}/configmaps/kfp-launcher"
    with pytest.raises(helm.HelmError, match=r'"kfp-launcher".* exists and cannot be imported'):
        installed({path: LAUNCHER}, kfp={"launcher": {"create": True}})
