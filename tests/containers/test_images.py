"""What is in the images, and what is not."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.containers.conftest import NAMES, SECRET, Images, needs_rollout
from tests.containers.podman import Podman

pytestmark = pytest.mark.containers

TIGHT = ("run", "--rm", "--network=none", "--read-only", "--tmpfs=/tmp", "--cap-drop=all")
TRAINING = (
    *("components.sft.sft", "components.reward_model.reward_model", "components.cost_model.cost_model"),
    *("components.collect.collect", "components.ppo_lagrangian.ppo_lagrangian", "components.evaluate.evaluate"),
    *("deepspeed", "pip", "gguf"),
)
COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "make", "nvcc")


def in_container(podman: Podman, image: str, script: str) -> str:
    """Output of a shell script in a read-only container without network and capabilities."""
    return podman(*TIGHT, "--security-opt=no-new-privileges", image, "sh", "-ec", script).stdout


def in_file(path: Path, words: str) -> bool:
    return subprocess.run(["grep", "-aqF", words, str(path)], check=False).returncode == 0


def configuration(podman: Podman, image: str) -> dict[str, Any]:
    (description,) = json.loads(podman("image", "inspect", image).stdout)
    print(f"{image}: {description['Size'] / 1e6:.0f} MB")
    return dict(description["Config"])


@pytest.mark.parametrize("name", NAMES)
def test_the_user_is_a_number_and_not_root(podman: Podman, images: Images, name: str) -> None:
    image = getattr(images, name)
    assert configuration(podman, image)["User"] == "10001:10001"
    assert in_container(
        podman, image, "id -u; id -g; python3 -c 'import getpass; print(getpass.getuser())'"
    ).split() == [
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
    """But for the C compiler that Triton calls in the rollout image."""
    script = (
        f"for tool in {' '.join(COMPILERS)}; do command -v $tool || true; done; ls -A /root /build /installer || true"
    )
    left = in_container(podman, getattr(images, name), script).replace("/root:", "").split()
    assert left == (["/usr/bin/cc", "/usr/bin/gcc"] if name == "rollout" else [])


@pytest.mark.parametrize("name", NAMES)
def test_no_variable_and_no_command_holds_what_the_build_was_given(podman: Podman, images: Images, name: str) -> None:
    image = getattr(images, name)
    variables = [entry.partition("=")[0] for entry in configuration(podman, image)["Env"]]
    assert not [name for name in variables if re.search(r"KEY|SECRET|PASSWORD|CREDENTIAL|^AWS|^PIP|_TOKEN$", name)]
    assert SECRET not in podman("history", "--no-trunc", "--format", "{{.CreatedBy}}", image).stdout


def test_no_layer_holds_a_secret_of_the_build(podman: Podman, images: Images, tmp_path: Path) -> None:
    """The build's pip.conf held a password: it is in none of the layers, where other words are found."""
    archive = tmp_path / "service.tar"
    podman("save", "--output", str(archive), images.service)
    assert in_file(archive, "class IntegrityError(StoreError)")
    assert not in_file(archive, SECRET)


def test_the_service_image_is_without_torch(podman: Podman, images: Images) -> None:
    """Every stage that it is for, and the command line, can be imported all the same."""
    modules = [
        *("components.prepare_data.start_run", "components.prepare_data.prepare_data", "components.annotate.annotate"),
        *("components.promote.promote", "components.report.report", "pipelines.cli", "pipelines.safe_rlhf"),
        *("pipelines.doctor.examination", "pipelines.registry", "components.foundation.lineage"),
        *("pipelines.kubeflow.submit", "pipelines.kubeflow.schedules"),
        *("components.foundation.judging.llm", "kfp.dsl.executor_main", "datasets", "pyarrow.parquet"),
    ]
    program = (
        f"import importlib, importlib.util; [importlib.import_module(name) for name in {modules}]; "
        "print([name for name in ('torch', 'transformers', 'deepspeed', 'pip') if importlib.util.find_spec(name)])"
    )
    assert in_container(podman, images.service, f'python3 -c "{program}"').strip() == "[]"


def test_the_service_image_runs_the_servers_of_the_chart(podman: Podman, images: Images) -> None:
    """SeaweedFS; MLflow's migration; and SQLAlchemy finds the driver of Postgres, with its own copy of libpq."""
    driver = "import psycopg, sqlalchemy; sqlalchemy.create_engine('postgresql+psycopg://host/db'); "
    commands = (
        "weed version",
        "mlflow db upgrade sqlite:////tmp/mlflow.db 2>/dev/null",
        "mlflow server --help | head -n 1",
        f'python3 -c "{driver} print(psycopg.pq.__impl__)"',
    )
    lines = in_container(podman, images.service, " && ".join(commands)).splitlines()
    assert lines[0].startswith("version ")
    assert lines[-2:] == ["Usage: mlflow server [OPTIONS]", "binary"]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "service"])
def test_an_image_has_what_the_training_stages_import(podman: Podman, images: Images, name: str) -> None:
    program = f"import importlib; [importlib.import_module(name) for name in {TRAINING}]; print('all')"
    assert in_container(podman, getattr(images, name), f'python3 -c "{program}"').splitlines()[-1] == "all"


@needs_rollout
def test_the_rollout_image_has_vllm_and_a_compiler_that_works(podman: Podman, images: Images) -> None:
    """Where SAFERLHF_VLLM_PYTHON says; without a GPU vLLM can be imported, and no more."""
    lock = (Path(__file__).parents[2] / "images" / "rollout" / "requirements.lock").read_text(encoding="utf-8")
    expected = re.search(r"^vllm==(\S+)", lock, re.MULTILINE)
    assert expected
    program = "import vllm, torch, triton; print(vllm.__version__, bool(torch.version.cuda))"
    compiles = "echo 'int main(void) { return 0; }' > /tmp/a.c && cc /tmp/a.c -o /tmp/a.out && test -s /tmp/a.out"
    said = in_container(podman, images.rollout, f'"$SAFERLHF_VLLM_PYTHON" -c "{program}" && {compiles}')
    assert said.splitlines()[-1].split()[0] == expected.group(1)


def test_the_command_line_works_in_the_service_image(podman: Podman, images: Images) -> None:
    commands = (
        "saferlhf settings --profile tiny",
        "saferlhf compile --platform local --example-images -o /tmp/p.yaml",
        "grep -c 'image: ' /tmp/p.yaml",
    )
    script = " && ".join(commands)
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
