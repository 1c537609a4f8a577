"""Podman, as the container tests need it: commands, its Docker-compatible socket, what its containers did."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

# Some machines do not allow podman's own, higher limits.
_CONFIGURATION = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]
[engine]
runtime = "runc"
events_logger = "file"
"""
_TOOLS = ("podman", "runc", "iptables", "debootstrap", "skopeo", "docker-registry")


class ContainersUnavailableError(Exception):
    """This machine cannot run the container tests; the message says what to install."""


@dataclass(frozen=True)
class FinishedContainer:
    """What podman recorded of a container. Times are epoch seconds: made, its process started, its process ended."""

    image: str
    exit_code: int
    created: float
    started: float
    ended: float


class Podman:
    """Podman with a configuration of its own.

    Args:
        folder: for the configuration and the socket.

    Raises:
        ContainersUnavailableError: a tool is missing, or this process is not root.
    """

    def __init__(self, folder: Path) -> None:
        missing = [tool for tool in _TOOLS if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin") is None]
        if missing:
            raise ContainersUnavailableError(
                f"{', '.join(missing)} not found: apt-get install --no-install-recommends "
                "podman buildah runc netavark iptables debootstrap skopeo docker-registry (on Debian), then try again"
            )
        if os.geteuid():
            raise ContainersUnavailableError("the container tests make a root file system and a network: run as root")
        configuration = folder / "containers.conf"
        configuration.write_text(_CONFIGURATION)
        self._socket = folder / "podman.sock"
        self.environment = {**os.environ, "CONTAINERS_CONF": str(configuration)}
        self.docker_host = f"unix://{self._socket}"

    def __call__(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a podman command; its errors are raised with what it printed."""
        done = subprocess.run(
            ["podman", *arguments], capture_output=True, text=True, env=self.environment, check=False, timeout=1800
        )
        if check and done.returncode:
            raise RuntimeError(f"podman {' '.join(arguments)}: exit status {done.returncode}\n{done.stderr}")
        return done

    @contextmanager
    def docker_socket(self) -> Iterator[str]:
        """Serve Docker's protocol for the block; yields DOCKER_HOST."""
        command = ["podman", "system", "service", "--time", "0", self.docker_host]
        with subprocess.Popen(command, env=self.environment, stderr=subprocess.DEVNULL) as service:
            try:
                while not self._socket.exists():
                    if service.poll() is not None:
                        raise RuntimeError(f"{' '.join(command)}: exit status {service.returncode}")
                yield self.docker_host
            finally:
                service.terminate()

    @contextmanager
    def network_to_host(self, name: str, subnet: str, gateway: str) -> Iterator[str]:
        """A network whose containers reach this machine, at `gateway`, and nothing else; yields its name."""
        self("network", "create", "--internal", "--disable-dns", "--subnet", subnet, "--gateway", gateway, name)
        try:
            yield name
        finally:
            self("network", "rm", "--force", name)

    def finished(self, labels: Mapping[str, str], since: float) -> list[FinishedContainer]:
        """Containers with these labels that ended after `since`, in the order of their start."""
        filters = [part for key, value in labels.items() for part in ("--filter", f"label={key}={value}")]
        lines = self("events", "--stream=false", "--since", str(int(since)), *filters, "--format", "json").stdout
        events: dict[str, dict[str, dict[str, str]]] = {}
        for event in map(json.loads, lines.splitlines()):
            events.setdefault(event["ID"], {})[event["Status"]] = event
        return [
            FinishedContainer(
                image=seen["died"]["Image"],
                exit_code=int(seen["died"].get("ContainerExitCode", 0)),  # podman leaves a zero out
                created=_seconds(seen["create"]["Time"]),
                started=_seconds(seen["start"]["Time"]),
                ended=_seconds(seen["died"]["Time"]),
            )
            for seen in events.values()
            if "died" in seen
        ]


def _seconds(time: str) -> float:
    """RFC 3339 with nanoseconds -> epoch seconds."""
    whole, _, fraction = time.removesuffix("Z").partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")
