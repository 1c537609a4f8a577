"""What `saferlhf doctor` looks at on this machine: shared memory, disk, GPUs."""

from __future__ import annotations

import importlib.util
import subprocess
import tempfile
from pathlib import Path

import psutil

from pipelines.doctor.findings import Finding

_GIB = 1024**3
SHM_BYTES = 1 * _GIB
"""NCCL's buffers and data loaders of several GPUs; containers get 64 MiB if nobody asks for more."""
DISK_BYTES, DISK_BYTES_AT_LEAST = 5 * _GIB, 5 * _GIB // 2
"""Room for two runs of profile smol, and for one: each leaves 2.4 GB in its work folder."""
_SMI_SECONDS = 20


def check_shm(folder: Path = Path("/dev/shm")) -> Finding:
    """Is there room for what processes share?"""
    if not folder.is_dir():
        return Finding("skipped", f"there is no {folder} on this machine")
    size = psutil.disk_usage(str(folder)).total
    if size < SHM_BYTES:
        return Finding(
            "warning",
            f"{folder} has {_in_gib(size)}: too little for several GPUs",
            "in a container, mount a larger one (docker --shm-size, on a cluster `shm` of the pool)",
        )
    return Finding("ok", f"{folder} has {_in_gib(size)}")


def check_disk(work_dir: Path) -> Finding:
    """Is there room for a run in the work folder, or where it will be made?"""
    try:
        free = psutil.disk_usage(str(_what_is_there(work_dir))).free
    except OSError as error:
        return Finding(
            "failed", f"the work folder {work_dir} cannot be used ({error.strerror})", "take another with --workdir"
        )
    found = f"{_in_gib(free)} free for the work folder {work_dir}"
    if free >= DISK_BYTES:
        return Finding("ok", found)
    return Finding(
        "warning" if free >= DISK_BYTES_AT_LEAST else "failed",
        found,
        f"make room, or take another with --workdir: a run of profile smol wants {_in_gib(DISK_BYTES)}",
    )


def check_cache(folder: str) -> Finding:
    """Can what is fetched from the store be kept in $SAFERLHF_CACHE?"""
    if not folder:
        return Finding("ok", "in the work folder, as SAFERLHF_CACHE is not set")
    elsewhere = f"let SAFERLHF_CACHE name a folder that can be written and has {_in_gib(DISK_BYTES_AT_LEAST)} free"
    try:
        place = _what_is_there(Path(folder))
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return Finding("failed", f"{folder} cannot be written ({error.strerror})", elsewhere)
    free = psutil.disk_usage(str(place)).free
    found = f"{_in_gib(free)} free for {folder}"
    return Finding("ok", found) if free >= DISK_BYTES_AT_LEAST else Finding("warning", found, elsewhere)


def _what_is_there(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists.

    Raises:
        OSError: a folder on the way may not be looked into, or a name in it is impossible.
    """
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    return place


def check_gpus(smi: str = "nvidia-smi") -> Finding:
    """Which GPUs has this machine, and can torch use them?"""
    command = [smi, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS)
    except FileNotFoundError:
        return Finding("ok", "none (no nvidia-smi): models train on the CPU")
    except subprocess.TimeoutExpired:
        return Finding("failed", f"nvidia-smi has not answered in {_SMI_SECONDS} s", "restart the driver or the node")
    gpus = [" ".join(line.split()) for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not gpus:
        said = (done.stderr or done.stdout).strip().partition("\n")[0]
        return Finding("failed", f"nvidia-smi finds no GPU: {said}", "install the driver, or repair it")
    listed = f"{len(gpus)}: {'; '.join(gpus)}"
    usable = _usable_gpus()
    if usable is None:
        return Finding("ok", f"{listed} (torch is not installed here)")
    if usable < len(gpus):
        return Finding(
            "failed",
            f"{listed}; torch can use {usable} of them",
            "install a CUDA build of torch that the driver supports; look at CUDA_VISIBLE_DEVICES",
        )
    return Finding("ok", listed)


def _usable_gpus() -> int | None:
    """How many GPUs torch sees; None without torch."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch.cuda.device_count()


def _in_gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
