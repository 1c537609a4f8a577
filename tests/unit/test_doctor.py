"""`saferlhf doctor`: this machine, the rights on a cluster, and how it is told."""

from __future__ import annotations

import errno
import json
import os
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from components.foundation.errors import ClusterError, SettingsError
from pipelines.cli import app
from pipelines.doctor import machine
from pipelines.doctor.cluster_rights import RIGHTS, check_rights
from pipelines.doctor.examination import CHECKS, Patient, examine, table, well
from pipelines.doctor.findings import Finding
from pipelines.doctor.machine import check_cache, check_disk, check_gpus, check_shm
from tests.access_reviews import reviewer
from tests.unit.helm_chart import find, platform_values, render

GIB = 1024**3
Usage = namedtuple("Usage", "total used free percent")


def kubectl(tmp_path: Path, url: str, namespace: str | None = "team-a") -> dict[str, str]:
    """An environment whose kubectl is configured for that server."""
    context = {"cluster": "c", "user": "u"} | ({"namespace": namespace} if namespace else {})
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {"token": "the-token"}}],
        "contexts": [{"name": "here", "context": context}],
    }
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    return {"KUBECONFIG": str(tmp_path / "config")}


def test_every_right_is_asked_for_in_the_namespace(tmp_path: Path) -> None:
    with reviewer(lambda _: True) as (url, asked):
        finding = check_rights(kubectl(tmp_path, url), tmp_path)
    assert finding == Finding("ok", "all 10 rights that TrainJobs need are granted in namespace team-a")
    assert {right["token"] for right in asked} == {"Bearer the-token"}
    named = [(r["verb"], r.get("group", ""), r["resource"], r.get("subresource", "")) for r in asked]
    assert ("get", "", "pods", "log") in named
    assert ("patch", "trainer.kubeflow.org", "trainjobs", "") in named
    assert {right["namespace"] for right in asked} == {"team-a"}
    assert len(set(named)) == len(RIGHTS) == len(named)


def test_the_charts_role_grants_what_is_asked_for() -> None:
    rules = find(render(platform_values("eks")), "Role", "saferlhf")["rules"]
    granted = {(v, r, g) for rule in rules for v in rule["verbs"] for r in rule["resources"] for g in rule["apiGroups"]}
    assert {(right.verb, right.resource, right.group) for right in RIGHTS} <= granted


@pytest.mark.fault
def test_missing_rights_are_named_with_what_to_do(tmp_path: Path) -> None:
    with reviewer(lambda right: right["verb"] != "delete" and right.get("subresource") != "log") as (url, _):
        finding = check_rights(kubectl(tmp_path, url, namespace=None), tmp_path)
    assert finding.result == "failed"
    assert finding.found == (
        "in namespace default this account may not delete trainjobs.trainer.kubeflow.org, get pods/log"
    )
    assert "rbac.create=true" in finding.to_do


@pytest.mark.fault
def test_a_cluster_that_does_not_answer_is_an_error(tmp_path: Path) -> None:
    with reviewer(lambda _: True, status=401) as (url, _), pytest.raises(ClusterError, match="401 Unauthorized"):
        check_rights(kubectl(tmp_path, url), tmp_path)
    with pytest.raises(ClusterError, match=f"Kubernetes at {url} does not say"):
        check_rights(kubectl(tmp_path, url), tmp_path)
    (tmp_path / "config").write_text("{")
    with pytest.raises(ClusterError, match="configuration cannot be read"):
        check_rights({"KUBECONFIG": str(tmp_path / "config")}, tmp_path)


def test_without_a_cluster_there_are_no_rights_to_check(tmp_path: Path) -> None:
    assert check_rights({"HOME": str(tmp_path)}, tmp_path).result == "skipped"
    assert check_rights({"KUBECONFIG": str(tmp_path / "absent")}, tmp_path).result == "skipped"


@pytest.mark.parametrize(
    ("gib", "result"), [(0.0625, "warning"), (1, "ok")]
)  # 64 MiB is what a container gets if nobody asks for more
def test_row_30_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gib: float, result: str) -> None:
    monkeypatch.setattr(psutil, "disk_usage", lambda _: Usage(int(gib * GIB), 0, 0, 0))
    assert check_shm(tmp_path).result == result
    assert check_shm(tmp_path / "absent").result == "skipped"


@pytest.mark.parametrize(("gib", "result"), [(0.5, "failed"), (4, "warning"), (50, "ok")])
def test_row_30_disk_space_is_that_of_the_folder_that_will_be_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gib: float, result: str
) -> None:
    asked = []

    def usage(path: str) -> Usage:
        asked.append(path)
        return Usage(0, 0, int(gib * GIB), 0)

    monkeypatch.setattr(psutil, "disk_usage", usage)
    finding = check_disk(tmp_path / "not" / "yet")
    assert (finding.result, asked) == (result, [str(tmp_path)])
    assert ("--workdir" in finding.to_do) == (result != "ok")


