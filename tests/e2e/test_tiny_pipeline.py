"""The whole pipeline on a tiny random model, through the command that users type."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from components.foundation.exit_codes import NOTHING_NEW_EXIT_CODE
from tests.e2e.command import SAFERLHF, saferlhf
from tests.integration.kubernetes_server import KubernetesServer, kubeconfig
from tests.unit.webhook_server import webhook

pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("pipeline")]

OPEN_GATE = (
    "gate.max_unsafe_rate=1",
    "gate.min_win_rate=0",
    "gate.max_over_refusal_rate=1",
    "gate.max_wrong_share=1",
)

PLANTED = {"SAFERLHF_JUDGE_KEY": "planted-judge-key", "HF_TOKEN": "planted-hub-token"}
"""Keys in the environment of a run, which nobody may find again."""


def run_tiny(workdir: Path, *settings: str, **environment: str) -> tuple[dict[str, Any], str]:
    arguments = [part for setting in settings for part in ("--set", setting)]
    done = saferlhf("run", "--profile", "tiny", "--workdir", str(workdir), *arguments, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((workdir / "summary.json").read_text())
    summary["page"] = Path(summary["report"]).read_text(encoding="utf-8")  # the next run in the folder replaces it
    return summary, done.stdout


def interrupted(
    arguments: Sequence[str], line: str, number: signal.Signals
) -> tuple[str, list[str], list[psutil.Process]]:
    """Send a signal to a run as soon as it prints `line`; returns its id, the command that it names for going on, and
    the processes that it had.

    SIGINT goes to all of its process group, as a terminal sends it.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_"))}
    with subprocess.Popen(
        [str(SAFERLHF), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert any(line in text for text in process.stdout)
        children = psutil.Process(process.pid).children(recursive=True)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    run_id = first.split()[-1]
    stopping, ended = errors.strip().splitlines()
    assert stopping == "saferlhf: stopping, once the step in progress is saved; again to stop now"
    words, _, go_on = ended.partition("; to go on: ")
    assert (words, shlex.split(go_on)[0]) == ("saferlhf: interrupted", str(SAFERLHF))
    return run_id, shlex.split(go_on)[1:], children


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kfp-work")


@pytest.fixture(scope="module")
def first_run(workdir: Path) -> tuple[dict[str, Any], str]:
    """Two rounds, with a gate that lets everything pass.

    `summary["told"]` is what the webhook got, `summary["commands"]` the command lines that were seen meanwhile.
    """
    with webhook([204]) as (url, told), command_lines() as commands:
        summary, output = run_tiny(workdir, *OPEN_GATE, SAFERLHF_WEBHOOK_URL=url, **PLANTED)
    return summary | {"told": told, "commands": commands}, output


@contextmanager
def command_lines() -> Iterator[set[str]]:
    """The command lines of all processes that this one has below it, looked at again and again."""
    seen: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.1):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    seen.add(" ".join(process.cmdline()))

    watcher = threading.Thread(target=look)
    watcher.start()
    yield seen
    over.set()
    watcher.join()


def test_every_stage_ran(first_run: tuple[dict[str, Any], str]) -> None:
    summary, _ = first_run
    assert 0.1e9 < summary["peak_memory_bytes"] < 24e9
    expected = {f"round-0/{stage}" for stage in ("prepare_data", "sft", "evaluate", "report")}
    stages = ("collect", "annotate", "reward_model", "cost_model", "ppo_lagrangian", "evaluate")
    expected |= {f"round-{number}/{stage}" for number in (1, 2) for stage in stages}
    assert set(summary["stage_seconds"]) == expected
    assert [entry["round"] for entry in summary["rounds"]] == [1, 2]
    for entry in summary["rounds"]:
        assert entry["ppo"]["steps"] == 2
        for series in ("lambda", "cost", "reward", "kl"):
            assert len(entry["ppo"][series]) == 2
        assert 0.0 <= entry["eval"]["unsafe_rate_ci"][0] <= entry["eval"]["unsafe_rate"]
        assert entry["eval"]["n_red_team"] == entry["eval"]["n_benign"] == 16
    assert summary["rounds"][0]["policy_uri"] != summary["rounds"][1]["policy_uri"]


def test_multiplier_moves_with_the_violation(first_run: tuple[dict[str, Any], str]) -> None:
    """The first step's moving average is that step's mean cost, so its direction can be told from the summary."""
    start = 1.0
    for entry in first_run[0]["rounds"]:
        ppo = entry["ppo"]
        assert (ppo["lambda"][0] > start) == (ppo["cost"][0] > ppo["threshold"])
        start = ppo["lambda"][-1]  # the next round goes on from there


def test_open_gate_promotes(first_run: tuple[dict[str, Any], str]) -> None:
    promoted = first_run[0]["promotion"]
    assert (promoted["decision"], promoted["alias"], promoted["version"]) == ("promote", "champion", "1")


def test_the_webhook_was_told_once_how_the_run_ended(first_run: tuple[dict[str, Any], str]) -> None:
    summary = first_run[0]
    (told,) = summary["told"]
    links = told.pop("links")
    last = summary["rounds"][-1]["eval"]
    assert told == {
        "run_id": summary["run_id"],
        "status": "succeeded",
        "decision": "promote",
        "round": 2,
        "unsafe_rate": last["unsafe_rate"],
        "win_rate": last["win_rate"],
    }
    assert links["store"].endswith(f"/runs/{summary['run_id']}")
    assert links["report"].startswith(links["store"]) and links["report"].endswith("/report.html")
    tracking_uri, parent = summary["mlflow"]["tracking_uri"], summary["mlflow"]["parent_run_id"]
    assert re.fullmatch(rf"{re.escape(tracking_uri)}/#/experiments/\d+/runs/{parent}", links["mlflow"])


def test_an_interrupted_run_goes_on_where_it_stopped(first_run: tuple[dict[str, Any], str], workdir: Path) -> None:
    """Ctrl-C in the middle of PPO, which saves its state; the resumed run finds what was finished and goes on within
    the stage, and its closed gate keeps the champion."""
    arguments = ("run", "--profile", "tiny", "--workdir", str(workdir), "--set", "rounds=1")
    arguments += ("--set", "gate.max_unsafe_rate=0", "--set", "ppo.cost_aggregation=rectified")
    options = (
        "ppo.macro_action=ngram",
        "ppo.lagrangian=pid",
        "ppo.critics=head",
        "ppo.ptx_coefficient=0.5",
        "ppo.steps=8",
    )
    arguments += tuple(word for option in options for word in ("--set", option))
    run_id, go_on, _ = interrupted(arguments, "step 2: cost", signal.SIGINT)
    done = saferlhf(*go_on)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "progress sft" not in done.stdout  # the stage was opened, and had nothing left to do
    assert "ppo_lagrangian: goes on after step" in done.stdout
    assert "step 1: cost" not in done.stdout
    assert "progress ppo_lagrangian 8/8" in done.stdout
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["run_id"] == run_id
    assert min(summary["rounds"][0]["ppo"]["cost"]) >= 0  # rectified
    kept = summary["promotion"]
    assert (kept["decision"], kept["alias"], kept["version"]) == ("challenger", "challenger", "2")
    assert any(reason.startswith("failed: upper bound of the unsafe rate") for reason in kept["reasons"])
    assert any("champion, version 1" in reason for reason in kept["reasons"])
    refused = saferlhf(*arguments, "--set", "ppo.steps=9", "--resume", run_id)
    assert refused.returncode == 1
    assert "other settings (ppo.steps (8 there, 9 here))" in refused.stderr


def test_the_registry_tells_who_is_champion_why_and_from_what(
    first_run: tuple[dict[str, Any], str], workdir: Path
) -> None:
    """Version 1 is the first run's and champion; version 2, where the test before ran, is a challenger."""
    where = ("--workdir", str(workdir))
    assert saferlhf("up", *where).returncode == 0
    try:
        listed = saferlhf("registry", "list", *where).stdout.splitlines()
        assert [line.split()[0] for line in listed] == ["version", *map(str, range(1, len(listed)))]
        assert listed[1].endswith("champion") and first_run[0]["run_id"] in listed[1]
        shown = saferlhf("registry", "show", "champion", *where).stdout
        assert "by promote, as the first" in shown and "passed: over-refusal rate" in shown
        assert "passed: share of wrong regression prompts" in shown
        assert re.search(r"regression suite: \d+ of 24 right", shown)
        file = workdir / "service.yaml"
        assert saferlhf("serve", "render", "-o", str(file), *where).returncode == 0
        assert f"storageUri: {first_run[0]['rounds'][-1]['policy_uri']}/model\n" in file.read_text()
        origin = saferlhf("lineage", *where).stdout
        assert origin.splitlines()[0] == first_run[0]["rounds"][-1]["policy_uri"]
        for stage in ("round-2/cost_model", "round-1/ppo_lagrangian", "round-1/annotate", "round-0/prepare_data"):
            assert stage in origin
        assert re.search(r"^ +[0-9a-f]{64}  preferences_train.jsonl$", origin, re.MULTILINE)
        share = ("--version", "1", "--canary-share", "0.1")
        assert saferlhf("serve", "render", "-o", str(file), *share, *where).returncode == 0
        assert "canaryTrafficPercent: 10\n" in file.read_text()
        assert served_by_a_cluster(where, workdir) == f"{first_run[0]['rounds'][-1]['policy_uri']}/model"
        again = saferlhf("promote", "1", *where)  # it is champion already
        assert again.returncode == 0 and "saferlhf-policy-serving/000001.yaml" in again.stdout
        for arguments, words in (
            (("promote", "99"), "has no version or alias '99'"),
            (("rollback", "--reason", "why not"), "no champion before the present one"),
        ):
            refused = saferlhf(*arguments, *where)
            assert refused.returncode == 1 and words in refused.stderr
            assert len(refused.stderr.strip().splitlines()) == 1
    finally:
        saferlhf("down", *where)


def served_by_a_cluster(where: Sequence[str], folder: Path) -> str:
    """What a cluster's InferenceService serves after `serve apply`."""
    server = KubernetesServer()
    environment = {"KUBECONFIG": kubeconfig(folder / "kubeconfig", server.url, "team")}
    applied = saferlhf("serve", "apply", *where, environment=environment)
    uri: str = server.services["saferlhf-policy"]["spec"]["predictor"]["model"]["storageUri"]
    server.stop()
    assert (applied.returncode, server.problems) == (0, [])
    assert applied.stdout == f"applied InferenceService team/saferlhf-policy: {uri}\n"
    return uri


def test_a_later_round_trains_its_cost_model_on_as_many_pairs_as_set(first_run: tuple[dict[str, Any], str]) -> None:
    """As many as the reward model in the first round, then 32 pairs, two batches; the reward model takes all again."""
    last_steps = re.findall(r"^progress (cost_model|reward_model) (\d+)/\2 ", first_run[1], re.MULTILINE)
    cost, reward = (
        [int(steps) for name, steps in last_steps if name == f"{kind}_model"] for kind in ("cost", "reward")
    )
    assert cost == [reward[0], 2]
    assert reward[1] >= reward[0] > 2


def test_a_cost_model_scores_the_answers_that_its_round_collected(
    first_run: tuple[dict[str, Any], str], workdir: Path
) -> None:
    """16 answers a round, those alike and empty ones left out; PPO has read them, so they are in the run's cache."""
    cached = (path.read_bytes() for path in (workdir / "cache").rglob("*") if path.is_file())
    results = [json.loads(content) for content in cached if b'"newest_safe_costs"' in content]
    counts = [len(r["newest_safe_costs"] + r["newest_unsafe_costs"]) for r in results if r["auc"] is not None]
    assert len(counts) >= len(first_run[0]["rounds"])  # other runs in the same folder have theirs there too
    assert all(0 < count <= 16 and count % 2 == 0 for count in counts)


def test_output_is_ours_alone(first_run: tuple[dict[str, Any], str]) -> None:
    lines = first_run[1].splitlines()
    assert any(line.startswith("progress ppo_lagrangian 2/2 steps") for line in lines)
    assert not [line for line in lines if "Warning" in line or "Traceback" in line]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("ppo.stepz=3", ["unknown setting", "ppo.stepz"]),
        ("ppo.clip_ratio=2", ["ppo.clip_ratio", "2"]),
        ("ppo.engine=vllm", ["needs vLLM", "make vllm"]),
        ("data.preferences=/nowhere.jsonl", ["/nowhere.jsonl", "does not exist"]),
        ("base_model=/nowhere", ["/nowhere", "does not exist"]),
    ],
)
def test_row_31_bad_settings_are_refused_in_one_sentence(tmp_path: Path, setting: str, words: list[str]) -> None:
    done = saferlhf("run", "--profile", "tiny", "--workdir", str(tmp_path), "--set", setting)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert all(word in done.stderr for word in words)
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.fault
def test_row_29_evaluation_counts_the_prompts_that_it_cut(first_run: tuple[dict[str, Any], str], workdir: Path) -> None:
    with closing(sqlite3.connect(f"file:{workdir}/services/mlflow.db?mode=ro", uri=True)) as database:
        rows = database.execute("select step, value from metrics where key = 'evaluate/truncated_prompts'").fetchall()
    counts = dict(rows)
    assert {0, 1, 2} <= counts.keys() and len({counts[step] for step in (0, 1, 2)}) == 1 and counts[0] > 0


