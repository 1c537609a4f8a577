"""The command that users type, as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

SAFERLHF = Path(sys.executable).with_name("saferlhf")


def saferlhf(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run it with no servers in the environment but those given."""
    given = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_"))} | dict(environment or {})
    return subprocess.run(
        [str(SAFERLHF), *arguments], capture_output=True, text=True, timeout=600, check=False, env=given
    )
