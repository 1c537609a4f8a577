"""Platform files: what they may say, what is refused, and what becomes of it in the compiled pipeline."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format

from components.foundation.errors import SettingsError
from components.foundation.scheduling import check_pool_choice
from pipelines.cluster.executors import Step, form_field, read_steps, row, steps_of
from pipelines.cluster.platform_file import is_example_image, read_platform, shipped_platforms
from pipelines.safe_rlhf import build_pipeline

PLATFORMS = Path(__file__).parents[2] / "pipelines" / "platforms"
FORM_SETTINGS = (
    "annotate.annotator",
    "base_model",
    "data.preferences",
    "ppo.kl_coefficient",
    "ppo.steps",
    "ppo.threshold_target",
)
"""Those with a field of their own in the run form."""
TRAINING = ("sft", "reward_model", "cost_model", "ppo_lagrangian")
DIGEST = "sha256:" + "a1" * 32

Tree = dict[str, Any]
Change = Callable[[Tree], Any]
Shallow = Callable[..., Any]
Compiled = Callable[[Tree], list[Step]]


@pytest.fixture
def tree() -> Tree:
    """The shipped GKE file, to be changed."""
    content: Tree = yaml.safe_load((PLATFORMS / "gke.yaml").read_text())
    return copy.deepcopy(content)


@pytest.fixture
def compiled(tmp_path: Path, shallow: Shallow) -> Compiled:
    """Platform file -> the steps of the pipeline that it compiles to, of one round."""

    def steps(tree: Tree) -> list[Step]:
        file = tmp_path / "platform.yaml"
        file.write_text(yaml.safe_dump(tree))
        pipeline = shallow(build_pipeline, 1, read_platform(str(file)))
        return steps_of(pipeline.pipeline_spec, pipeline.platform_spec)

    return steps


def environment_of(step: Step) -> dict[str, str]:
    return {variable.name: variable.value for variable in step.container.env}


def step_of(steps: list[Step], stage: str) -> Step:
    return next(step for step in steps if step.stage == stage)


REFUSALS: list[tuple[Change, str]] = [
    (
        lambda t: t["stages"]["sft"].update(pool="tpu"),
        "stage sft asks for pool 'tpu', which is none of small, generate",
    ),
    (lambda t: t["stages"].pop("cost_model"), "stage cost_model has no pool: give it one under stages"),
    (lambda t: t["stages"].update(dpo={"pool": "train", "timeout": "1h"}), "unknown stage 'dpo'"),
    (
        lambda t: t["pools"]["train"]["accelerator"].update(count=0),
        "stage sft trains a model, and pool 'train' has 0 accelerators",
    ),
    (lambda t: t["pools"]["ppo"].pop("accelerator"), "stage ppo_lagrangian trains a model, and pool 'ppo' has 0"),
    (lambda t: t["images"].update(trainer="acme/trainer:1.2"), "images.trainer: acme/trainer:1.2 is not pinned"),
    (lambda t: t["images"].update(service="acme/service@sha256:12"), "images.service: acme/service@sha256:12 is not"),
    (lambda t: t["images"].update(rollout=f"acme/rollout:latest@{DIGEST}"), "has the tag latest, which moves"),
    (lambda t: t["images"].pop("rollout"), "images.rollout is missing"),
    (lambda t: t["pools"]["train"]["memory"].update(limit="128GB"), "pools.train.memory.limit='128GB' is refused"),
    (lambda t: t["pools"]["train"]["memory"].update(limit="64Gi"), "pools.train.memory: MemoryRange"),
    (lambda t: t["pools"]["small"]["cpu"].update(request="half"), "pools.small.cpu.request='half' is refused"),
    (lambda t: t["pools"]["small"]["cpu"].update(request=0), "must have 0 < request <= limit"),
    (lambda t: t["pools"]["ppo"].update(shm="160Gi"), "shm=160Gi must be less than memory.limit=160Gi"),
    (lambda t: t["pools"]["small"].update(priority="high"), "priority=high is Kueue's, which orders what waits in a"),
    (lambda t: t["pools"]["train"].update(priority="High"), "pools.train.priority='High' is refused"),
    (lambda t: t["pools"]["train"].update(queue="q" * 64), "pools.train.queue='qqq"),
    (lambda t: t["pools"]["train"].update(gpus=8), "unknown field 'pools.train.gpus'"),
    (lambda t: t["pools"]["generate"].update(nodes=2), "stage collect runs on one node, and pool 'generate' has nodes"),
    (
        lambda t: (t["pools"]["train"].update(nodes=2), t.update(form_pool="train")),
        "pool 'train' has nodes=2, and a TrainJob takes its nodes from this file: it cannot be form_pool",
    ),
    (lambda t: t.pop("spot"), "pool 'generate' is spot capacity, and nothing says how spot nodes are marked"),
    (lambda t: t["pools"]["train"].update(capacity="cheap"), "pools.train.capacity='cheap' is refused"),
    (
        lambda t: t["pools"]["train"].update(node_selector={"gpu": True}),
        "pools.train.node_selector.gpu=True is refused",
    ),
    (lambda t: t["pools"]["train"].update(node_selector={"a b": "c"}), "pools.train.node_selector.a b"),
    (
        lambda t: t["pools"]["train"].update(tolerations=[{"key": "k", "operator": "Exists", "value": "v"}]),
        "operator Exists takes no value, and here is 'v'",
    ),
    (lambda t: t["pools"]["train"].update(tolerations=[{"effect": "NoRun"}]), "effect='NoRun' is refused"),
    (lambda t: t["pools"]["train"].update(tolerations=[{"value": "v"}]), "without a key needs operator Exists"),
    (
        lambda t: t["pools"]["train"].update(affinity={"required": [{"key": "zone", "values": []}]}),
        "zone: operator In does not go with values []",
    ),
    (lambda t: t["stages"]["sft"].update(retries=1000), "stages.sft.retries=1000 is refused"),
    (lambda t: t["stages"]["sft"].update(timeout="soon"), "stages.sft.timeout='soon' is refused"),
    (lambda t: t["stages"]["sft"].update(timeout="0h"), "stages.sft.timeout='0h' is refused"),
    (lambda t: t["stages"]["sft"].pop("timeout"), "stages.sft.timeout is missing"),
    (lambda t: t.update(user_id=0), "user_id=0 is refused"),
    (lambda t: t.update(form_pool="tpu"), "form_pool='tpu' is none of small, generate, train, ppo"),
    (lambda t: t.update(settings=["ppo.stepz=3"]), "settings: unknown setting 'ppo.stepz'"),
    (lambda t: t.update(config_map="Not A Name"), "config_map='Not A Name' is refused"),
]


@pytest.mark.fault
@pytest.mark.parametrize(("change", "sentence"), REFUSALS, ids=[sentence[:40] for _, sentence in REFUSALS])
def test_row_31_what_cannot_work_is_refused_by_name(tree: Tree, tmp_path: Path, change: Change, sentence: str) -> None:
    change(tree)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    with pytest.raises(SettingsError) as refusal:
        read_platform(str(file))
    assert str(refusal.value).startswith(f"platform file {file}: ")
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("text", "sentence"),
    [("pools: {", "is not YAML"), ("[1, 2]", "holds no fields"), ("images: 3", "images=3 is refused")],
)
def test_what_is_no_platform_file_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=sentence):
        read_platform(str(file), {"trainer": f"acme/trainer@{DIGEST}"})


def test_the_example_of_the_documentation_is_a_platform_file(tmp_path: Path) -> None:
    _, _, rest = (PLATFORMS / "README.md").read_text(encoding="utf-8").partition("```yaml\n")
    (tmp_path / "mine.yaml").write_text(rest.partition("```")[0])
    platform = read_platform(str(tmp_path / "mine.yaml"))
    assert (platform.name, platform.pool_of("ppo_lagrangian").gpus) == ("my-cluster", 1)
    assert platform.stages["ppo_lagrangian"].timeout_seconds == 24 * 3600


@pytest.mark.fault
def test_a_missing_platform_lists_the_shipped_ones() -> None:
    with pytest.raises(SettingsError, match="no platform 'azure': give a file, or one of eks, gke, local, on_prem"):
        read_platform("azure")


def test_every_stage_may_have_a_pool_of_its_own(tree: Tree, compiled: Compiled) -> None:
    stages = (*TRAINING, "collect", "evaluate")
    for number, stage in enumerate(stages, start=1):
        pool = copy.deepcopy(tree["pools"]["train"]) | {"node_selector": {"pool": stage}, "capacity": "on_demand"}
        pool["accelerator"] = {"resource": "amd.com/gpu", "count": number}
        tree["pools"][stage] = pool
        tree["stages"][stage]["pool"] = stage
    tree["form_pool"] = None
    steps = compiled(tree)
    for number, stage in enumerate(stages, start=1):
        step = step_of(steps, stage)
        assert dict(step.pod.node_selector.labels) == {"pool": stage}
        assert step.container.resources.accelerator.resource_type == "amd.com/gpu"
        assert step.container.resources.accelerator.resource_count == str(number)
    assert not step_of(steps, "annotate").container.resources.HasField("accelerator")


def test_spot_is_one_word(tree: Tree, compiled: Compiled) -> None:
    """The marks of spot nodes join the pool's own, and go with the word."""
    spot, tree["pools"]["train"]["capacity"] = compiled(tree), "on_demand"
    on_demand = compiled(tree)
    own = {"cloud.google.com/gke-accelerator": "nvidia-a100-80gb"}
    assert dict(step_of(on_demand, "sft").pod.node_selector.labels) == own
    assert dict(step_of(spot, "sft").pod.node_selector.labels) == own | {"cloud.google.com/gke-spot": "true"}
    taints = [[toleration.key for toleration in step_of(steps, "sft").pod.tolerations] for steps in (on_demand, spot)]
    assert taints == [["nvidia.com/gpu"], ["nvidia.com/gpu", "cloud.google.com/gke-spot"]]


