"""Each option of the PPO stage, on the same data and models: the stage ends well, and the option made a difference.

Those of PPO that `saferlhf run` is tried with in tests/e2e are not here.
"""

from __future__ import annotations

import json
import re
import signal
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from components.cost_model.cost_model import run_cost_model
from components.foundation import activation_checkpointing
from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import SettingsError
from components.foundation.exit_codes import PREEMPTED_EXIT_CODE
from components.foundation.preference import TRAINING_FILE, DualPreference, PromptRecord, read_jsonl
from components.foundation.results import PpoTrace, read_record
from components.foundation.run_context import open_run
from components.foundation.tracking import STAGE_TAG
from components.foundation.training_checkpoints import TrainingCheckpoints
from components.ppo_lagrangian import ptx
from components.ppo_lagrangian.ppo_lagrangian import PpoInputs, run_ppo_lagrangian, tracked_metrics
from components.ppo_lagrangian.trainer import StepMetrics
from components.prepare_data.prepare_data import run_prepare_data
from components.prepare_data.start_run import run_start_run
from components.prepare_data.take_over import take_over
from components.reward_model.reward_model import run_reward_model
from components.sft.sft import run_sft
from pipelines.local.services import Endpoints

pytestmark = pytest.mark.xdist_group("resume")


@dataclass(frozen=True)
class Models:
    """What a run of profile tiny made before PPO: URIs, in the store that holds the runs, too."""

    root: str
    inputs: PpoInputs

    def train(self, *settings: str, policy: str = "") -> str:
        """The URI of a policy trained in a run of its own; from `policy` on, in round 2, where that is given."""
        inputs = replace(self.inputs, policy=policy or self.inputs.sft)
        return run_ppo_lagrangian(start(self.root, *settings), 2 if policy else 1, inputs)

    def files(self, uri: str) -> dict[str, str]:
        """SHA-256 of the files of a commit."""
        return {file.path: file.sha256 for file in CheckpointStore(self.root).manifest(uri).files}

    def weights(self, uri: str) -> dict[str, str]:
        """Those of its weights."""
        found = {path: digest for path, digest in self.files(uri).items() if path.endswith(".safetensors")}
        assert found
        return found

    def actor(self, policy: str) -> dict[str, str]:
        """Those of a trained actor."""
        return {path: digest for path, digest in self.files(policy).items() if path.startswith("actor/")}

    def trace(self, policy: str) -> PpoTrace:
        return read_record(PpoTrace, CheckpointStore(self.root).fetch(policy) / "trace.json")


def start(root: str, *settings: str) -> str:
    run_id = uuid.uuid4().hex
    return run_start_run(f"{root}/runs/{run_id}", run_id, "tiny", 0, json.dumps([f"store.uri={root}", *settings]), 2)


def made(root: str, *settings: str) -> Models:
    run = start(root, *settings)
    data = run_prepare_data(run)
    sft = run_sft(run, data)
    return Models(
        root, PpoInputs(data, sft, sft, run_reward_model(run, 1, sft, data), run_cost_model(run, 1, sft, data))
    )


