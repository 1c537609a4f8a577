"""Rollout by vLLM, in a process and an environment of its own, with the policy's newest weights.

Before every batch the policy is written to a folder and taken over by the running server: its LoRA adapter, or all of
its weights. vLLM's kernels are not the trainer's, so its log-probabilities differ a little; a rollout says so
(`exact=False`) and the trainer corrects for it.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from components.foundation.backbone import Backbone
from components.foundation.ppo_settings import PpoSettings
from components.foundation.rollout import Rollout, Sampling
from components.foundation.rollout.vllm_server import VllmServer, find_vllm_python

_BASE = "base"
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM reserves room for

log = logging.getLogger("saferlhf")


class VllmEngine:
    """Answers as one role of the backbone, by a server that is started at the first batch.

    Args:
        model_folder: plain Hugging Face folder with the weights of `backbone`.
        settings: `ppo.vllm_*`, and the longest prompt and answer.
        answer_seconds: longest wait for one reply of the server.

    Raises:
        SettingsError: there is no vLLM environment.
    """

    def __init__(
        self, backbone: Backbone, role: str, model_folder: Path, settings: PpoSettings, answer_seconds: float = 600.0
    ) -> None:
        self._backbone = backbone
        self._role = role
        self._full_weights = settings.vllm_weights == "full"
        self._folder = tempfile.TemporaryDirectory(prefix="saferlhf-vllm-")
        self._syncs = 0
        self._model = _BASE
        environment = {
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            # GiB; left to itself, vLLM would size its cache by all of the machine's memory
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
            # The endpoint that reloads all weights is among those for development: opened only where it is needed.
            "VLLM_SERVER_DEV_MODE" if self._full_weights else "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        }
        self._server = VllmServer(
            find_vllm_python(settings.vllm_python),
            self._arguments(model_folder, settings),
            environment,
            Path(self._folder.name),
            answer_seconds,
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, rows: Sequence[int] | None = None
    ) -> Rollout:
        """See `RolloutEngine.generate`. What an answer draws depends on seed and prompt, not on the rest of the batch.

        Equal prompts are told apart by their order. vLLM's arithmetic still depends a little on which requests happen
        to share a batch, so a draw on the edge between two tokens may fall on either side.

        Raises:
            RolloutError: the server did not start, died, or answered nonsense; it is stopped.
        """
        if not prompts:
            return Rollout([], [], exact=False)
        if not self._server.running:
            self._start()
        self._take_over_weights()
        seen: Counter[tuple[int, ...]] = Counter()
        bodies = []
        for prompt in map(tuple, prompts):
            bodies.append(self._request(prompt, sampling, prompt_seed(sampling.seed, prompt, seen[prompt])))
            seen[prompt] += 1
        wanted = range(len(prompts)) if rows is None else rows
        replies = self._server.post_all("/v1/completions", [bodies[row] for row in wanted])
        drawn = [self._read(reply, sampling) for reply in replies]
        return Rollout([answer for answer, _ in drawn], [log_probs for _, log_probs in drawn], exact=False)

    def close(self) -> None:
        """Stop the server."""
        self._server.stop()
        self._folder.cleanup()

    def _arguments(self, model_folder: Path, settings: PpoSettings) -> list[str]:
        arguments = {
            "--model": str(model_folder),
            "--served-model-name": _BASE,
            "--dtype": str(self._backbone.dtype).removeprefix("torch."),
            "--max-model-len": str(settings.max_prompt_tokens + settings.max_new_tokens),
            "--gpu-memory-utilization": str(settings.vllm_memory_share),
            "--generation-config": "vllm",  # the folder's own temperature and top-p stay out
            "--logprobs-mode": "processed_logprobs",  # of what was drawn from, temperature and truncation included
        }
        # A prefix computed with an earlier step's weights must never be met again.
        flags = ["--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
        if self._backbone.device.type == "cpu":
            flags.append("--enforce-eager")  # compiling takes longer than it saves there
        if not self._full_weights:
            rank = self._backbone.lora_rank(self._role)
            arguments["--max-lora-rank"] = str(next((r for r in _RANKS if r >= rank), rank))
            flags.append("--enable-lora")
        return [word for pair in arguments.items() for word in pair] + flags

    def _start(self) -> None:
        started = time.monotonic()
        log.info("vLLM: starting")
        self._model = _BASE
        self._server.start()
        log.info("vLLM: ready after %.0f s", time.monotonic() - started)

    def _take_over_weights(self) -> None:
        """Write the policy as it is now and let the server load it.

        An adapter gets a new name each time, in the one place that there is for adapters. Loaded under its old name
        (`load_inplace`), vLLM 0.32 would read it from the disk again for every token.
        """
        self._syncs += 1
        folder = Path(self._folder.name) / f"policy-{self._syncs}"
        if self._full_weights:
            self._backbone.export_merged(self._role, folder)
            self._server.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        else:
            self._backbone.export_adapter(self._role, folder)
            self._server.post("/v1/load_lora_adapter", {"lora_name": folder.name, "lora_path": str(folder)})
            if self._model != _BASE:
                self._server.post("/v1/unload_lora_adapter", {"lora_name": self._model})
            self._model = folder.name
        shutil.rmtree(folder)

    def _request(self, prompt: tuple[int, ...], sampling: Sampling, seed: int) -> dict[str, object]:
        return {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": seed,
            "stop_token_ids": [self._backbone.eos_token_id],
            "ignore_eos": True,  # what else the folder calls an end is none to the trainer
            "logprobs": 0,  # of the drawn tokens alone
            "return_token_ids": True,
        }

    def _read(self, reply: bytes, sampling: Sampling) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """One reply -> (answer, its log-probabilities)."""
        try:
            choice = _Reply.model_validate_json(reply).choices[0]
        except ValidationError as error:
            raise self._server.failure(f"answered nonsense ({error}): {reply[:500]!r}") from error
        answer, log_probs = choice.token_ids, choice.logprobs.token_logprobs
        eos, vocabulary = self._backbone.eos_token_id, self._backbone.vocabulary_size
        ended = answer[-1] == eos
        if (
            len(answer) != len(log_probs)
            or eos in answer[:-1]
            or not (len(answer) == sampling.max_new_tokens or (ended and len(answer) < sampling.max_new_tokens))
            or not all(0 <= token < vocabulary for token in answer)
            or not all(math.isfinite(value) and value <= 1e-3 for value in log_probs)
        ):
            raise self._server.failure(f"answered nonsense: token ids {answer}, log-probabilities {log_probs}")
        return tuple(answer), tuple(log_probs) if sampling.temperature else (0.0,) * len(answer)


class _Logprobs(BaseModel):
    token_logprobs: list[float]


class _Choice(BaseModel):
    token_ids: list[int] = Field(min_length=1)
    logprobs: _Logprobs


class _Reply(BaseModel):
    """What we read of a completion of the OpenAI protocol, with vLLM's `token_ids`."""

    choices: list[_Choice] = Field(min_length=1)


def prompt_seed(seed: int, prompt: Sequence[int], occurrence: int) -> int:
    """Seed of one answer: a function of the batch's seed, the prompt, and how often it came before in the batch."""
    digest = hashlib.sha256(f"{seed}/{occurrence}/{','.join(map(str, prompt))}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
