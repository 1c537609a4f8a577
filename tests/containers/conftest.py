"""Images built here, on a base made here, and servers that their containers reach."""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from pipelines.local.services import Endpoints, local_services
from tests.containers.forwarder import forwarded
from tests.containers.pip_settings import pip_settings
from tests.containers.podman import ContainersUnavailableError, Podman

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "images" / "build.sh"
SUBNET, HOST_ADDRESS = "10.89.77.0/24", "10.89.77.1"
BASE = "localhost/saferlhf-test/base:bookworm"
SECRET = "password-of-a-package-index"
WITH_ROLLOUT = os.environ.get("SAFERLHF_TEST_ROLLOUT") == "1"
"""Build the rollout image, too: it takes 25 GB of disk."""
NAMES = ("service", "trainer", "rollout") if WITH_ROLLOUT else ("service", "trainer")
needs_rollout = pytest.mark.skipif(not WITH_ROLLOUT, reason="make images-test ROLLOUT=1 builds the rollout image")
_MIRROR = "http://deb.debian.org/debian"
_PACKAGES = "python3,python3-venv,ca-certificates"  # Debian 12 has Python 3.11


@dataclass(frozen=True)
class Images:
    """The images under test, and the commit that they were built from."""

    revision: str

    @property
    def service(self) -> str:
        return image_name("service")

    @property
    def trainer(self) -> str:
        return image_name("trainer")

    @property
    def rollout(self) -> str:
        return image_name("rollout")


def image_name(name: str) -> str:
    return f"localhost/saferlhf/{name}:test"


@dataclass(frozen=True)
class Servers:
    """S3 and MLflow: as this process reaches them, and the environment by which containers do."""

    endpoints: Endpoints
    network: str
    container_environment: dict[str, str]


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Podman:
    try:
        return Podman(tmp_path_factory.mktemp("podman"))
    except ContainersUnavailableError as error:
        pytest.exit(f"images-test: {error}", returncode=1)


@pytest.fixture(scope="session")
def base_image(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> str:
    """SAFERLHF_TEST_BASE, or a small Debian with its own Python, made once on a machine: it takes no registry."""
    given = os.environ.get("SAFERLHF_TEST_BASE")
    if given:
        return given
    if podman("image", "exists", BASE, check=False).returncode:
        folder = tmp_path_factory.mktemp("base")
        command = ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", "bookworm", str(folder), _MIRROR]
        environment = os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        archive = folder.with_suffix(".tar")
        subprocess.run(["tar", "-C", str(folder), "-cf", str(archive), "."], check=True)
        podman("import", str(archive), BASE)
        archive.unlink()
    return BASE


@pytest.fixture(scope="session")
def images(podman: Podman, base_image: str, tmp_path_factory: pytest.TempPathFactory) -> Images:
    """By `make images`' own script; layers that are there already are used."""
    pip_conf, volumes = pip_settings(tmp_path_factory.mktemp("pip"))
    pip_conf.write_text(f"{pip_conf.read_text()}# {SECRET}\n")
    revision = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = podman.environment | {
        "BUILDER": "podman",
        "REGISTRY": "localhost",
        "TAG": "test",
        "REVISION": revision,
        "SERVICE_BASE": base_image,
        "TRAINER_BASE": base_image,
        "ROLLOUT_BASE": base_image,
        "PIP_CONF": str(pip_conf),
        "BUILD_OPTIONS": " ".join(["--network=host", *volumes]),
    }
    for name in NAMES:
        started = time.monotonic()
        done = subprocess.run(
            [str(BUILD), "build", name], capture_output=True, text=True, env=environment, check=False, timeout=3600
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        print(f"{done.stdout.splitlines()[-1]}, {time.monotonic() - started:.0f} s")
    return Images(revision)


@pytest.fixture(scope="session")
def servers(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Both listen on 127.0.0.1; two ports of a network without a way out lead there."""
    work_dir = tmp_path_factory.mktemp("servers")
    name = f"saferlhf-test-{uuid.uuid4().hex[:8]}"
    with (
        local_services(work_dir) as endpoints,
        podman.network_to_host(name, SUBNET, HOST_ADDRESS),
        forwarded(HOST_ADDRESS, [port(endpoints.s3_url), port(endpoints.tracking_uri)]),
        pytest.MonkeyPatch.context() as patch,
    ):
        for variable, value in endpoints.environment.items():
            patch.setenv(variable, value)
        patch.setenv("SAFERLHF_CACHE", str(work_dir / "cache"))
        there = {
            "AWS_ENDPOINT_URL": f"http://{HOST_ADDRESS}:{port(endpoints.s3_url)}",
            "MLFLOW_TRACKING_URI": f"http://{HOST_ADDRESS}:{port(endpoints.tracking_uri)}",
        }
        keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
        yield Servers(
            endpoints, name, there | {key: endpoints.environment[key] for key in keys} | {"OMP_NUM_THREADS": "1"}
        )


def port(url: str) -> int:
    """The port of an URL that names one."""
    found = urlsplit(url).port
    assert found is not None, url
    return found
