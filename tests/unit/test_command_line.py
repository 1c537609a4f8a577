"""The command line as a whole: a path that cannot be used is one sentence, whatever the command wanted of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipelines.cli import main


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
