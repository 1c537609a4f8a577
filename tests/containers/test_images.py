"""What is in the images, and what is not."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.containers.conftest import Images
from tests.containers.podman import Podman

pytestmark = pytest.mark.containers

NAMES = ("service", "trainer")
TIGHT = ("run", "--rm", "--network=none", "--read-only", "--tmpfs=/tmp", "--cap-drop=all")
COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "make", "nvcc")


def in_container(podman: Podman, image: str, script: str) -> str:
    """Output of a shell script in a read-only container without network and capabilities."""
    return podman(*TIGHT, "--security-opt=no-new-privileges", image, "sh", "-ec", script).stdout


def configuration(podman: Podman, image: str) -> dict[str, Any]:
    (description,) = json.loads(podman("image", "inspect", image).stdout)
    print(f"{image}: {description['Size'] / 1e6:.0f} MB")
    return dict(description["Config"])


@pytest.mark.parametrize("name", NAMES)
def test_the_user_is_a_number_and_not_root(podman: Podman, images: Images, name: str) -> None:
    image = getattr(images, name)
    assert configuration(podman, image)["User"] == "10001:10001"
    assert in_container(podman, image, "id -u; id -g; python3 -c 'import getpass; print(getpass.getuser())'").split() == [
        "10001",
        "10001",
        "saferlhf",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_labels_tell_source_version_and_licence(podman: Podman, images: Images, name: str) -> None:
    labels = configuration(podman, getattr(images, name))["Labels"]
    prefix = "org.opencontainers.image."
    assert labels[f"{prefix}revision"] == images.revision
    assert labels[f"{prefix}licenses"] == "Apache-2.0"
    assert re.fullmatch(r"\d+\.\d+\.\d+", labels[f"{prefix}version"])
    assert labels[f"{prefix}title"] == f"saferlhf {name}"


@pytest.mark.parametrize("name", NAMES)
def test_no_compiler_and_no_cache_is_left(podman: Podman, images: Images, name: str) -> None:
    script = f"for tool in {' '.join(COMPILERS)}; do command -v $tool || true; done; ls -A /root /build /installer || true"
    assert in_container(podman, getattr(images, name), script).replace("/root:", "").split() == []


@pytest.mark.parametrize("name", NAMES)
def test_no_layer_and_no_variable_holds_what_the_build_was_given(podman: Podman, images: Images, name: str) -> None:
    """Neither the pip.conf, which may name an index with a password, nor anything that looks like a secret."""
    image = getattr(images, name)
    names = [entry.partition("=")[0] for entry in configuration(podman, image)["Env"]]
    assert not [entry for entry in names if re.search(r"KEY|SECRET|TOKEN(?!IZERS)|PASSWORD|CREDENTIAL|^AWS|^PIP", entry)]
    history = podman("history", "--no-trunc", "--format", "{{.CreatedBy}}", image).stdout
    assert "extra-index" not in history and "cert =" not in history
    script = "find / -xdev \\( -name pip.conf -o -name .git -o -name '*.pem' -path '/opt/*' -o -name '.env' \\) 2>/dev/null || true"
    found = in_container(podman, image, script).split()
    assert not [path for path in found if not re.search(r"/site-packages/(certifi|botocore|pip/_vendor/certifi)/", path)]


def test_the_service_image_is_without_torch(podman: Podman, images: Images) -> None:
    """Every stage that it is for, and the command line, can be imported all the same."""
    modules = [
        *("components.prepare_data.start_run", "components.prepare_data.prepare_data", "components.annotate.annotate"),
        *("components.promote.promote", "components.report.report", "pipelines.cli", "pipelines.safe_rlhf"),
        *("components.foundation.judging.llm", "kfp.dsl.executor_main", "datasets", "pyarrow.parquet"),
    ]
    program = (
        f"import importlib, importlib.util; [importlib.import_module(name) for name in {modules}]; "
        "print([name for name in ('torch', 'transformers', 'deepspeed', 'pip') if importlib.util.find_spec(name)])"
    )
    assert in_container(podman, images.service, f'python3 -c "{program}"').strip() == "[]"


def test_the_trainer_image_has_what_its_stages_import(podman: Podman, images: Images) -> None:
    modules = [
        *("components.sft.sft", "components.reward_model.reward_model", "components.cost_model.cost_model"),
        *("components.collect.collect", "components.ppo_lagrangian.ppo_lagrangian", "components.evaluate.evaluate"),
        *("deepspeed", "pip", "gguf"),
    ]
    program = f"import importlib; [importlib.import_module(name) for name in {modules}]; print('all')"
    assert in_container(podman, images.trainer, f'python3 -c "{program}"').splitlines()[-1] == "all"


def test_the_command_line_works_in_the_service_image(podman: Podman, images: Images) -> None:
    script = "saferlhf settings --profile tiny && saferlhf compile -o /tmp/p.yaml --rounds 1 && grep -c 'image: ' /tmp/p.yaml"
    lines = in_container(podman, images.service, script).splitlines()
    assert "base_model=tiny" in lines
    assert int(lines[-1]) >= 13  # one a component


def test_bytecode_is_there_and_does_not_depend_on_times(podman: Podman, images: Images) -> None:
    """A read-only step cannot write it; flags 3 in its header say: checked by the source's hash."""
    program = (
        "import components.foundation.errors as module, kfp, pathlib; "
        "print([pathlib.Path(m.__cached__).read_bytes()[4:8].hex() for m in (module, kfp)])"
    )
    assert in_container(podman, images.service, f'python3 -c "{program}"').strip() == "['03000000', '03000000']"
