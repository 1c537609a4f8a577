"""Runs the pipeline with every step in a container of its own image: KFP's DockerRunner on podman's socket.

A program of its own, because components take the names of their images from the environment when they are imported:

    python -m tests.containers.pipeline_in_containers '<StepContainers as JSON>'

DockerRunner takes a container that has gone before it could ask for one that did well. So nothing here is taken from
its word: `run_pipeline` asks podman for every container's exit status, and its caller looks for every stage's commit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.containers.podman import FinishedContainer, Podman

LOG_TAIL_LINES = 25


@dataclass(frozen=True)
class StepContainers:
    """How steps run.

    Attributes:
        network: podman's network of the containers.
        environment: of the containers; it holds the S3 keys.
        label: value of the label `saferlhf-run` on every container.
        pipeline_root: folder for the outputs that KFP reads, mounted into the containers.
        rounds: of the pipeline.
        arguments: of the pipeline.
    """

    network: str
    environment: dict[str, str]
    label: str
    pipeline_root: str
    rounds: int
    arguments: dict[str, str | int]


class StepFailedError(Exception):
    """A step's container ended with another status than 0, or the pipeline ended before its time."""


def run_pipeline(podman: Podman, images: Mapping[str, str], steps: StepContainers) -> list[FinishedContainer]:
    """Run every step; returns the containers in the order of their start.

    Args:
        images: `SAFERLHF_..._IMAGE` -> image.

    Raises:
        StepFailedError: naming the image and the exit status, with the end of the output.
    """
    started = time.time()
    command = [sys.executable, "-m", "tests.containers.pipeline_in_containers", json.dumps(asdict(steps))]
    with podman.docker_socket() as docker_host:
        environment = {**os.environ, **images, "DOCKER_HOST": docker_host}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=1800)
    containers = podman.finished({"saferlhf-run": steps.label}, since=started)
    # the steps' own words; what KFP says on stderr when a container has failed is about its consequences
    tail = "\n".join([*done.stdout.splitlines()[-LOG_TAIL_LINES:], *done.stderr.splitlines()[-1:]])
    for number, container in enumerate(containers, start=1):
        if container.exit_code:
            raise StepFailedError(
                f"container {number}, of {container.image}, ended with status {container.exit_code}:\n{tail}"
            )
    if done.returncode:
        raise StepFailedError(f"after {len(containers)} containers, KFP ended with status {done.returncode}:\n{tail}")
    return containers


def main(steps: StepContainers) -> None:
    """Let KFP run the pipeline, with the tightest containers that its steps can work in."""
    from kfp import local

    from pipelines.safe_rlhf import build_pipeline

    Path(steps.pipeline_root).chmod(0o777)  # the steps' user is not ours
    runner = local.DockerRunner(
        environment=steps.environment,
        network=steps.network,
        read_only=True,
        tmpfs={"/tmp": "size=2g,mode=1777"},
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        labels={"saferlhf-run": steps.label},
    )
    local.init(runner=runner, pipeline_root=steps.pipeline_root, raise_on_error=True)
    build_pipeline(steps.rounds)(**steps.arguments)


if __name__ == "__main__":
    main(StepContainers(**json.loads(sys.argv[1])))