def test_required_affinity_is_one_term_and_preferences_have_weights(tree: Tree, compiled: Compiled) -> None:
    """Kubernetes takes several required terms for alternatives, and all lines are meant."""
    lines = [{"key": "zone", "values": ["a", "b"]}, {"key": "memory", "operator": "Gt", "values": ["23000"]}]
    preferred = [{"weight": 7, "key": "nvme", "operator": "Exists"}]
    tree["pools"]["train"]["affinity"] = {"required": lines, "preferred": preferred}
    terms = step_of(compiled(tree), "cost_model").pod.node_affinity
    assert [[(e.key, e.operator, list(e.values)) for e in term.match_expressions] for term in terms] == [
        [("zone", "In", ["a", "b"]), ("memory", "Gt", ["23000"])],
        [("nvme", "Exists", [])],
    ]
    assert [term.HasField("weight") and term.weight for term in terms] == [False, 7]


def test_the_priority_of_a_pool_is_kueues_label_on_its_steps(tree: Tree, compiled: Compiled) -> None:
    tree["pools"]["train"]["priority"] = "high"
    labels = {step.stage: dict(step.pod.pod_metadata.labels) for step in compiled(tree)}
    queue = {"kueue.x-k8s.io/queue-name": "saferlhf"}
    assert labels["sft"] == labels["cost_model"] == queue | {"kueue.x-k8s.io/priority-class": "high"}
    assert (labels["ppo_lagrangian"], labels["annotate"]) == (queue, {})


