"""The command line as a whole: paths and work folders that cannot be used, whatever the command wanted of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pipelines.cli import main
from tests.unit.kubeflow_command import saferlhf


@pytest.mark.fault
@pytest.mark.parametrize(
    ("arguments", "path", "reason"),
    [
        ("compile --platform gke --rounds 1 -o nosuch/x.yaml", "nosuch/x.yaml", "No such file or directory"),
        ("run --profile tiny --workdir file", "file", "File exists"),
        ("run --profile tiny --workdir file/below", "file/below", "Not a directory"),
        ("up --workdir file", "file/services", "Not a directory"),
        ("env --workdir file", "file/services", "Not a directory"),
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