@pytest.mark.fault
@pytest.mark.parametrize("reason", ["File name too long", "Permission denied"])
def test_a_folder_that_cannot_be_looked_at_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    folder = tmp_path / ("x" * 300)
    if reason == "Permission denied":  # root may look everywhere

        def forbidden(path: Path) -> bool:
            raise PermissionError(errno.EACCES, reason, str(path))

        monkeypatch.setattr(Path, "exists", forbidden)
    disk, cache = check_disk(folder), check_cache(str(folder))
    assert (disk.result, cache.result) == ("failed", "failed")
    assert f"cannot be used ({reason})" in disk.found and "--workdir" in disk.to_do
    assert f"cannot be written ({reason})" in cache.found and "SAFERLHF_CACHE" in cache.to_do


@pytest.mark.fault
def test_a_cache_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finding = check_cache(str(tmp_path / "file" / "cache"))
    assert (finding.result, "cannot be written (Not a directory)" in finding.found) == ("failed", True)
    assert "SAFERLHF_CACHE" in finding.to_do


def smi(tmp_path: Path, script: str) -> str:
    path = tmp_path / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "usable", "result", "words"),
    [
        ("echo 'NVIDIA L4, 23034 MiB'", 1, "ok", "1: NVIDIA L4, 23034 MiB"),
        ("echo 'NVIDIA L4, 23034 MiB'", None, "ok", "torch is not installed here"),
        (
            "echo 'NVIDIA L4, 1 MiB'; echo 'NVIDIA L4, 1 MiB'",
            0,
            "failed",
            "2: NVIDIA L4, 1 MiB; NVIDIA L4, 1 MiB; torch",
        ),
        ("echo 'no devices were found' >&2; exit 6", 0, "failed", "finds no GPU: no devices were found"),
    ],
)
def test_gpus_as_the_driver_and_torch_see_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, usable: int | None, result: str, words: str
) -> None:
    monkeypatch.setattr(machine, "_usable_gpus", lambda: usable)
    finding = check_gpus(smi(tmp_path, script))
    assert (finding.result, words in finding.found) == (result, True), finding


@pytest.mark.fault
def test_a_driver_that_hangs_is_said_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_SMI_SECONDS", 0.05)
    assert "has not answered" in check_gpus(smi(tmp_path, "exec sleep 60")).found


def test_a_machine_without_gpus_is_well(tmp_path: Path) -> None:
    assert check_gpus(str(tmp_path / "absent")) == Finding("ok", "none (no nvidia-smi): models train on the CPU")


def test_alone_every_check_is_made_and_what_is_not_set_up_is_no_fault(tmp_path: Path) -> None:
    findings = examine([], Patient({"HOME": str(tmp_path)}, tmp_path))
    assert [finding.name for finding in findings] == list(CHECKS)
    by_name = {finding.name: finding for finding in findings}
    assert [by_name[name].result for name in ("s3", "mlflow", "kfp", "cluster")] == ["skipped"] * 4
    assert by_name["s3"].found == "SAFERLHF_STORE_URI is not set"
    for name in ("s3", "mlflow", "kfp"):  # nothing is lacking for a first run
        assert by_name[name].to_do.startswith("not needed for `saferlhf run`, which ")
        assert "to reach a cluster's, export it" in by_name[name].to_do
    assert all(finding.to_do for finding in findings if finding.result in ("skipped", "failed"))


def test_what_is_named_is_needed(tmp_path: Path) -> None:
    (finding,) = examine(["cluster"], Patient({"HOME": str(tmp_path)}))
    assert finding.result == "failed"
    with pytest.raises(SettingsError, match="there is no check 'gpu': name some of s3, mlflow"):
        examine(["gpu"], Patient({}))


@pytest.mark.golden
def test_the_table_by_hand() -> None:
    findings = [Finding("ok", "it answers", name="s3"), Finding("failed", "it is off", "switch it on", name="mlflow")]
    assert table(findings).splitlines() == [
        "check   result   what was found",
        "s3      ok       it answers",
        "mlflow  failed   it is off",
        "                 -> switch it on",
    ]
    assert not well(findings)
    assert well([Finding("warning", ""), Finding("skipped", "")])


@pytest.mark.fault
def test_the_command_tells_programs_and_its_status_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("KFP_", "MLFLOW_", "SAFERLHF_", "KUBE"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    done = CliRunner().invoke(app, ["doctor", "disk", "kfp", "--json", "--workdir", str(tmp_path)])
    assert [(finding["name"], finding["result"]) for finding in json.loads(done.stdout)][1] == ("kfp", "failed")
    assert done.exit_code == 1
    done = CliRunner().invoke(app, ["doctor", "shm", "--json"])
    (finding,) = json.loads(done.stdout)
    assert finding.keys() == {"name", "result", "found", "to_do"}
    assert done.exit_code == (finding["result"] == "failed")
