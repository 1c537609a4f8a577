"""A real vLLM: its engine against the transformers engine on the same weights, and one question before registration.

Needs an environment with vLLM (`make vllm`), named by SAFERLHF_VLLM_PYTHON; run by `make vllm-test`.
"""

from __future__ import annotations

import os
import re
import shutil
import string
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from components.evaluate.trial import QUESTION, try_model
from components.foundation.backbone import Backbone
from components.foundation.base_model import make_tiny
from components.foundation.errors import ModelError, RolloutError
from components.foundation.language_model import import_transformers
from components.foundation.policy import ACTOR
from components.foundation.ppo_settings import PpoSettings
from components.foundation.rollout import Rollout, Sampling
from components.foundation.rollout.transformers_engine import TransformersEngine
from components.foundation.rollout.vllm_engine import VllmEngine
from components.foundation.rollout.vllm_server import PYTHON_VARIABLE
from components.foundation.setting_sections import LoraSettings

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(
        not os.environ.get(PYTHON_VARIABLE), reason=f"no vLLM environment: {PYTHON_VARIABLE} is not set (make vllm)"
    ),
]

EOS = 257
PROMPTS = [
    (256, 72, 105, 256),
    (256, *range(1, 15), 256),
    (9,),
    (256, 200, 199, 256),
    (256, 72, 105, 256),
]
GREEDY = Sampling(temperature=0.0, max_new_tokens=16, seed=0)
SAMPLED = Sampling(temperature=0.8, max_new_tokens=24, seed=3)
TRUNCATED = Sampling(temperature=0.8, max_new_tokens=24, seed=3, top_p=0.7, top_k=20)
LONG = Sampling(temperature=1.0, max_new_tokens=400, seed=0)

POLICY = "s3://bucket/store/runs/one/round-3/ppo_lagrangian/step-16"
LETTERS = string.ascii_letters

Load = Callable[[], Backbone]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Profile tiny's base model with wider heads: vLLM's attention on the CPU has none of 8."""
    target = tmp_path_factory.mktemp("model") / "wide-heads"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFERLHF_MODELS", str(target.parent / "models"))
        source = make_tiny("llama")
    shutil.copytree(source, target)
    transformers = import_transformers()
    config = transformers.AutoConfig.from_pretrained(source)
    config.head_dim, config.max_position_embeddings = 32, 512
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # far from uniform: greedy answers must not hang on a hair
    model.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def load(folder: Path) -> Load:
    def load() -> Backbone:
        backbone = Backbone.load(folder, "float32", seed=0)
        backbone.add_role(ACTOR, LoraSettings(rank=4, alpha=8), scored=False)
        return backbone

    return load


@pytest.fixture(scope="module")
def engines(folder: Path, load: Load) -> Iterator[Callable[[str], tuple[Backbone, VllmEngine]]]:
    """By `ppo.vllm_weights`: a backbone and an engine that runs on it, one for all tests of the module."""
    made: dict[str, tuple[Backbone, VllmEngine]] = {}

    def engine(weights: str) -> tuple[Backbone, VllmEngine]:
        if weights not in made:
            backbone = load()
            settings = PpoSettings(engine="vllm", vllm_weights=weights, max_new_tokens=LONG.max_new_tokens)
            made[weights] = (backbone, VllmEngine(backbone, ACTOR, folder, settings))
        return made[weights]

    yield engine
    for _, started in made.values():
        started.close()


def train(backbone: Backbone, seed: int | None) -> None:
    """Stand-in for an update: an adapter that changes nothing, or one that changes much, by the seed."""
    generator = torch.Generator().manual_seed(seed or 0)
    with torch.no_grad():
        for name, parameter in backbone.role_tensors(ACTOR).items():
            fresh = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(torch.zeros_like(fresh) if seed is None and "lora_B" in name else fresh)


def server_process(weights: str) -> psutil.Process:
    """The one child of this process that is a vLLM server of this kind."""
    commands = {process: process.cmdline() for process in psutil.Process().children()}
    servers = [
        p
        for p, words in commands.items()
        if "--model" in words and ("--enable-lora" in words) == (weights == "adapter")
    ]
    assert len(servers) == 1
    return servers[0]


def kill_while_it_answers(server: psutil.Process) -> None:
    """SIGKILL as soon as the server says that requests are running."""
    command = server.cmdline()
    url = f"http://127.0.0.1:{command[command.index('--port') + 1]}/metrics"
    running = 0.0
    while not running:
        samples = re.findall(r"^vllm:num_requests_running\{.*\} ([\d.e+]+)$", httpx.get(url).text, re.MULTILINE)
        running = sum(map(float, samples))
    server.kill()


@pytest.mark.parametrize("weights", ["adapter", "full"])
def test_greedy_answers_follow_the_policy_and_the_server_stays(engines: Any, weights: str) -> None:
    """Without an update and after two of them: the transformers engine's answers, from the same process."""
    backbone, engine = engines(weights)
    answers, pids = [], set()
    for seed in (None, 1, 2):
        train(backbone, seed)
        answers.append(engine.generate(PROMPTS, GREEDY).answers)
        assert answers[-1] == TransformersEngine(backbone, ACTOR).generate(PROMPTS, GREEDY).answers
        pids.add(server_process(weights).pid)
    assert len({tuple(a) for a in answers}) == 3
    assert len(pids) == 1