@pytest.fixture(scope="module")
def root(services: Endpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFERLHF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield f"s3://saferlhf-test/{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def models(root: str) -> Models:
    return made(root)


@pytest.fixture(scope="module")
def plain(models: Models) -> str:
    """The policy that profile tiny trains, with no option set."""
    return models.train()


@pytest.mark.parametrize(
    "settings",
    [
        ("ppo.macro_action=perplexity",),
        ("ppo.cost_aggregation=floored",),
        ("ppo.top_p=0.9", "ppo.top_k=50"),
        ("ppo.epochs=2", "ppo.actor_schedule=cosine", "ppo.actor_warmup_share=0.5"),
        ("ppo.whiten_advantages=false",),
        ("ppo.actor_schedule=trapezoid", "ppo.actor_warmup_share=0.9"),
        ("ppo.continuation_weight=0.25",),
    ],
    ids=str,
)
def test_an_option_trains_another_policy(models: Models, plain: str, settings: tuple[str, ...]) -> None:
    policy = models.train(*settings)
    assert models.actor(policy).keys() == models.actor(plain).keys()
    assert models.actor(policy) != models.actor(plain)
    assert len(models.trace(policy).kl) == 2


def test_safe_answers_to_attacks_take_part_in_ptx(models: Models, capsys: pytest.CaptureFixture[str]) -> None:
    """The cost model of a random two-layer model calls some of them safe."""
    harmless = models.train("ppo.ptx_coefficient=0.5")
    assert "on attacks" not in capsys.readouterr().out
    safe = models.train("ppo.ptx_coefficient=0.5", "ppo.ptx_demonstrations=safe")
    said = capsys.readouterr().out
    assert re.search(r"PTX: \d+ of \d+ demonstrated answers are cut at ppo.max_new_tokens=12", said)
    (passed, of), *others = re.findall(r"PTX: \d+ .* harmless prompts, and (\d+) of (\d+) on attacks", said)
    assert 0 < int(passed) < int(of) and not others
    assert models.actor(safe) != models.actor(harmless)


def test_labelled_answers_to_attacks_take_part_in_ptx(models: Models, capsys: pytest.CaptureFixture[str]) -> None:
    """They are the training pairs' own: those of the held-out pairs, which measure the models, stay apart."""
    data = CheckpointStore(models.root).fetch(models.inputs.data)
    attacks = {p.prompt for p in read_jsonl(data / "prompts.jsonl", PromptRecord) if p.kind == "red_team"}
    safe_answers = {
        (pair.prompt, answer)
        for pair in read_jsonl(data / TRAINING_FILE, DualPreference)
        for answer, safe in (
            (pair.response_0, pair.is_response_0_safe),
            (pair.response_1, pair.is_response_1_safe),
        )
        if safe and pair.prompt in attacks
    }
    harmless = models.train("ppo.ptx_coefficient=0.5")
    capsys.readouterr()
    labelled = models.train("ppo.ptx_coefficient=0.5", "ppo.ptx_demonstrations=labelled")
    said = capsys.readouterr().out
    assert re.findall(r"PTX: \d+ .* and (\d+) on attacks, answers that are labelled safe", said) == [
        str(len(safe_answers))
    ]
    assert models.actor(labelled) != models.actor(harmless)


def test_where_no_answer_to_an_attack_is_safe_ptx_stays_with_the_harmless_ones(
    models: Models, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    harmless = models.train("ppo.ptx_coefficient=0.5")
    monkeypatch.setattr(ptx, "safe_sequences", lambda *_: [])
    safe = models.train("ppo.ptx_coefficient=0.5", "ppo.ptx_demonstrations=safe")
    assert models.actor(safe) == models.actor(harmless)
    assert re.search(r"PTX: \d+ demonstrations on harmless prompts, and 0 of \d+ on attacks", capsys.readouterr().out)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("stopped", "settings"),
    [
        (1, ("ppo.lagrangian=pid", "ppo.macro_action=perplexity", "ppo.epochs=2")),
        (1, ("ppo.advantage_source=preference_oracle", "ppo.lambda_learning_rate=0.3")),
        (1, ("ppo.average_steps=3", "ppo.critics=head")),
        (3, ("ppo.average_steps=2", "finetune=full")),
    ],
    ids=str,
)
def test_row_05_ppo_with_trained_critics_or_with_none_goes_on_bit_for_bit(
    models: Models, monkeypatch: pytest.MonkeyPatch, stopped: int, settings: tuple[str, ...]
) -> None:
    """Asked to stop after one of three steps. The first has two critics with moments, and PID's memory; the last two
    have summed up actors by then, one of three, and all."""
    options = (*settings, "ppo.steps=3")
    expected = models.train(*options)
    original = TrainingCheckpoints.after_step

    def after_step(self: TrainingCheckpoints, step: int, *more: Any) -> None:
        if step == stopped:
            signal.raise_signal(signal.SIGTERM)
        original(self, step, *more)

    run = start(models.root, *options)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(TrainingCheckpoints, "after_step", after_step)
        run_ppo_lagrangian(run, 1, models.inputs)
    assert end.value.code == PREEMPTED_EXIT_CODE
    resumed = run_ppo_lagrangian(run, 1, models.inputs)
    assert models.weights(resumed) == models.weights(expected)
    assert models.trace(resumed) == models.trace(expected)


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_the_policy_is_the_mean_of_the_last_actors(models: Models, finetune: str) -> None:
    """Steps are functions of seed and number, so runs that end earlier end with the actors in between."""
    options = (f"finetune={finetune}", "ppo.actor_learning_rate=1e-4")

    def tensors(steps: int, average_steps: int) -> dict[str, Tensor]:
        policy = models.train(*options, f"ppo.steps={steps}", f"ppo.average_steps={average_steps}")
        folder = CheckpointStore(models.root).fetch(policy)
        (actor,) = (folder / "actor").glob("*.safetensors")
        merged = load_file(folder / "model" / "model.safetensors")
        return load_file(actor) | {f"merged {name}": tensor for name, tensor in merged.items()}

    actors = [tensors(steps, average_steps=1) for steps in (1, 2, 3)]
    for average_steps, last in ((2, actors[1:]), (5, actors)):
        found = tensors(3, average_steps)
        for name in found:
            if finetune == "full" or not name.startswith("merged"):  # an adapter's product is not linear in it
                expected = torch.stack([actor[name] for actor in last]).mean(dim=0)
                torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-8)
        assert any(not torch.equal(found[name], actors[-1][name]) for name in found if name.startswith("merged"))


