"""Runs whose stages committed something without any work."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from components.foundation.run_context import RunContext, open_run
from components.prepare_data.start_run import run_start_run


def start(root: str, run_id: str, *settings: str, rounds: int = 3) -> RunContext:
    overrides = json.dumps([f"store.uri={root}", *settings])
    return open_run(run_start_run(f"{root}/runs/{run_id}", run_id, "tiny", 0, overrides, rounds))


def commit(context: RunContext, name: str, round_number: int, parents: list[str], file: str = "result") -> str:
    """A stage's commit, of one small file, as `Stage.commit` makes it."""
    stage_uri = context.stage_uri(name, round_number)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / file).write_text(f"{context.run_id} {name} {round_number}")
        labels = {"stage": name, "round": str(round_number), "run_id": context.run_id}
        context.store.commit(f"{stage_uri}/step-0", Path(folder), parents=parents, labels=labels)
    context.store.set_latest(stage_uri, f"{stage_uri}/step-0")
    return f"{stage_uri}/step-0"


def record_as_another_version(context: RunContext, section: str, setting: str, value: object) -> None:
    """The run's record has one setting more, which this version does not know."""
    uri = f"{context.run_uri}/run.json"
    record = json.loads(context.store.read_text(uri))
    tree = json.loads(record["settings_json"])
    tree[section][setting] = value
    context.store.write_text(uri, json.dumps({**record, "settings_json": json.dumps(tree)}), overwrite=True)
