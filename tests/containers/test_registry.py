"""Push and pin, against a real registry on this machine."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.local.server_process import free_ports
from tests.containers.conftest import BUILD, ROOT
from tests.containers.podman import Podman

pytestmark = pytest.mark.containers

_CONFIGURATION = """
version: 0.1
log: {{level: error}}
storage: {{filesystem: {{rootdirectory: {folder}}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""


@pytest.fixture(scope="module")
def registry(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a registry that holds nothing yet."""
    folder, (port,) = tmp_path_factory.mktemp("registry"), free_ports(1)
    configuration = folder / "config.yml"
    configuration.write_text(_CONFIGURATION.format(folder=folder, port=port))
    with subprocess.Popen(["docker-registry", "serve", str(configuration)], stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 30
            while not answers(f"http://127.0.0.1:{port}/v2/"):
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()


@pytest.fixture
def pushed(podman: Podman, registry: str, tmp_path: Path) -> Iterator[str]:
    """A small image stands for the service image; what `push` prints about it."""
    archive = tmp_path / "image.tar"
    with tarfile.open(archive, "w") as tar:
        tar.addfile(tarfile.TarInfo("file"), io.BytesIO())
    image = f"{registry}/saferlhf/service:1"
    podman("import", str(archive), image)
    settings = {"BUILDER": "podman", "REGISTRY": registry, "TAG": "1", "REGISTRY_OPTIONS": "--tls-verify=false"}
    done = subprocess.run(
        [str(BUILD), "push", "service"], capture_output=True, text=True, env=podman.environment | settings, check=False
    )
    assert done.returncode == 0, done.stderr
    yield done.stdout.strip()
    podman("rmi", image)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def digest_in(registry: str, name: str, tag: str) -> str:
    """The digest that the registry itself gives a tag."""
    accept = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
    request = urllib.request.Request(f"http://{registry}/v2/{name}/manifests/{tag}", headers={"Accept": accept})
    with urllib.request.urlopen(request) as reply:
        return str(reply.headers["Docker-Content-Digest"])


def test_push_prints_the_digest_that_the_registry_has(registry: str, pushed: str) -> None:
    digest = digest_in(registry, "saferlhf/service", "1")
    assert pushed == f"--image-service {registry}/saferlhf/service@{digest}"


def test_pin_writes_the_digests_that_the_tags_have_now(
    podman: Podman, registry: str, pushed: str, tmp_path: Path
) -> None:
    """In a copy: comments stay, a tag without digest gets one, an old digest is replaced; a builder can pull them."""
    copy = tmp_path / "checkout" / "images"
    copy.mkdir(parents=True)
    shutil.copy(ROOT / "images" / "build.sh", copy)
    base = f"{registry}/saferlhf/service:1"
    (copy / "bases.env").write_text(f"# words\nSERVICE_BASE={base}\nTRAINER_BASE={base}@sha256:{'0' * 64}\n")
    environment = os.environ | {"REGISTRY_OPTIONS": "--tls-verify=false"}
    subprocess.run([str(copy / "build.sh"), "pin"], check=True, env=environment, stdout=subprocess.DEVNULL)
    pinned = f"{base}@{digest_in(registry, 'saferlhf/service', '1')}"
    assert (copy / "bases.env").read_text() == f"# words\nSERVICE_BASE={pinned}\nTRAINER_BASE={pinned}\n"
    podman("pull", "--tls-verify=false", pinned)