def test_a_stage_over_several_nodes_is_followed_from_a_small_pod(tree: Tree, compiled: Compiled) -> None:
    """Its own pod asks for no accelerator; it is told what to ask for in a TrainJob, which gets no judge's key."""
    line = {"key": "zone", "values": ["a"]}
    tree["pools"]["ppo"] |= {"nodes": 4, "accelerator": {"count": 8}, "capacity": "spot", "priority": "high"}
    tree["pools"]["ppo"]["affinity"] = {"required": [line], "preferred": [line | {"weight": 7}]}
    tree["form_pool"], tree["config_map"] = "train", "elsewhere"
    steps = compiled(tree)
    step = step_of(steps, "ppo_lagrangian")
    assert not step.container.resources.HasField("accelerator")
    assert step.container.resources.resource_memory_limit == tree["pools"]["small"]["memory"]["limit"]
    assert step.pod.active_deadline_seconds == 0
    told = json.loads(environment_of(step)["SAFERLHF_TRAIN_JOB"])
    assert [(e["variable"], e["kind"], e["name"]) for e in told.pop("environment")] == [
        ("SAFERLHF_STORE_URI", "configMap", "elsewhere"),
        ("MLFLOW_TRACKING_URI", "configMap", "elsewhere"),
        ("AWS_DEFAULT_REGION", "configMap", "elsewhere"),
        ("AWS_ENDPOINT_URL", "configMap", "elsewhere"),
        ("SAFERLHF_LOG_FORMAT", "configMap", "elsewhere"),
        ("SAFERLHF_METRICS_ADDRESS", "configMap", "elsewhere"),
        ("SAFERLHF_METRICS_PORT", "configMap", "elsewhere"),
        ("AWS_ACCESS_KEY_ID", "secret", "saferlhf-s3"),
        ("AWS_SECRET_ACCESS_KEY", "secret", "saferlhf-s3"),
        ("MLFLOW_TRACKING_USERNAME", "secret", "saferlhf-mlflow"),
        ("MLFLOW_TRACKING_PASSWORD", "secret", "saferlhf-mlflow"),
    ]
    assert told == {
        "image": tree["images"]["trainer"],
        "nodes": 4,
        "processes_per_node": 8,
        "resources": {"cpu": "12", "memory": "160Gi", "nvidia.com/gpu": "8"},
        "requests": {"cpu": "10", "memory": "128Gi"},
        "shared_memory": "32Gi",
        "service_account": "saferlhf",
        "user_id": 10001,
        "node_selector": {
            "cloud.google.com/gke-accelerator": "nvidia-a100-80gb",
            "cloud.google.com/gke-spot": "true",
        },
        "tolerations": [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"},
        ],
        "affinity": {
            "required": [line | {"operator": "In"}],
            "preferred": [line | {"operator": "In", "weight": 7}],
        },
        "queue": "saferlhf",
        "priority": "high",
        "deadline_seconds": 86400,
        "retries": 5,
    }
    assert row(step)["accelerator"] == "4 nodes x 8 x nvidia.com/gpu"
    assert not step.pod.node_affinity
    assert not step.pod.pod_metadata.labels, "what waits in the queue is the job"
    assert "SAFERLHF_PROCESSES" not in environment_of(step)
    assert "SAFERLHF_TRAIN_JOB" not in environment_of(step_of(steps, "sft"))


