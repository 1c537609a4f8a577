"""Imports once what the steps import, then forks a process for each step that a client asks for.

A step is a process of its own as before, with the client's output, folder and environment. It is killed when its
client is gone, and asked to stop when the run is.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess

from components.foundation.language_model import import_transformers
from components.foundation.s3 import S3

MODULES = (
    "boto3",
    "kfp.dsl.executor_main",
    "mlflow",
    "peft",
    "components.annotate.annotate",
    "components.collect.collect",
    "components.cost_model.cost_model",
    "components.evaluate.evaluate",
    "components.ppo_lagrangian.ppo_lagrangian",
    "components.prepare_data.prepare_data",
    "components.prepare_data.start_run",
    "components.promote.promote",
    "components.report.report",
    "components.reward_model.reward_model",
    "components.sft.sft",
)
_NOWHERE = {"AWS_ENDPOINT_URL": "http://127.0.0.1", "AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class _Request:
    """What a client asks for: the arguments of `python`, where, with which environment, input, output and errors."""

    arguments: Sequence[str]
    folder: str
    environment: dict[str, str]
    descriptors: Sequence[int]


def main(listening: int) -> None:
    """Serve until standard input ends: its other end is held by the run alone.

    Args:
        listening: descriptor of a socket that listens already: who asks before the imports are done waits for them.
    """
    listener = socket.socket(fileno=listening)
    os.environ["_KFP_RUNTIME"] = "true"  # as for the steps: kfp imports less
    import_transformers()  # before others import all of it
    for module in MODULES:
        importlib.import_module(module)
    _ = S3(_NOWHERE).client  # parses boto3's description of S3
    gc.freeze()  # a collection in a step would copy the pages that it shares with the others
    steps: dict[socket.socket, ForkProcess] = {}
    while True:
        ready = wait([sys.stdin.fileno(), listener, *steps, *(step.sentinel for step in steps.values())])
        if sys.stdin.fileno() in ready:
            break
        if listener in ready:
            client, _ = listener.accept()
            with contextlib.suppress(OSError, ValueError):  # it went while it asked
                steps[client] = _start(client, [listener, client, *steps])
        for client, step in list(steps.items()):
            if step.sentinel in ready or client in ready:  # a client says nothing more: it is gone
                _finish(client, step)
                del steps[client]
    for step in steps.values():
        step.terminate()


def _start(client: socket.socket, sockets: Sequence[socket.socket]) -> ForkProcess:
    _, descriptors, _, _ = socket.recv_fds(client, 1, 3)
    request = json.loads(client.makefile().readline())
    step = _FORK.Process(target=_run, args=(_Request(**request, descriptors=descriptors), sockets))
    step.start()
    for descriptor in descriptors:
        os.close(descriptor)
    with contextlib.suppress(OSError):
        client.sendall(f"{step.pid}\n".encode())
    return step


def _finish(client: socket.socket, step: ForkProcess) -> None:
    if step.is_alive():
        step.kill()
    step.join()
    with client, contextlib.suppress(OSError):
        client.sendall(f"{step.exitcode}\n".encode())


def _run(request: _Request, sockets: Sequence[socket.socket]) -> None:
    """In the forked process: what `python -m MODULE ...` does. The server's sockets are for the server alone."""
    for inherited in sockets:
        inherited.close()
    for number, descriptor in enumerate(request.descriptors):
        os.dup2(descriptor, number)
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    sys.path[0] = request.folder
    _, module, *arguments = request.arguments
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()


if __name__ == "__main__":
    main(int(sys.argv[1]))
