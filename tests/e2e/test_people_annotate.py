"""People annotate a tiny pipeline: the run ends as waiting, somebody labels what was exported, the run goes on."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from components.foundation.exit_codes import WAITING_EXIT_CODE
from tests.e2e.command import SAFERLHF, saferlhf
from tests.scripted_person import label_file

pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("people")]


def test_a_run_waits_for_labels_and_goes_on_with_them(tmp_path: Path) -> None:
    where = ("--workdir", str(tmp_path / "work"))
    command = ["run", "--profile", "tiny", "--set", "rounds=1", "--set", "annotate.annotator=human", *where]
    waiting = saferlhf(*command)
    assert waiting.returncode == WAITING_EXIT_CODE, waiting.stdout + waiting.stderr
    assert waiting.stderr == ""
    run_id = waiting.stdout.splitlines()[0].split()[-1]
    last = waiting.stdout.splitlines()[-1]
    assert last.startswith("waiting for labels: 9 items at s3://") and f"--resume {run_id}" in last
    go_on = shlex.split(last.partition("; to go on here: ")[2])
    assert go_on[0] == str(SAFERLHF)
    assert "reward_model" not in waiting.stdout and not (tmp_path / "work" / "summary.json").exists()

    folder, labels = tmp_path / "exported", tmp_path / "labels.jsonl"
    exported = saferlhf("annotations", "export", run_id, "-o", str(folder), *where)
    assert exported.returncode == 0, exported.stderr
    label_file(folder, labels)
    imported = saferlhf("annotations", "import", run_id, str(labels), *where)
    assert imported.returncode == 0, imported.stderr
    assert "13 new labels" in imported.stdout and f"go on with --resume {run_id}" in imported.stdout

    done = saferlhf(*go_on[1:])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "progress sft" not in done.stdout  # it had been done before
    summary = json.loads((tmp_path / "work" / "summary.json").read_text())
    assert summary["run_id"] == run_id and len(summary["rounds"]) == 1
