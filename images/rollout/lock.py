"""Pin what the rollout image installs: `python images/rollout/lock.py` writes requirements.lock beside this file.

pip resolves packages.txt, with the project's own packages held to the versions of its requirements.lock, against PyPI
alone: a CPU build of torch from elsewhere must not get in. Nothing is installed. The hashes are those of wheels for the
Python and the platform that run this: use Python 3.11 on Linux x86_64.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT_LOCK = HERE.parents[1] / "requirements.lock"
HEAD = "# Made by images/rollout/lock.py from packages.txt; for Python 3.11 on Linux x86_64.\n"


def canonical(name: str) -> str:
    """The name of a package as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints() -> list[str]:
    """The lines of the project's lock that pin a package of packages.txt."""
    lines = (HERE / "packages.txt").read_text().splitlines()
    direct = {canonical(re.split(r"[=<> ]", line)[0]) for line in lines if line and not line.startswith("#")}
    return [line for line in PROJECT_LOCK.read_text().splitlines() if canonical(line.split("==")[0]) in direct]


def main() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PIP_FIND_LINKS"}
    with tempfile.TemporaryDirectory() as scratch:
        constraint, report = Path(scratch) / "constraints.txt", Path(scratch) / "report.json"
        constraint.write_text("\n".join(constraints()) + "\n")
        command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), "-c", str(constraint), "-r", str(HERE / "packages.txt")]
        subprocess.run(command, check=True, env=environment | {"PIP_CONFIG_FILE": os.devnull})
        found = json.loads(report.read_text())["install"]
    pins = {
        canonical(item["metadata"]["name"]): (
            item["metadata"]["version"],
            item["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for item in found
    }
    lines = [f"{name}=={version} --hash=sha256:{digest}\n" for name, (version, digest) in sorted(pins.items())]
    (HERE / "requirements.lock").write_text(HEAD + "".join(lines))


if __name__ == "__main__":
    main()