@pytest.mark.fault
def test_row_33_keys_stand_in_nothing_that_a_run_leaves_or_says(
    first_run: tuple[dict[str, Any], str], workdir: Path
) -> None:
    """Planted ones and those of the run's own store: not in output, arguments, or files but the store's own."""
    summary, output = first_run
    config = workdir / "services" / "s3.json"
    assert config.stat().st_mode & 0o077 == 0
    (own,) = json.loads(config.read_text())["identities"][0]["credentials"]
    files = [path for path in workdir.rglob("*") if path.is_file() and path != config]
    for part in ("summary.json", "report.html", "mlflow.db"):  # what is looked through is really there
        assert part in {path.name for path in files}
    for program in ("saferlhf run", "kfp.dsl.executor_main", "weed", "pipelines.local.mlflow_server"):
        assert any(program in command for command in summary["commands"]), program
    for secret in (own["secretKey"], "hidden-token", *PLANTED.values()):
        assert secret not in output
        assert not [command for command in summary["commands"] if secret in command]
        assert not [path for path in files if secret.encode() in path.read_bytes()]


@pytest.mark.fault
def test_row_33_keys_stand_in_no_compiled_pipeline(tmp_path: Path) -> None:
    compiled = tmp_path / "pipeline.yaml"
    planted = {**PLANTED, "AWS_SECRET_ACCESS_KEY": "planted-store-key"}
    done = saferlhf("compile", "-o", str(compiled), "--platform", "gke", "--example-images", environment=planted)
    assert done.returncode == 0, done.stderr
    text = compiled.read_text() + done.stdout + done.stderr
    assert "AWS_SECRET_ACCESS_KEY" in text  # its name, in the secret that a step gets it from
    assert not [secret for secret in planted.values() if secret in text]


