"""Asked once before it is registered: is the exported folder a model that a plain server can load and talk to?

The question goes to vLLM's own server where SAFERLHF_VLLM_PYTHON names an environment that has it, else to plain
transformers in a fresh process. Neither gets anything but the folder: no variable whose name says that it is secret.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from components.foundation.errors import ModelError, RolloutError
from components.foundation.redaction import without_secrets
from components.foundation.results import TrialResult
from components.foundation.rollout.vllm_server import PYTHON_VARIABLE, VllmServer, find_vllm_python

TRIAL_FILE = "trial.json"
QUESTION = "What can I cook with rice and eggs?"
_PROGRAM = Path(__file__).with_name("trial_program.py")
_SERVED, _LONGEST_ANSWER = "policy", 32
_LOG_LINES = 3
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
log = logging.getLogger("saferlhf")


def try_model(policy_uri: str, folder: Path, seconds: float) -> TrialResult:
    """Load the exported model in `folder` in a fresh process and ask it one question.

    Args:
        policy_uri: commit that the folder is of.
        seconds: longest wait: for load and answer together, with vLLM for the answer alone.

    Raises:
        ModelError: it does not load, does not answer in time, or says nothing.
    """
    started = time.monotonic()
    if os.environ.get(PYTHON_VARIABLE):
        server, answer = "vllm", _ask_vllm(policy_uri, folder, seconds)
    else:
        server, answer = "transformers", _ask_transformers(policy_uri, folder, seconds)
    if not answer.strip():
        raise _failure(policy_uri, f"answers {QUESTION!r} with nothing at all, in {server}")
    log.info("asked once, in %s (%.1f s): %s -> %s", server, time.monotonic() - started, QUESTION, answer.strip())
    return TrialResult(policy_uri, server, QUESTION, answer)


def _ask_transformers(policy_uri: str, folder: Path, seconds: float) -> str:
    command = [sys.executable, "-I", str(_PROGRAM), str(folder), QUESTION]  # -I: no PYTHONPATH, no current folder
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            env={**without_secrets(os.environ), **_OFFLINE},
        )
    except subprocess.TimeoutExpired as error:
        raise _failure(
            policy_uri, f"did not load and answer within serving.trial_seconds={seconds:g} in plain transformers"
        ) from error
    if done.returncode != 0:
        raise _failure(policy_uri, f"failed in plain transformers: {_end(done.stderr.splitlines())}")
    return str(json.loads(done.stdout.splitlines()[-1])["answer"])


def _ask_vllm(policy_uri: str, folder: Path, seconds: float) -> str:
    arguments = ["--model", str(folder), "--served-model-name", _SERVED, "--generation-config", "vllm"]
    environment = {**_OFFLINE, "VLLM_NO_USAGE_STATS": "1"}
    environment["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    body = {
        "model": _SERVED,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": _LONGEST_ANSWER,
    }
    with tempfile.TemporaryDirectory(prefix="saferlhf-trial-") as scratch:
        server = VllmServer(find_vllm_python(""), [*arguments, "--enforce-eager"], environment, Path(scratch), seconds)
        try:
            server.start()
            (reply,) = server.post_all("/v1/chat/completions", [body])
        except RolloutError as error:
            raise _failure(policy_uri, f"failed in vLLM: {error}") from error
        finally:
            server.stop()
    try:
        return str(json.loads(reply)["choices"][0]["message"]["content"] or "")
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _failure(policy_uri, f"got no chat completion out of vLLM, but {reply[:200]!r}") from error


def _end(lines: Sequence[str]) -> str:
    return " | ".join(line.strip() for line in lines[-_LOG_LINES:] if line.strip())


def _failure(policy_uri: str, what: str) -> ModelError:
    return ModelError(f"the exported policy {policy_uri}/model {what}; it is not registered: mend the export first")
