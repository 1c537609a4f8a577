"""Identities of the SeaweedFS of the tests: its owner, one that may only read, and two teams with a prefix each."""

from __future__ import annotations

import json
from pathlib import Path

BUCKET = "saferlhf-test"
TEAM_A, TEAM_B = f"s3://{BUCKET}/team-a", f"s3://{BUCKET}/team-b"


def keys_of(identity: str) -> dict[str, str]:
    """AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."""
    return {"AWS_ACCESS_KEY_ID": f"{identity}-key", "AWS_SECRET_ACCESS_KEY": f"{identity}-secret"}


def write_identities(work_dir: Path) -> None:
    """Before `local_services` starts a SeaweedFS in `work_dir`, which then takes these instead of making its own."""
    team = {
        team: [f"{deed}:{BUCKET}/{team}/*" for deed in ("Read", "Write", "List", "Tagging")]
        for team in ("team-a", "team-b")
    }
    actions = {
        "owner": ["Admin", "Read", "Write", "List", "Tagging"],  # the first is the one of `services`
        "reader": [f"Read:{BUCKET}", f"List:{BUCKET}"],
        **team,
    }
    identities = []
    for name, allowed in actions.items():
        keys = keys_of(name)
        credentials = {"accessKey": keys["AWS_ACCESS_KEY_ID"], "secretKey": keys["AWS_SECRET_ACCESS_KEY"]}
        identities.append({"name": name, "credentials": [credentials], "actions": allowed})
    folder = work_dir / "services"
    folder.mkdir(parents=True)
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
