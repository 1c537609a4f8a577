"""The command line as a whole: paths and work folders that cannot be used, whatever the command wanted of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cli import main
from pipelines.own_command import own_command
from tests.unit.kubeflow_command import saferlhf


@pytest.mark.fault
@pytest.mark.parametrize(
    ("arguments", "path", "reason"),
    [
        (
            "compile --platform gke --rounds 1 --example-images -o nosuch/x.yaml",
            "nosuch/x.yaml",
            "No such file or directory",
        ),
        ("run --profile tiny --workdir file", "file", "File exists"),
        ("run --profile tiny --workdir file/below", "file/below", "Not a directory"),
        ("up --workdir file", "file/services", "Not a directory"),
    ],
)
def test_a_path_that_cannot_be_used_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    path: str,
    reason: str,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["saferlhf", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert said.startswith("saferlhf: ") and said.count("\n") == 1
    assert f"{path} cannot be used ({reason}): name a path" in said
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.fault
@pytest.mark.parametrize(
    "arguments",
    [
        ("registry", "list"),
        ("lineage",),
        ("rollback", "--reason", "worse"),
        ("annotations", "status", "r1"),
        ("env",),
        ("serve", "render", "-o", "service.yaml"),
    ],
    ids=" ".join,
)
def test_looking_into_a_work_folder_that_no_run_has_used_makes_nothing_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    status, said = saferlhf(*arguments, "--workdir", "rusn")
    assert status == 1
    assert "no run has used the work folder rusn: name that of the run with --workdir" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("started", "told"),
    [
        (".venv/bin/saferlhf", ".venv/bin/saferlhf up --workdir 'my runs'"),
        ("/opt/bin/saferlhf", "/opt/bin/saferlhf up --workdir 'my runs'"),
        ("saferlhf", "saferlhf up --workdir 'my runs'"),
        ("/lib/pytest/__main__.py", "saferlhf up --workdir 'my runs'"),  # the command's functions, called by another
    ],
)
def test_a_command_is_told_as_it_can_be_typed(monkeypatch: pytest.MonkeyPatch, started: str, told: str) -> None:
    monkeypatch.setattr(sys, "argv", [started, "run"])
    assert own_command("up", "--workdir", "my runs") == told


@pytest.mark.parametrize("resume", ["", "20261124-152017-1f0c"])
def test_make_run_passes_on_what_it_is_told(resume: str) -> None:
    words = ["PROFILE=tiny", "WORKDIR=/tmp/w", "SEED=2", "SET=rounds=1 ppo.steps=4", f"RESUME={resume}"]
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}  # of the `make test` above
    root = Path(__file__).parents[2]
    done = subprocess.run(["make", "-n", "run", *words], cwd=root, env=environment, capture_output=True, text=True)
    expected = "run --profile tiny --workdir /tmp/w --seed 2 --set rounds=1 --set ppo.steps=4"
    assert done.stdout.splitlines()[-1].rstrip() == " ".join(
        [".venv/bin/saferlhf", expected, *(["--resume", resume] if resume else [])]
    )
