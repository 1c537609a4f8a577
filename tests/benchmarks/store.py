"""Checkpoints into the store and back, against plain boto3 and, where it is there, `aws s3 cp`.

    python -m tests.benchmarks.store

One file of 1 GB, and 1,000 files of 20 kB, on a SeaweedFS of this machine. Ours computes and checks a SHA-256 of every
file; the others check nothing. SAFERLHF_AWS names the program `aws`, which wants an environment of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3

from components.foundation.checkpoint_store import CheckpointStore
from pipelines.local.services import local_services
from tests.benchmarks.machine import this_machine

BUCKET = "saferlhf-bench"
SETS = {"1 GB in one file": (1, 1_000_000_000), "1,000 files of 20 kB": (1_000, 20_000)}
REPEATS = 3


@dataclass(frozen=True)
class Way:
    """A way to bring a folder to a URI, and the objects below a URI to a folder that is not there yet."""

    name: str
    upload: Callable[[Path, str], object]
    download: Callable[[str, Path], object]


def ours(folder: Path) -> Way:
    def download(uri: str, target: Path) -> None:
        CheckpointStore(f"s3://{BUCKET}", cache_dir=target).fetch(uri)

    store = CheckpointStore(f"s3://{BUCKET}", cache_dir=folder / "cache")
    return Way("saferlhf, with digests", lambda source, uri: store.commit(uri, source), download)


def plain_boto3() -> Way:
    client = boto3.client("s3")

    def upload(source: Path, uri: str) -> None:
        for path in source.iterdir():
            client.upload_file(str(path), BUCKET, f"{key(uri)}/{path.name}")

    def download(uri: str, target: Path) -> None:
        target.mkdir()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{key(uri)}/"):
            for entry in page["Contents"]:
                client.download_file(BUCKET, entry["Key"], str(target / entry["Key"].rpartition("/")[2]))

    return Way("boto3", upload, download)


def aws_cli(program: str) -> Way:
    def copy(source: object, target: object) -> None:
        command = [program, "s3", "cp", "--recursive", "--only-show-errors", str(source), str(target)]
        subprocess.run(command, check=True)

    return Way("aws s3 cp", copy, copy)


def key(uri: str) -> str:
    return uri.removeprefix(f"s3://{BUCKET}/")


@contextmanager
def files(count: int, size: int) -> Iterator[Path]:
    """A folder of random files."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            (Path(folder) / f"part-{number:04}").write_bytes(os.urandom(size))
        yield Path(folder)


def seconds(act: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    act(*arguments)
    return time.perf_counter() - started


def measure(way: Way, source: Path, uri: str, target: Path) -> tuple[float, float]:
    """The least seconds of some repetitions: (up, down)."""
    ups, downs = [], []
    for repeat in range(REPEATS):
        ups.append(seconds(way.upload, source, f"{uri}/{repeat}"))
        downs.append(seconds(way.download, f"{uri}/{repeat}", target))
        shutil.rmtree(target)
    return min(ups), min(downs)


def main() -> None:
    print(this_machine())
    with tempfile.TemporaryDirectory() as folder, local_services(Path(folder) / "services") as servers:
        os.environ.update(servers.environment)
        CheckpointStore(f"s3://{BUCKET}").ensure_bucket()
        program = os.environ.get("SAFERLHF_AWS") or shutil.which("aws")
        ways = [ours(Path(folder)), plain_boto3(), *([aws_cli(program)] if program else [])]
        print(f"{'':22} {'':24} {'up':>8} {'down':>8}")
        for name, (count, size) in SETS.items():
            with files(count, size) as source:
                for number, way in enumerate(ways):
                    up, down = measure(way, source, f"s3://{BUCKET}/{count}-{number}", Path(folder) / "target")
                    print(f"{name:22} {way.name:24} {up:6.2f} s {down:6.2f} s", flush=True)


if __name__ == "__main__":
    main()