def test_a_training_stage_has_a_rank_for_each_accelerator_of_its_pool(tree: Tree, compiled: Compiled) -> None:
    """Others run one model in one process, and without accelerators the settings decide."""
    tree["pools"]["train"]["accelerator"]["count"] = 8
    told = {step.stage: environment_of(step).get("SAFERLHF_PROCESSES") for step in compiled(tree)}
    assert {stage: told[stage] for stage in TRAINING} == dict.fromkeys(TRAINING[:3], "8") | {"ppo_lagrangian": "1"}
    assert not any(told[stage] for stage in told.keys() - set(TRAINING))
    tree["cpu_training"] = True
    tree["pools"]["ppo"].pop("accelerator")
    assert "SAFERLHF_PROCESSES" not in environment_of(step_of(compiled(tree), "ppo_lagrangian"))


def test_a_stage_may_run_in_another_image(tree: Tree, compiled: Compiled) -> None:
    tree["images"] = {name: f"acme.example/{name}:1.2@{DIGEST}" for name in ("trainer", "rollout", "service")}
    tree["stages"]["evaluate"]["image"] = "rollout"
    steps = compiled(tree)
    images = {step.stage: step.container.image for step in steps}
    assert images["evaluate"] == images["collect"] == tree["images"]["rollout"]
    assert images["sft"] == tree["images"]["trainer"]
    assert images["gate"] == tree["images"]["service"]


def test_one_secret_may_hold_all_keys(tree: Tree, compiled: Compiled) -> None:
    tree["secrets"] = {"store": "keys", "tracking": "keys", "judge": "keys"}
    secrets = step_of(compiled(tree), "annotate").pod.secret_as_env
    assert {secret.secret_name for secret in secrets} == {"keys"}
    assert [key.env_var for secret in secrets for key in secret.key_to_env] == [
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
        "SAFERLHF_JUDGE_KEY",
    ]


