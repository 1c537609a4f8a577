"""Writes the YAML that Kubeflow Pipelines runs: the same bytes for the same pipeline."""

from __future__ import annotations

from itertools import dropwhile
from pathlib import Path

from kfp import compiler

from pipelines.cluster.platform_file import Platform
from pipelines.safe_rlhf import build_pipeline


def compile_to(output: Path, rounds: int, platform: Platform) -> None:
    """Compile the pipeline into a YAML file, with a head of our own: KFP's lists defaults in an order of chance."""
    compiler.Compiler().compile(build_pipeline(rounds, platform), str(output))
    body = dropwhile(lambda line: line.startswith("#"), output.read_text(encoding="utf-8").splitlines(keepends=True))
    head = f"# Safe RLHF, {rounds} rounds, platform {platform.name}; by `saferlhf compile`\n"
    output.write_text(head + "".join(body), encoding="utf-8")
