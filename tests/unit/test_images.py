"""The image files, without building them: pins, refusals, what reaches the builder. tests/containers builds them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.unit.kubeflow_command import saferlhf

IMAGES = Path(__file__).resolve().parents[2] / "images"
NAMES = ("service", "trainer", "rollout")


def build(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """build.sh with `true` as the builder: it takes every command and builds nothing."""
    environment = os.environ | {"BUILDER": "true", "REVISION": "1", "SOURCE_DATE_EPOCH": "1"} | variables
    return subprocess.run(
        [str(IMAGES / "build.sh"), *arguments], capture_output=True, text=True, env=environment, check=False
    )


def environment_without(*names: str) -> dict[str, str]:
    """This process's variables but these; git finds no other repository by them, and no settings of the user's."""
    kept = {name: value for name, value in os.environ.items() if name not in names and not name.startswith("GIT_")}
    return kept | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split()[0].lower().replace("_", "-").split("==") for line in lines if "==" in line)


def test_every_base_is_pinned_by_digest() -> None:
    lines = [line for line in (IMAGES / "bases.env").read_text().splitlines() if not line.startswith("#")]
    assert [line.partition("=")[0] for line in lines] == [f"{name.upper()}_BASE" for name in NAMES]
    assert all(re.fullmatch(r"[A-Z]+_BASE=[a-z0-9./-]+:[\w.-]+@sha256:[0-9a-f]{64}", line) for line in lines)


def test_the_images_are_built_on_their_bases() -> None:
    done = build("build", TAG="t", REGISTRY="r.example")
    assert done.returncode == 0, done.stderr
    built = [line.partition(",")[0] for line in done.stdout.splitlines()]
    assert built == [f"built r.example/saferlhf/{name}:t" for name in NAMES]


def test_push_prints_options_that_compile_takes(tmp_path: Path) -> None:
    """A builder that pushes nothing, and says that the registry gave this digest."""
    digest, builder = f"sha256:{'5' * 64}", tmp_path / "builder"
    builder.write_text(f'#!/bin/sh\n[ "$1" = info ] || printf {digest} > "$3"\n')
    builder.chmod(0o755)
    done = build("push", BUILDER=str(builder), TAG="t", REGISTRY="r.example")
    names = {name: f"r.example/saferlhf/{name}@{digest}" for name in NAMES}
    assert done.stdout.splitlines() == [f"--image-{name} {image}" for name, image in names.items()]
    output = tmp_path / "p.yaml"
    status, said = saferlhf("compile", "--platform", "gke", "-o", str(output), "--rounds", "1", *done.stdout.split())
    assert status == 0 and "examples" not in said
    assert set(re.findall(r"image: (\S+)", output.read_text())) == set(names.values())


@pytest.mark.fault
@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        (["build", "service"], {"SERVICE_BASE": "python:3.11"}, "SERVICE_BASE=python:3.11 is not pinned"),
        (["build", "service"], {"BUILDER": "no-such-builder"}, "apt-get install podman"),
        (["build", "servise"], {}, "there is no image 'servise'"),
        (["push", "service"], {}, "say where to push"),
        (["bake"], {}, "unknown action 'bake'"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(
    arguments: list[str], variables: dict[str, str], words: str
) -> None:
    done = build(*arguments, **variables)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_final_stage_is_not_root_and_takes_no_folder_of_the_checkout(name: str) -> None:
    final = (IMAGES / name / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    assert "\nUSER 10001:10001\n" in final
    assert all("--from=" in line for line in final.splitlines() if line.startswith(("COPY", "ADD")))


def test_the_rollout_image_has_the_projects_own_packages_in_their_locked_versions() -> None:
    """torch above all: adapters that the trainer writes are read there."""
    project, rollout = pins(IMAGES.parent / "requirements.lock"), pins(IMAGES / "rollout" / "requirements.lock")
    lines = (IMAGES / "rollout" / "packages.txt").read_text().splitlines()
    names = [line for line in lines if line and not line.startswith("#") and "==" not in line]
    assert len(names) > 15
    assert {name: rollout[name] for name in names} == {name: project[name] for name in names}
    assert rollout["vllm"] == "0.32.0"
    assert "SAFERLHF_VLLM_PYTHON=/opt/saferlhf/bin/python" in (IMAGES / "rollout" / "Dockerfile").read_text()


def test_every_pin_of_the_rollout_image_has_a_hash() -> None:
    lines = (IMAGES / "rollout" / "requirements.lock").read_text().splitlines()[1:]
    assert all(re.fullmatch(r"[a-z0-9-]+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)


def test_names_in_the_package_lists_are_pinned() -> None:
    known = pins(IMAGES.parent / "requirements.lock")
    for name in ("service", "trainer"):
        lines = (IMAGES / name / "packages.txt").read_text().splitlines()
        names = [line for line in lines if line and not line.startswith("#") and "==" not in line]
        assert names and not [entry for entry in names if entry not in known]


def test_without_a_git_checkout_the_variables_that_are_named_are_enough(tmp_path: Path) -> None:
    shutil.copytree(IMAGES, tmp_path / "images")
    shutil.copy(IMAGES.parent / "pyproject.toml", tmp_path)
    log, builder = tmp_path / "log", tmp_path / "builder"
    builder.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    builder.chmod(0o755)
    environment = environment_without("TAG", "REGISTRY", "REVISION", "SOURCE_DATE_EPOCH") | {"BUILDER": str(builder)}

    def told(**variables: str) -> tuple[int, str]:
        command = [str(tmp_path / "images" / "build.sh"), "build", "service"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment | variables, check=False)
        return done.returncode, done.stdout + done.stderr

    advice = "images: this is no git checkout: set REVISION and SOURCE_DATE_EPOCH\n"
    assert told() == told(REVISION="abc") == told(SOURCE_DATE_EPOCH="86400") == (1, advice)
    status, said = told(REVISION="abc", SOURCE_DATE_EPOCH="86400")
    assert status == 0 and said.startswith("built localhost/saferlhf/service:abc, id")
    assert "CREATED=1970-01-02T00:00:00Z" in log.read_text() and "SOURCE_DATE_EPOCH=86400" in log.read_text()


def test_a_commit_is_dirty_by_what_an_image_can_hold_alone(tmp_path: Path) -> None:
    """What the guide lets one write into the checkout, as the output of `make images-push`, changes no tag."""
    shutil.copytree(IMAGES, tmp_path / "images")
    for name in ("pyproject.toml", "requirements.lock"):
        shutil.copy(IMAGES.parent / name, tmp_path)
    environment = environment_without("TAG", "REGISTRY", "REVISION")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True, env=environment)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True, env=environment)
    sha = head.stdout.strip()

    def tag() -> str:
        command = [str(tmp_path / "images" / "build.sh"), "build", "service"]
        environment.update(BUILDER="true", SOURCE_DATE_EPOCH="1")
        said = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
        found = re.match(r"built localhost/saferlhf/service:(\S+), id", said)
        assert found, said
        return found.group(1)

    for name in ("pushed", "my-values.yaml"):
        (tmp_path / name).write_text("a file of the reader's")
    assert tag() == sha
    (tmp_path / "images" / "bases.env").write_text("SERVICE_BASE=localhost/other\n")
    assert tag() == f"{sha}-dirty"
