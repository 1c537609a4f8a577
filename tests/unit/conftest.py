"""Tiny random models for the unit tests, made once per test process; a pipeline server and a compiled pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from components.foundation.backbone import Backbone
from components.foundation.base_model import make_tiny
from pipelines.cluster.compiling import compile_to
from pipelines.cluster.platform_file import read_platform
from tests.unit.kfp_server import KfpServer, kfp_server
from tests.unit.kubeflow_command import ENVIRONMENT

MakeTiny = Callable[[str], Path]
LoadTiny = Callable[[str], Backbone]
LoadPlain = Callable[[Path], Any]
Shallow = Callable[..., Any]

IMAGES = {name: f"registry.mine.org/{name}@sha256:{'5' * 64}" for name in ("trainer", "rollout", "service")}


@pytest.fixture(scope="session")
def shallow() -> Shallow:
    """Calls a function on a stack of its own: at each setting of a task, KFP reads the source of the whole stack."""

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(function, *arguments).result()

    return call


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def tiny_folder(models_folder: Path) -> Iterator[MakeTiny]:
    """Architecture -> folder of a tiny model; nothing is read from or left in the user's own model folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFERLHF_MODELS", str(models_folder))
        yield make_tiny


@pytest.fixture(scope="module")
def load_tiny(tiny_folder: MakeTiny) -> LoadTiny:
    """Architecture -> a backbone of its own, in float32."""
    return lambda architecture: Backbone.load(tiny_folder(architecture), "float32", seed=0)


@pytest.fixture(scope="session")
def load_plain() -> LoadPlain:
    """Folder -> its model by transformers alone, with no code of ours."""

    def load(folder: Path) -> Any:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    return load


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    """A server that speaks KFP's API, for the `saferlhf` command of this test."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    with kfp_server() as server:
        monkeypatch.setenv("KFP_HOST", server.url)
        yield server


@pytest.fixture(scope="session")
def compiled_pipeline(tmp_path_factory: pytest.TempPathFactory, shallow: Shallow) -> Path:
    """One round, on the shipped platform `on_prem`, with images of one's own."""
    file = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    shallow(compile_to, file, 1, read_platform("on_prem", IMAGES))
    return file