def test_settings_of_the_file_are_the_forms_default(shallow: Shallow) -> None:
    platform = read_platform(str(PLATFORMS / "local.yaml"))
    inputs = shallow(build_pipeline, 1, platform).pipeline_spec.root.input_definitions.parameters
    assert inputs["run_set"].default_value.string_value == '["dtype=float32"]'


@pytest.mark.parametrize("platform", ["", *shipped_platforms()])
def test_a_run_needs_no_input(shallow: Shallow, platform: str) -> None:
    """Every field of the run form has a default; names are grouped by their prefix, and few."""
    pipeline = shallow(build_pipeline, 1, read_platform(platform) if platform else None)
    inputs = pipeline.pipeline_spec.root.input_definitions.parameters
    assert all(definition.is_optional for definition in inputs.values())
    run = {"run_id", "run_uri", "run_profile", "run_seed", "run_set"}
    run |= {f"set_{setting.replace('.', '_')}" for setting in FORM_SETTINGS}
    pool = {"pool_node_selector", "pool_tolerations"} if platform not in ("", "local") else set()
    assert set(inputs) == run | pool


def test_a_field_of_the_form_is_the_setting_that_its_name_says(shallow: Shallow) -> None:
    start = shallow(build_pipeline, 1, None).pipeline_spec.root.dag.tasks["start-run"].inputs.parameters
    for name in (setting.replace(".", "_") for setting in FORM_SETTINGS):
        assert start[name].component_input_parameter == f"set_{name}"


def test_a_run_without_an_id_is_named_after_kubeflows(shallow: Shallow) -> None:
    start = shallow(build_pipeline, 1, None).pipeline_spec.root.dag.tasks["start-run"].inputs.parameters
    assert start["kfp_run_id"].runtime_value.constant.string_value == "{{$.pipeline_job_uuid}}"
    assert start["run_id"].component_input_parameter == "run_id"


def test_the_form_shows_the_nodes_of_its_pool_and_its_steps_take_them_from_there(shallow: Shallow) -> None:
    pipeline = shallow(build_pipeline, 2, read_platform("gke"))
    inputs = pipeline.pipeline_spec.root.input_definitions.parameters
    selector, tolerations = inputs["pool_node_selector"], inputs["pool_tolerations"]
    assert dict(selector.default_value.struct_value) == {"cloud.google.com/gke-accelerator": "nvidia-a100-80gb"}
    assert [dict(item.struct_value) for item in tolerations.default_value.list_value.values] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]
    for step in steps_of(pipeline.pipeline_spec, pipeline.platform_spec):
        chosen = form_field(step.pod.node_selector.node_selector_json)
        assert chosen == ("pool_node_selector" if step.stage == "ppo_lagrangian" else "")
    start = pipeline.pipeline_spec.root.dag.tasks["start-run"]
    (box,) = [c for c in pipeline.pipeline_spec.components.values() if "alignment-round" in c.dag.tasks]
    for name in ("pool_node_selector", "pool_tolerations"):
        assert start.inputs.parameters[name].component_input_parameter == name
        for number in ("", "-2"):
            assert form_field(box.dag.tasks[f"alignment-round{number}"].inputs.parameters[name]) == name


@pytest.mark.parametrize("platform", [name for name in shipped_platforms() if name != "local"])
def test_what_a_step_takes_from_the_form_is_an_input_of_the_box_around_it(shallow: Shallow, platform: str) -> None:
    """KFP's driver looks for it there, and nowhere else."""
    compiled = shallow(build_pipeline, 2, read_platform(platform))
    platforms = json_format.MessageToDict(compiled.platform_spec)["platforms"]
    pods = platforms["kubernetes"]["deploymentSpec"]["executors"]
    components = compiled.pipeline_spec.components
    looked_up = 0
    for box in [compiled.pipeline_spec.root, *(c for c in components.values() if c.HasField("dag"))]:
        for task in box.dag.tasks.values():
            pod = pods.get(components[task.component_ref.name].executor_label, {})
            wanted = [pod.get("nodeSelector", {}).get("nodeSelectorJson")]
            wanted += [toleration.get("tolerationJson") for toleration in pod.get("tolerations", [])]
            for parameter in filter(None, wanted):
                assert parameter["componentInputParameter"] in box.input_definitions.parameters
                looked_up += 1
    assert looked_up