def test_report_and_closing_words(first_run: tuple[dict[str, Any], str], workdir: Path) -> None:
    summary, output = first_run
    page = summary["page"]
    assert summary["run_id"] in page
    assert "<script" not in page
    for told in (summary["report"], summary["rounds"][-1]["policy_uri"], "lambda trace"):
        assert told in output
    for action in ("up", "down"):  # as they can be typed, whatever is on the PATH
        assert f"{SAFERLHF} {action} --workdir {workdir}" in output


def test_exported_policy_loads_without_our_code(first_run: tuple[dict[str, Any], str]) -> None:
    """A fresh interpreter, outside the project, with plain transformers."""
    folder = next(line.split()[-1] for line in first_run[1].splitlines() if "on this disk" in line)
    assert {"README.md", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in Path(folder).iterdir()
    }
    program = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({folder!r}); tok = AutoTokenizer.from_pretrained({folder!r})\n"
        "ids = tok.apply_chat_template([{'role': 'user', 'content': 'Hi'}], return_tensors='pt', return_dict=True)\n"
        "assert model.generate(**ids, max_new_tokens=4).shape[1] > ids['input_ids'].shape[1]\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('components', 'pipelines')]"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_process_behind(tmp_path: Path, number: signal.Signals) -> None:
    *_, children = interrupted(("run", "--profile", "tiny", "--workdir", str(tmp_path)), "sft: started", number)
    assert len(children) >= 3  # S3, MLflow, the step
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.fault
def test_a_run_whose_terminal_is_closed_stops_its_step_and_tells_mlflow(tmp_path: Path) -> None:
    """A step that was not asked, but killed, would stand in MLflow as running."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_"))}
    command = ["setsid", "--ctty", "env", "--default-signal=HUP", str(SAFERLHF), "run", "--profile", "tiny"]
    master, slave = os.openpty()
    with subprocess.Popen(
        [*command, "--workdir", str(tmp_path)], stdin=slave, stdout=slave, stderr=slave, env=environment
    ) as process:
        os.close(slave)
        with os.fdopen(master, errors="replace") as terminal:
            assert any("sft: started" in line for line in terminal)
            children = psutil.Process(process.pid).children(recursive=True)
        assert process.wait(60) == 130
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    with closing(sqlite3.connect(tmp_path / "services" / "mlflow.db")) as database:
        statuses = [status for (status,) in database.execute("SELECT status FROM runs")]
    assert "KILLED" in statuses and "RUNNING" not in statuses


@pytest.mark.fault
@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI"])
def test_row_34_an_unreachable_server_is_named_before_anything_starts(tmp_path: Path, name: str) -> None:
    with socket.socket() as held:  # bound, never listening: nobody else can answer there
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
        done = saferlhf("run", "--profile", "tiny", "--workdir", str(tmp_path), environment=keys | {name: url})
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert url in done.stderr
    assert "sft: started" not in done.stdout


@pytest.mark.fault
def test_row_22_a_file_with_too_many_broken_lines_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "demonstrations.jsonl"
    file.write_text('{"prompt": "Hi", "response": "Hello."}\n' * 8 + "{broken\n" * 2)
    done = saferlhf("run", "--profile", "tiny", "--workdir", str(tmp_path), "--set", f"data.demonstrations={file}")
    assert done.returncode == 1
    assert str(file) in done.stderr and "2 of 10" in done.stderr
    assert "sft: started" not in done.stdout
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.fault
def test_row_24_a_threshold_that_no_policy_can_miss_is_refused(
    first_run: tuple[dict[str, Any], str], workdir: Path
) -> None:
    """Known only once a cost model is there: PPO does not start, and nothing is registered."""
    branch = ("--from-run", first_run[0]["run_id"], "--from-round", "1")  # what comes before is all the same
    done = saferlhf("run", "--profile", "tiny", "--workdir", str(workdir), *branch, "--set", "ppo.threshold=1000")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "threshold 1000" in done.stderr and "inert" in done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(
        rf"run \S+ has failed; once the cause is mended, go on with: {SAFERLHF} run .*--resume \S+", last
    )
    assert f"--workdir {workdir}" in last and "--set ppo.threshold=1000" in last
    assert "step 1:" not in done.stdout and "register: started" not in done.stdout


def test_row_32_a_run_without_new_data_ends_before_sft_with_a_status_of_its_own(
    first_run: tuple[dict[str, Any], str], workdir: Path
) -> None:
    """The champion was made from the same data."""
    before = (workdir / "summary.json").read_bytes()
    done = saferlhf("run", "--profile", "tiny", "--workdir", str(workdir), "--set", "data.min_new_pairs=1")
    assert done.returncode == NOTHING_NEW_EXIT_CODE, done.stdout + done.stderr
    assert done.stderr == ""
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"nothing new: 0 new preference pairs since champion v\d+ \(needs 1\): the run ends here", last)
    assert "sft: started" not in done.stdout and "evaluate: started" not in done.stdout
    assert (workdir / "summary.json").read_bytes() == before


def test_a_run_starts_at_a_round_of_an_earlier_one(first_run: tuple[dict[str, Any], str], workdir: Path) -> None:
    """Round 2 with one more step of PPO; round 1 and what is before it are the first run's."""
    earlier = first_run[0]
    where = ("run", "--profile", "tiny", "--workdir", str(workdir), "--from-run", earlier["run_id"])
    refused = saferlhf(*where, "--from-round", "2", "--seed", "1")
    assert refused.returncode == 1 and "seed (0 there, 1 here)" in refused.stderr
    assert "start_run: started" not in refused.stdout and "prepare_data: started" not in refused.stdout
    done = saferlhf(*where, "--from-round", "2", "--set", "ppo.steps=3", "--set", "gate.max_unsafe_rate=0")
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("progress sft", "round 1 ppo_lagrangian: step"):
        assert line not in done.stdout
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["run_id"] != earlier["run_id"]
    assert summary["rounds"][0] == earlier["rounds"][0]
    assert summary["rounds"][1]["ppo"]["steps"] == 3
    assert summary["run_id"] in summary["rounds"][1]["policy_uri"]
    assert summary["overhead_seconds"] > 0  # the seconds of what was taken over are not this run's
