"""Hands this machine's pip configuration to an image build: a pip.conf, and the local folders that it names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path


def pip_settings(folder: Path) -> tuple[Path, list[str]]:
    """(a pip.conf with the settings that pip has here, build options that mount the local paths in them)."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    entries = re.findall(r"^(?:global|install|:env:)\.([\w-]+)=(.*)$", listed, re.MULTILINE)
    settings = {name: str(ast.literal_eval(value)) for name, value in entries}
    file = folder / "pip.conf"
    file.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    words = " ".join(settings.values()).split()
    paths = {Path(word) for word in words if word.startswith("/")}
    # a folder that serves as an index has its files beside it
    paths |= {Path(word.removeprefix("file://")).parent for word in words if word.startswith("file:///")}
    return file, [f"--volume={path}:{path}:ro" for path in sorted(paths) if path.exists()]
