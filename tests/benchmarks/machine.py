"""On what a figure was measured."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from components.foundation.language_model import choose_dtype


def this_machine() -> str:
    """Cores, their model, the format of weights that profile smol takes here, and the versions that matter."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if platform.system() == "Linux" else []
    models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    dtype = str(choose_dtype("auto")).removeprefix("torch.")
    return (
        f"{os.cpu_count()} cores, {' and '.join(sorted(models)) or platform.machine()}, {dtype}; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