@pytest.mark.fault
@pytest.mark.parametrize(
    ("selector", "tolerations", "sentence"),
    [
        ({"gpu": 1}, [], "pool_node_selector: gpu=1 is refused"),
        ("gpu=a100", [], "pool_node_selector: 'gpu=a100' is refused"),
        ({"gpu": "a 100"}, [], "pool_node_selector: gpu='a 100' is refused"),
        ({}, [{"key": "k", "operator": "Is"}], "pool_tolerations: 0.operator='Is' is refused"),
        ({}, [{"key": "k", "seconds": 3}], "pool_tolerations: unknown field '0.seconds'"),
        ({}, {"key": "k"}, "pool_tolerations: {'key': 'k'} is refused"),
    ],
)
def test_what_the_form_gives_for_the_pool_is_checked(selector: Any, tolerations: Any, sentence: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        check_pool_choice(selector, tolerations)
    assert sentence in str(refusal.value)


def test_what_the_form_shows_passes_its_own_check() -> None:
    check_pool_choice({}, [])
    check_pool_choice(
        {"a.example/b": "c"}, [{"key": "k", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60.0}]
    )


class TestCommand:
    """`saferlhf compile --platform`."""

    def compile(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from pipelines.cli import main; main()", "compile", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    def test_own_images_and_the_table(self, tmp_path: Path) -> None:
        output = tmp_path / "p.yaml"
        images = [
            part
            for name in ("trainer", "rollout", "service")
            for part in (f"--image-{name}", f"acme.example/{name}@{DIGEST}")
        ]
        done = self.compile("--platform", "gke", "--rounds", "1", "--table", "-o", str(output), *images)
        assert done.returncode == 0, done.stderr
        assert {step.container.image for step in read_steps(output.read_text())} == set(images[1::2])
        assert done.stderr == ""
        header, *lines = done.stdout.splitlines()
        assert header.split()[:5] == ["stage", "image", "cpu", "memory", "accelerator"]
        ppo = next(line for line in lines if line.startswith("ppo_lagrangian"))
        assert "trainer@a1a1a1a1a1a1" in ppo
        assert "128Gi to 160Gi" in ppo
        assert done.stdout.endswith("start its runs with the service account saferlhf\n")

    @pytest.mark.fault
    def test_a_refusal_is_one_sentence_and_nothing_is_written(self, tmp_path: Path) -> None:
        output = tmp_path / "p.yaml"
        done = self.compile("-o", str(output), "--platform", "gke", "--image-service", "acme/service:2")
        assert done.returncode == 1
        assert done.stderr.startswith("saferlhf: ")
        assert "acme/service:2 is not pinned" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not output.exists()

    @pytest.mark.fault
    def test_images_that_nobody_named_are_refused_unless_they_are_meant(self, tmp_path: Path) -> None:
        """As where `$(cat pushed)` found no file."""
        output, image = tmp_path / "p.yaml", f"--image-service=acme.example/service@{DIGEST}"
        done = self.compile("-o", str(output), "--platform", "gke", image)
        assert (done.returncode, len(done.stderr.splitlines()), output.exists()) == (1, 1, False)
        assert "has only examples of the images trainer, rollout: give yours with --image-trainer, --image-rollout" in (
            done.stderr
        )
        done = self.compile("-o", str(output), "--platform", "gke", "--rounds", "1", "--example-images")
        assert done.returncode == 0, done.stderr
        assert all(is_example_image(step.container.image) for step in read_steps(output.read_text()))

    @pytest.mark.fault
    def test_without_a_platform_no_step_has_a_place(self, tmp_path: Path) -> None:
        done = self.compile("-o", str(tmp_path / "p.yaml"))
        assert (done.returncode, "'--platform'" in done.stderr, [*tmp_path.iterdir()]) == (2, True, [])
