"""`saferlhf doctor`: is what a run needs really there, from here, with these keys?

Services are found by the environment that steps have: SAFERLHF_STORE_URI, AWS_*, MLFLOW_TRACKING_URI, KFP_*; the
cluster by the pod's service account or by kubectl's configuration. The rest is this machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import SaferlhfError, SettingsError
from components.foundation.tracking import Tracker
from pipelines.doctor.cluster_rights import check_rights
from pipelines.doctor.findings import Finding
from pipelines.doctor.machine import check_cache, check_disk, check_gpus, check_shm
from pipelines.kubeflow.client import EXPERIMENT, PIPELINE, access_from, connect
from pipelines.kubeflow.versions import count_versions


@dataclass(frozen=True)
class Patient:
    """What is examined: the environment of a process, and the work folder of its runs."""

    environment: Mapping[str, str]
    work_dir: Path = Path("runs")


def examine(names: Sequence[str], patient: Patient) -> list[Finding]:
    """What each check finds, in the order of `names`; without names all of them, and those that are not set up pass.

    Raises:
        SettingsError: a name is not one of `CHECKS`.
    """
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        raise SettingsError(f"there is no check {unknown[0]!r}: name some of {', '.join(CHECKS)}")
    findings = []
    for name in names or CHECKS:
        try:
            finding = CHECKS[name](patient)
        except SaferlhfError as error:
            finding = Finding("failed", str(error))
        if names and finding.result == "skipped":  # whoever names it needs it
            finding = Finding("failed", finding.found, finding.to_do)
        findings.append(Finding(finding.result, finding.found, finding.to_do, name))
    return findings


def well(findings: Sequence[Finding]) -> bool:
    """Whether nothing that a run needs is broken."""
    return all(finding.result != "failed" for finding in findings)


def lines(findings: Sequence[Finding]) -> list[str]:
    """One line for each finding."""
    words = {"failed": "FAILED"}
    return [f"{f.name}: {words.get(f.result, f.result)}: {f.sentence}" for f in findings]


def table(findings: Sequence[Finding]) -> str:
    """A row for each finding; below it, behind an arrow, what to do."""
    name_width = max(len("check"), *(len(finding.name) for finding in findings))
    rows = [("check", "result", "what was found"), *((f.name, f.result, f.found) for f in findings)]
    to_do = ["", *(finding.to_do for finding in findings)]
    shown = []
    for (name, result, found), advice in zip(rows, to_do, strict=True):
        shown.append(f"{name:<{name_width}}  {result:<7}  {found}")
        shown += [f"{'':<{name_width}}  {'':<7}  -> {advice}"] if advice else []
    return "\n".join(shown)


def as_json(findings: Sequence[Finding]) -> str:
    """The findings for a program: a list of objects with name, result, found, to_do."""
    return json.dumps([asdict(finding) for finding in findings], indent=2)


def _s3(patient: Patient) -> Finding:
    uri = patient.environment.get("SAFERLHF_STORE_URI", "")
    if not uri:
        return _not_set("SAFERLHF_STORE_URI", "starts a store of its own or uses that of AWS_ENDPOINT_URL")
    CheckpointStore(uri).probe()
    return Finding("ok", f"{uri} can be written, and conditional writes are honoured")


def _mlflow(patient: Patient) -> Finding:
    uri = patient.environment.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        return _not_set("MLFLOW_TRACKING_URI", "starts an MLflow of its own")
    Tracker(uri, EXPERIMENT).check()
    return Finding("ok", f"{uri} answers queries")


def _kfp(patient: Patient) -> Finding:
    environment = patient.environment
    if not any(name in environment for name in ("KFP_HOST", "KF_PIPELINES_ENDPOINT", "KUBERNETES_SERVICE_HOST")):
        return _not_set("KFP_HOST", "runs without Kubeflow")
    access = access_from(environment)
    versions = count_versions(connect(access))
    return Finding("ok", f"{access.host} holds {versions} version{'' if versions == 1 else 's'} of {PIPELINE}")


def _not_set(name: str, what_a_run_does: str) -> Finding:
    return Finding(
        "skipped",
        f"{name} is not set",
        f"not needed for `saferlhf run`, which {what_a_run_does}; to reach a cluster's, export it, as the chart does "
        "in its pods",
    )


CHECKS: dict[str, Callable[[Patient], Finding]] = {
    "s3": _s3,
    "mlflow": _mlflow,
    "kfp": _kfp,
    "cluster": lambda patient: check_rights(patient.environment),
    "shm": lambda _: check_shm(),
    "disk": lambda patient: check_disk(patient.work_dir),
    "cache": lambda patient: check_cache(patient.environment.get("SAFERLHF_CACHE", "")),
    "gpus": lambda _: check_gpus(),
}
"""What can be examined, each by a function that says in a few words what it found."""
