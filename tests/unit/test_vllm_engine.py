"""How the vLLM engine holds and loses its server. What vLLM itself answers: tests/integration/test_vllm.py."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest

from components.foundation.backbone import Backbone
from components.foundation.errors import RolloutError, SettingsError
from components.foundation.policy import ACTOR
from components.foundation.ppo_settings import PpoSettings
from components.foundation.rollout import Sampling
from components.foundation.rollout.engines import make_engine
from components.foundation.rollout.transformers_engine import TransformersEngine
from components.foundation.rollout.vllm_engine import VllmEngine, prompt_seed
from components.foundation.rollout.vllm_server import PYTHON_VARIABLE, find_vllm_python
from components.foundation.setting_sections import LoraSettings
from tests.misbehaving_vllm import EOS, NONSENSE, fake_vllm

LoadTiny = Callable[[str], Backbone]
PROMPTS = [(256, 72, 105, 256), (9,), (256, 72, 105, 256)]
SAMPLING = Sampling(1.0, 6, seed=0)


@pytest.fixture
def actor(load_tiny: LoadTiny) -> Backbone:
    backbone = load_tiny("llama")
    backbone.add_role(ACTOR, LoraSettings(rank=4, alpha=8), scored=False)
    return backbone


@contextmanager
def engine_on(actor: Backbone, folder: Path, how: str, answer_seconds: float = 60.0) -> Iterator[VllmEngine]:
    settings = PpoSettings(engine="vllm", vllm_python=fake_vllm(folder, how))
    with closing(VllmEngine(actor, ACTOR, folder, settings, answer_seconds)) as engine:
        yield engine


def has_ended(pid: int) -> bool:
    """Within ten seconds; a process that has ended may wait for its parent to notice."""
    try:
        psutil.Process(pid).wait(timeout=10)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


@pytest.mark.fault
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("does not start", "ended while it was starting(.|\n)*no accelerator was found"),
        ("dies", "died or hung up in the middle of a request"),
        ("hangs up", "died or hung up in the middle of a request"),
        ("refuses", "status 500: the engine is dead"),
        ("is silent", "did not answer within 1 s"),
    ],
)
def test_a_server_that_fails_is_stopped_and_named(actor: Backbone, tmp_path: Path, how: str, words: str) -> None:
    """With the end of its log, and with no process left, its child neither."""
    with engine_on(actor, tmp_path, how, answer_seconds=1.0) as engine:
        with pytest.raises(RolloutError, match=words) as caught:
            engine.generate(PROMPTS, SAMPLING)
        named = re.search(r"server pids (\d+) (\d+)", str(caught.value))
        assert named is not None
        assert all(has_ended(int(pid)) for pid in named.groups())


def test_the_server_is_started_by_the_settings(actor: Backbone, tmp_path: Path) -> None:
    """Its command line is at the end of the log of a server that does not start."""
    settings = PpoSettings(vllm_memory_share=0.25, max_prompt_tokens=50, max_new_tokens=30)
    for weights, lora in (("adapter", True), ("full", False)):
        update = {"vllm_python": fake_vllm(tmp_path, "does not start"), "vllm_weights": weights}
        with (
            closing(VllmEngine(actor, ACTOR, tmp_path, settings.model_copy(update=update))) as engine,
            pytest.raises(RolloutError) as caught,
        ):
            engine.generate(PROMPTS, SAMPLING)
        told = str(caught.value)
        for words in (f"--model {tmp_path}", "--dtype float32", "--max-model-len 80", "--gpu-memory-utilization 0.25"):
            assert words in told
        assert ("--max-lora-rank 8" in told, "--enable-lora" in told) == (lora, lora)


@pytest.mark.fault
def test_nonsense_is_refused_whatever_it_is(actor: Backbone, tmp_path: Path) -> None:
    for how in NONSENSE:
        with engine_on(actor, tmp_path, how) as engine, pytest.raises(RolloutError, match="answered nonsense"):
            engine.generate(PROMPTS, SAMPLING)


def test_answers_never_pass_for_exact(actor: Backbone, tmp_path: Path) -> None:
    with engine_on(actor, tmp_path, "behaves") as engine:
        rollout = engine.generate(PROMPTS, SAMPLING)
        assert (rollout.answers, rollout.log_probs) == ([(EOS,)] * 3, [(-1.0,)] * 3)
        assert not rollout.exact
        assert engine.generate(PROMPTS, Sampling(0.0, 6, seed=0)).log_probs == [(0.0,)] * 3
        assert engine.generate([], SAMPLING).answers == []


def test_answers_are_in_the_order_of_the_prompts_whichever_comes_first(actor: Backbone, tmp_path: Path) -> None:
    """The first prompt's comes last. Each is drawn with a seed of its own, by the newest weights, as the settings say;
    rows that are asked for alone with the seeds that they have among all."""
    prompts, repeated = [(9,), (7, 2), (1,), (7, 2), (4,)], (0, 0, 0, 1, 0)
    sampling = Sampling(0.7, 6, seed=5, top_p=0.9, top_k=20)
    with engine_on(actor, tmp_path, "echoes") as engine:
        assert engine.generate(prompts, sampling).answers == [(prompt[0], EOS) for prompt in prompts]
        assert engine.generate(prompts, sampling, rows=[3, 0]).answers == [(7, EOS), (9, EOS)]
    asked = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    wanted = [(prompt, prompt_seed(5, prompt, times)) for prompt, times in zip(prompts, repeated, strict=True)]
    seeded = [(tuple(body["prompt"]), body["seed"]) for body in asked]
    assert sorted(seeded[:5]) == sorted(wanted)
    assert sorted(seeded[5:]) == sorted([wanted[3], wanted[0]])
    assert [body["model"] for body in asked] == ["policy-1"] * 5 + ["policy-2"] * 2
    drawn = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "max_tokens": 6, "stop_token_ids": [EOS]}
    assert all({name: body[name] for name in drawn} == drawn for body in asked)


_OWNER = """
import os, signal, sys
from pathlib import Path
from components.foundation.rollout.vllm_server import VllmServer
server = VllmServer(Path(sys.argv[1]), [], {}, Path(sys.argv[2]), 60.0)
server.start()
os.kill(os.getpid(), int(sys.argv[3]))
"""


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_server_does_not_outlive_its_owner(tmp_path: Path, number: signal.Signals) -> None:
    arguments = [fake_vllm(tmp_path, "behaves"), str(tmp_path), str(int(number))]
    owner = subprocess.run([sys.executable, "-c", _OWNER, *arguments], check=False)
    assert owner.returncode == -number
    pids = re.search(r"server pids (\d+) (\d+)", (tmp_path / "vllm.log").read_text())
    assert pids is not None
    assert all(has_ended(int(pid)) for pid in pids.groups())


@pytest.mark.fault
def test_without_an_environment_for_vllm_the_way_to_one_is_told(
    actor: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    with pytest.raises(SettingsError, match=r"make vllm.*ppo\.vllm_python"):
        make_engine(PpoSettings(engine="vllm"), actor, ACTOR, tmp_path)
    for wrong in (tmp_path / "missing", tmp_path):
        with pytest.raises(SettingsError, match=f"names {wrong}.*make vllm"):
            find_vllm_python(str(wrong))
    monkeypatch.setenv(PYTHON_VARIABLE, fake_vllm(tmp_path, "behaves"))
    assert find_vllm_python("") == tmp_path / "python"
    assert find_vllm_python(sys.executable) == Path(sys.executable)  # the setting comes first
    assert os.access(find_vllm_python(""), os.X_OK)


def test_the_settings_choose_the_engine(actor: Backbone, tmp_path: Path) -> None:
    settings = PpoSettings(vllm_python=fake_vllm(tmp_path, "behaves"))
    assert isinstance(make_engine(settings, actor, ACTOR, tmp_path), TransformersEngine)
    chosen = make_engine(settings.model_copy(update={"engine": "vllm"}), actor, ACTOR, tmp_path)
    assert isinstance(chosen, VllmEngine)
    chosen.close()


def test_the_seed_of_an_answer_is_its_own() -> None:
    """A function of seed, prompt and repetition, so a batch may grow or be put into another order."""
    seeds = {prompt_seed(s, p, n) for s in (0, 1) for p in ((1, 2), (12,), (1,)) for n in (0, 1)}
    assert len(seeds) == 12
    assert prompt_seed(0, (1, 2), 0) == prompt_seed(0, [1, 2], 0)
    assert all(0 <= seed < 2**32 for seed in seeds)
