"""Versions of the pipeline on the server: a compiled pipeline goes up once, and is found again."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.foundation.errors import SettingsError
from pipelines.kubeflow.client import PIPELINE, KubeflowClient, equals, pages
from pipelines.kubeflow.compiled_pipeline import (
    CompiledPipeline,
    pipeline_of,
    read_bytes,
    read_compiled,
    refuse_example_images,
)

LATEST = "latest"
_SHOWN = 5


@dataclass(frozen=True)
class PipelineVersion:
    """A version on the server; `new` when this call made it."""

    pipeline_id: str
    version_id: str
    name: str
    new: bool


def upload_pipeline(client: KubeflowClient, file: Path, version_name: str) -> PipelineVersion:
    """Upload a compiled pipeline as a new version, unless a version of the same bytes is there.

    Args:
        version_name: of a new version; the digest is added, so "0.1.0" becomes for instance "0.1.0-5f2c9a1e77b0".

    Raises:
        SettingsError: the file cannot be read, is no compiled pipeline of ours, or has the example images.
        ClusterError: the server cannot be reached or refuses a call.
    """
    refuse_example_images(read_compiled(file))
    description = _description(file)
    with client.explained(f"upload {file}"):
        pipeline_id = _pipeline_id(client) or _create_pipeline(client)
        for version in _newest_first(client, pipeline_id):
            if version.description == description:
                return PipelineVersion(pipeline_id, version.pipeline_version_id, version.display_name, new=False)
        name = f"{version_name}-{description.removeprefix('sha256:')[:12]}"
        with contextlib.redirect_stdout(None):  # the client prints a link of its own
            made = client.upload_pipeline_version(str(file), name, pipeline_id=pipeline_id, description=description)
    return PipelineVersion(pipeline_id, made.pipeline_version_id, name, new=True)


def find_version(client: KubeflowClient, wanted: str) -> tuple[PipelineVersion, CompiledPipeline]:
    """A version on the server, and what is in it.

    Args:
        wanted: "latest"; a version's name; or a compiled pipeline's file (.yaml), for the version of the same bytes.

    Raises:
        SettingsError: there is no such version; the message names those that there are.
        ClusterError: the server cannot be reached or refuses a call.
    """
    description = _description(Path(wanted)) if wanted.endswith((".yaml", ".yml")) else ""
    names = []
    with client.explained(f"find the version {wanted} of {PIPELINE}"):
        pipeline_id = _pipeline_id(client)
        for version in _newest_first(client, pipeline_id) if pipeline_id else ():
            if wanted in (LATEST, version.display_name) or (description and version.description == description):
                found = PipelineVersion(pipeline_id, version.pipeline_version_id, version.display_name, new=False)
                return found, pipeline_of(version.pipeline_spec, f"version {found.name}")
            names.append(version.display_name)
    there = f"the newest are {', '.join(names[:_SHOWN])}" if names else "there is none"
    advice = f"`saferlhf upload {wanted}` first" if description else "name one of them, or `saferlhf upload` one"
    raise SettingsError(f"{PIPELINE} has no version {wanted!r} in KFP, {there}: {advice}")


def version_names(client: KubeflowClient) -> dict[str, str]:
    """Names of the pipeline's versions on the server, by their ids."""
    with client.explained(f"list the versions of {PIPELINE}"):
        pipeline_id = _pipeline_id(client)
        versions = _newest_first(client, pipeline_id) if pipeline_id else ()
        return {str(version.pipeline_version_id): str(version.display_name) for version in versions}


def count_versions(client: KubeflowClient) -> int:
    """How many versions of the pipeline the server holds."""
    return len(version_names(client))


def _description(file: Path) -> str:
    return f"sha256:{hashlib.sha256(read_bytes(file)).hexdigest()}"


def _pipeline_id(client: KubeflowClient) -> str:
    found = client.list_pipelines(filter=equals(display_name=PIPELINE), namespace=client.namespace).pipelines or []
    return str(found[0].pipeline_id) if found else ""


def _create_pipeline(client: KubeflowClient) -> str:
    """A pipeline without a version: `client.upload_pipeline` would give the first version the pipeline's name."""
    wish = client.api_models.V2beta1Pipeline(name=PIPELINE, display_name=PIPELINE, namespace=client.namespace)
    return str(client.pipelines.pipeline_service_create_pipeline(pipeline=wish).pipeline_id)


def _newest_first(client: KubeflowClient, pipeline_id: str) -> Iterator[Any]:
    return pages(client.list_pipeline_versions, "pipeline_versions", pipeline_id=pipeline_id, sort_by="created_at desc")