def test_severity_weighs_in_the_cost_model(models: Models) -> None:
    run = start(models.root, "cost_model.severity_weight=2")
    weighted = run_cost_model(run, 1, models.inputs.sft, run_prepare_data(run))
    assert models.weights(weighted).keys() == models.weights(models.inputs.cost_model).keys()
    assert models.weights(weighted) != models.weights(models.inputs.cost_model)


def test_the_cost_model_is_read_where_the_settings_say_and_ppo_goes_on_with_it(models: Models) -> None:
    run = start(models.root, "cost_model.readout=prompt_and_end")
    read_twice = run_cost_model(run, 1, models.inputs.sft, run_prepare_data(run))
    described = [
        json.loads((CheckpointStore(models.root).fetch(uri) / "adapter.json").read_text())["reads_prompt"]
        for uri in (read_twice, models.inputs.cost_model)
    ]
    assert described == [True, False]
    policies = [
        run_ppo_lagrangian(start(models.root), 1, replace(models.inputs, cost_model=uri))
        for uri in (read_twice, models.inputs.cost_model)
    ]
    costs = [models.trace(policy).cost for policy in policies]
    assert costs[0] != costs[1]
    with pytest.raises(SettingsError, match=r"soft minimum of two outputs.*leave ppo\.cost_margin empty"):
        run_ppo_lagrangian(start(models.root, "ppo.cost_margin=5"), 1, replace(models.inputs, cost_model=read_twice))


def test_a_cost_model_does_not_go_on_from_one_that_is_read_elsewhere(models: Models) -> None:
    """A run may take over the rounds of one with other settings."""
    run = start(models.root, "cost_model.start=previous", "cost_model.readout=prompt_and_end")
    take_over(open_run(run), {("cost_model", 1): models.inputs.cost_model})
    with pytest.raises(SettingsError, match=r"cost_model\.readout says prompt_and_end, and the model of round 1"):
        run_cost_model(run, 2, models.inputs.sft, models.inputs.data)


def test_the_weight_of_reward_shaping_stands_in_place_of_a_multiplier(models: Models, plain: str) -> None:
    shaped = models.train("ppo.reward_shaping=2")
    assert models.trace(shaped).multiplier == pytest.approx([2.0, 2.0])
    assert models.actor(shaped) != models.actor(plain)


def test_mlflow_shows_all_metrics_of_every_step(plain: str, services: Endpoints) -> None:
    step = StepMetrics(**{field.name: 0.0 for field in fields(StepMetrics)})  # type: ignore[arg-type]
    client = MlflowClient(services.tracking_uri)
    parent = client.get_run(open_run(plain.partition("/round-")[0]).mlflow_run_id).info
    condition = f"tags.`mlflow.parentRunId` = '{parent.run_id}' and tags.`{STAGE_TAG}` = 'ppo_lagrangian'"
    (run,) = client.search_runs([parent.experiment_id], condition)
    names = [name for name in run.data.metrics if not name.startswith("system/")]  # those are MLflow's own
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in names}
    steps = {name: [point.step for point in history] for name, history in histories.items()}
    assert steps == {name: [1, 2] for name in tracked_metrics(step, truncated_prompts=0)}
    assert all(0 <= point.value < 1e-4 for point in histories["rollout/drift"])  # the plain engine, in float32


@pytest.mark.parametrize("reference", ["sft", "previous"])
def test_the_kl_penalty_holds_on_to_the_policy_that_is_set(models: Models, plain: str, reference: str) -> None:
    """A round begins with the policy of the one before, so from that its KL divergence is 0."""
    first = models.trace(models.train(f"ppo.reference={reference}", policy=plain)).kl[0]
    assert (first == 0.0) == (reference == "previous")


def test_with_layers_computed_again_every_stage_trains_the_same_bits(
    root: str, models: Models, plain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    again: list[object] = []

    def counted(layer: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        again.append(layer)
        return checkpoint(layer, *inputs, **options)

    monkeypatch.setattr(activation_checkpointing, "checkpoint", counted)
    option, inputs = "distributed.activation_checkpointing=true", models.inputs
    run = start(root, option)
    data = run_prepare_data(run)
    stages: dict[str, Callable[[], str]] = {
        inputs.sft: lambda: run_sft(run, data),
        inputs.reward_model: lambda: run_reward_model(run, 1, inputs.sft, data),
        inputs.cost_model: lambda: run_cost_model(run, 1, inputs.sft, data),
        plain: lambda: models.train(option),
    }
    for without, stage in stages.items():
        again.clear()
        assert models.weights(stage()) == models.weights(without)
        assert again, without


def test_all_stages_train_whole_copies(root: str) -> None:
    models = made(root, "finetune=full")
    policy = models.train("finetune=full")
    for uri in (policy, models.inputs.reward_model, models.inputs.cost_model):
        names = {path.rpartition("/")[2] for path in models.files(uri)}
        assert "weights.safetensors" in names and "adapter.safetensors" not in names, uri
    assert len(models.trace(policy).kl) == 2
