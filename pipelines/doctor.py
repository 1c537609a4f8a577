"""`saferlhf doctor`: does what a run needs really answer, from here, with these keys?

Addresses and keys come from the environment that steps have: SAFERLHF_STORE_URI, AWS_*, MLFLOW_TRACKING_URI, KFP_*.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import SaferlhfError, SettingsError
from components.foundation.tracking import Tracker
from pipelines.kubeflow.client import EXPERIMENT, PIPELINE, access_from, connect
from pipelines.kubeflow.versions import count_versions


def examine(names: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], bool]:
    """(one line for each service, whether all are well).

    Raises:
        SettingsError: a name is not one of `SERVICES`.
    """
    unknown = [name for name in names if name not in SERVICES]
    if unknown:
        raise SettingsError(f"there is no service {unknown[0]!r}: name one of {', '.join(SERVICES)}")
    lines, well = [], True
    for name in names:
        try:
            lines.append(f"{name}: ok: {SERVICES[name](environment)}")
        except SaferlhfError as error:
            lines.append(f"{name}: FAILED: {error}")
            well = False
    return lines, well


def _s3(environment: Mapping[str, str]) -> str:
    uri = _needed(environment, "SAFERLHF_STORE_URI")
    CheckpointStore(uri).probe()
    return f"{uri} can be written, and conditional writes are honoured"


def _mlflow(environment: Mapping[str, str]) -> str:
    uri = _needed(environment, "MLFLOW_TRACKING_URI")
    Tracker(uri, EXPERIMENT).check()
    return f"{uri} answers queries"


def _kfp(environment: Mapping[str, str]) -> str:
    access = access_from(environment)
    versions = count_versions(connect(access))
    return f"{access.host} holds {versions} version{'' if versions == 1 else 's'} of {PIPELINE}"


def _needed(environment: Mapping[str, str], name: str) -> str:
    value = environment.get(name, "")
    if not value:
        raise SettingsError(f"{name} is not set: the chart sets it in its pods; elsewhere, export it")
    return value


SERVICES: dict[str, Callable[[Mapping[str, str]], str]] = {"s3": _s3, "mlflow": _mlflow, "kfp": _kfp}
"""What can be examined, each by a function that says in a few words what it found."""