@pytest.mark.parametrize("weights", ["adapter", "full"])
@pytest.mark.parametrize("sampling", [SAMPLED, TRUNCATED])
def test_log_probs_are_those_of_the_distribution_that_was_drawn_from(
    engines: Any, weights: str, sampling: Sampling
) -> None:
    """By a pass of the backbone over each whole text: temperature, top-k and top-p included."""
    backbone, engine = engines(weights)
    train(backbone, 3)
    rollout = engine.generate(PROMPTS * 4, sampling)
    assert not rollout.exact
    for prompt, answer, log_probs in zip(PROMPTS * 4, rollout.answers, rollout.log_probs, strict=True):
        assert log_probs == pytest.approx(expected_log_probs(backbone, prompt, answer, sampling), abs=1e-3)
        assert answer[-1] == EOS or len(answer) == sampling.max_new_tokens
        assert EOS not in answer[:-1]


def expected_log_probs(
    backbone: Backbone, prompt: tuple[int, ...], answer: tuple[int, ...], sampling: Sampling
) -> list[float]:
    ids = torch.tensor([[*prompt, *answer]])
    with backbone.role(ACTOR):
        logits = backbone.answer_logits(ids, torch.ones_like(ids), len(answer))[0].double() / sampling.temperature
    if sampling.top_k:
        logits[logits < logits.topk(sampling.top_k).values[:, -1:]] = -torch.inf
    ordered, order = torch.softmax(logits, dim=-1).sort(descending=True)
    kept = (ordered.cumsum(-1) - ordered) < sampling.top_p
    probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered * kept)
    drawn = probabilities.gather(-1, torch.tensor(answer).unsqueeze(-1)).squeeze(-1)
    return (drawn / probabilities.sum(-1)).log().tolist()


def test_an_answer_depends_on_seed_and_prompt_alone(engines: Any) -> None:
    backbone, engine = engines("adapter")
    train(backbone, 4)
    first: Rollout = engine.generate(PROMPTS, SAMPLED)
    assert engine.generate(PROMPTS, SAMPLED).answers == first.answers
    assert engine.generate(PROMPTS[::-1], SAMPLED).answers[1:4] == first.answers[1:4][::-1]
    assert first.answers[0] != first.answers[4]  # the same prompt twice, drawn independently
    other = Sampling(SAMPLED.temperature, SAMPLED.max_new_tokens, seed=4)
    assert engine.generate(PROMPTS, other).answers != first.answers


@pytest.mark.fault
def test_a_server_killed_in_mid_batch_is_an_error_and_leaves_nothing(engines: Any) -> None:
    """SIGKILL while it answers; its workers end with it, and the next batch starts another server."""
    backbone, engine = engines("adapter")
    train(backbone, 5)
    before = engine.generate(PROMPTS, GREEDY).answers
    server = server_process("adapter")
    family = [server, *server.children(recursive=True)]
    assert len(family) > 1
    killer = threading.Thread(target=kill_while_it_answers, args=(server,))
    killer.start()
    with pytest.raises(RolloutError, match=r"died or hung up in the middle of a request(.|\n)*the end of its log"):
        engine.generate(PROMPTS * 60, LONG)
    killer.join()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert engine.generate(PROMPTS, GREEDY).answers == before


@pytest.mark.fault
def test_what_vllm_cannot_run_is_told_with_its_own_words(folder: Path, load: Load, tmp_path: Path) -> None:
    """A model folder whose configuration is broken: vLLM's reason is in the message."""
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "llama", "architectures": ["NoSuchModel"]}')
    backbone = load()
    with (
        closing(VllmEngine(backbone, ACTOR, tmp_path / "broken", PpoSettings(engine="vllm"))) as engine,
        pytest.raises(RolloutError, match=r"ended while it was starting(.|\n)*NoSuchModel"),
    ):
        engine.generate(PROMPTS, GREEDY)


@pytest.fixture
def exported(load: Load, tmp_path: Path) -> Path:
    """A trained policy as a run exports it, but for its head, which lets it say letters and nothing else."""
    backbone = load()
    train(backbone, 6)
    backbone.merge_role(ACTOR)
    backbone.export(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    mute = torch.ones(len(weights["lm_head.weight"]), dtype=torch.bool)
    mute[backbone.tokenizer.convert_tokens_to_ids(list(LETTERS))] = False
    weights["lm_head.weight"][mute] = 0.0
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model"


def servers_of(model: Path) -> list[psutil.Process]:
    """Children of this process that serve this model."""
    return [process for process in psutil.Process().children() if str(model) in process.cmdline()]


def test_an_exported_policy_is_loaded_by_vllms_server_and_answers_its_one_question(exported: Path) -> None:
    result = try_model(POLICY, exported, 300.0)
    assert (result.policy_uri, result.server, result.question) == (POLICY, "vllm", QUESTION)
    assert len(result.answer) == 32 and set(result.answer) <= set(LETTERS)  # so many tokens, each of them one letter
    assert servers_of(exported) == []


@pytest.mark.fault
def test_an_export_that_vllm_cannot_load_is_not_registered_and_vllms_reason_is_told(exported: Path) -> None:
    (exported / "config.json").write_text('{"model_type": "llama", "architectures": ["NoSuchModel"]}')
    with pytest.raises(
        ModelError, match=rf"{POLICY}/model failed in vLLM(.|\n)*NoSuchModel(.|\n)*it is not registered"
    ):
        try_model(POLICY, exported, 300.0)
    assert servers_of(exported) == []
