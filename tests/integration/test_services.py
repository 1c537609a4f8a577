from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import ServiceError
from components.foundation.tracking import Tracker
from pipelines.local import server_process, services
from pipelines.local.services import Endpoints, down, local_services, up

TRACKING_ELSEWHERE = "http://tracking.example.org"
S3_ELSEWHERE = {"AWS_ENDPOINT_URL": "http://s3.example.org", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}


@pytest.fixture(autouse=True)
def _no_given_servers(no_given_servers: None) -> None:
    """Each test says itself which servers the environment names."""


@pytest.fixture
def upped(tmp_path: Path) -> Iterator[Callable[[], Endpoints]]:
    """`up` in the test's folder, and `down` at the end whatever happens."""
    yield lambda: up(tmp_path)[0]
    down(tmp_path)


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]


def pids_of(work_dir: Path) -> list[int]:
    state = json.loads((work_dir / "services" / "state.json").read_text())
    return [server["pid"] for server in state["servers"]]


def test_servers_of_the_environment_are_used_and_nothing_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = children()
    given = S3_ELSEWHERE | {"MLFLOW_TRACKING_URI": TRACKING_ELSEWHERE}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with local_services(tmp_path) as endpoints:
        assert children() == before
    assert endpoints == Endpoints("http://s3.example.org", TRACKING_ELSEWHERE, given)
    assert list(tmp_path.iterdir()) == []


def test_servers_that_stay_up_keep_their_data(tmp_path: Path, upped: Callable[[], Endpoints]) -> None:
    first = upped()
    assert up(tmp_path) == (first, False)
    check_that_only_the_owner_gets_in(tmp_path)
    with local_services(tmp_path) as reused:
        assert reused == first
        store = CheckpointStore("s3://saferlhf-test/up", environment=first.environment)
        store.ensure_bucket()
        store.write_text("s3://saferlhf-test/up/note", "kept")
        tracker = Tracker(first.tracking_uri, "kept")
        run_id = tracker.start_pipeline_run("run-1", "name", {})
        with tracker.stage(run_id, "sft", 1) as stage:
            stage.log_text("kept", "note.txt")
        version = tracker.register_model("policy", "s3://saferlhf-test/up", stage.run_id, {})
    assert all(psutil.pid_exists(pid) for pid in pids_of(tmp_path))

    assert down(tmp_path) is True
    assert down(tmp_path) is False
    second = upped()
    assert (
        CheckpointStore("s3://saferlhf-test", environment=second.environment).read_text("s3://saferlhf-test/up/note")
        == "kept"
    )
    tracker = Tracker(second.tracking_uri, "kept")
    assert tracker.start_pipeline_run("run-1", "name", {}) == run_id
    assert tracker.register_model("policy", "s3://saferlhf-test/up", stage.run_id, {}) == version


def check_that_only_the_owner_gets_in(work_dir: Path) -> None:
    folder = work_dir / "services"
    assert folder.stat().st_mode & 0o077 == 0
    for name in ("state.json", "s3.json"):
        assert (folder / name).stat().st_mode & 0o077 == 0
    secret = json.loads((folder / "s3.json").read_text())["identities"][0]["credentials"][0]["secretKey"]
    assert secret not in (folder / "state.json").read_text()
    for pid in pids_of(work_dir):
        process = psutil.Process(pid)
        listening = [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert listening
        assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}
        assert secret not in " ".join(process.cmdline())
        assert os.getsid(pid) != os.getsid(0)  # a Ctrl-C in our terminal goes to our session only


def test_a_process_id_that_was_given_to_another_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "600"]) as stranger:
        try:
            folder = tmp_path / "services"
            folder.mkdir()
            born = server_process._start_time(stranger.pid)
            server = server_process.Server("s3", stranger.pid, born - 100, str(folder / "s3.log"), [])
            state = {"servers": [dataclasses.asdict(server)], "s3_url": "http://x", "tracking_uri": "http://y"}
            (folder / "state.json").write_text(json.dumps(state))
            assert down(tmp_path) is False
            assert stranger.poll() is None
        finally:
            stranger.kill()


@pytest.mark.fault
def test_a_server_is_known_again_after_the_clock_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil's start time is a time of day, worked out anew at each look."""
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            server = server_process.Server("s3", process.pid, server_process._start_time(process.pid), "s3.log", [])
            told = psutil.Process.create_time
            monkeypatch.setattr(psutil.Process, "create_time", lambda self: told(self) + 3600)
            assert server_process.is_alive(server)
        finally:
            process.kill()
    assert not server_process.is_alive(server)


@pytest.mark.fault
def test_a_server_whose_neighbour_died_is_replaced_with_it(
    tmp_path: Path, upped: Callable[[], Endpoints], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "_LOCK_SECONDS", 5.0)  # the one that lives holds the lock
    first = upped()
    s3, mlflow = map(psutil.Process, pids_of(tmp_path))
    mlflow.kill()
    mlflow.wait()
    second = upped()
    assert not s3.is_running() or s3.status() == psutil.STATUS_ZOMBIE
    assert second != first
    Tracker(second.tracking_uri, "kept").check()


@pytest.mark.fault
@pytest.mark.parametrize("broken", ["_start_mlflow", "start_guard"])
def test_a_server_does_not_outlive_a_neighbour_that_cannot_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    before = children()

    def fail(*arguments: object) -> None:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(services, broken, fail)
    with pytest.raises(BlockingIOError), local_services(tmp_path):
        pass
    assert children() == before


def test_servers_of_a_block_end_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", TRACKING_ELSEWHERE)
    monkeypatch.setattr(services, "_LOCK_SECONDS", 0.1)
    before = children()
    with pytest.raises(KeyboardInterrupt), local_services(tmp_path) as endpoints:
        assert endpoints.tracking_uri == TRACKING_ELSEWHERE
        CheckpointStore("s3://saferlhf-test", environment=endpoints.environment).probe()
        with pytest.raises(ServiceError, match="another run holds the servers"), local_services(tmp_path):
            pass
        raise KeyboardInterrupt
    assert children() == before
    assert not list(Path("/tmp").glob(f"seaweedfs-*-{endpoints.s3_url.rpartition(':')[2]}.sock"))


def test_servers_end_with_a_killed_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import pathlib, sys\nfrom pipelines.local.services import local_services\n"
        "with local_services(pathlib.Path(sys.argv[1])):\n    print('ready', flush=True)\n    sys.stdin.read()\n"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", TRACKING_ELSEWHERE)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        started = psutil.Process(owner.pid).children(recursive=True)
        assert any("weed" in process.name() for process in started)
        owner.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(started, timeout=20)
    assert alive == []


def test_a_server_that_does_not_start_shows_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in S3_ELSEWHERE.items():
        monkeypatch.setenv(name, value)
    before = children()
    (tmp_path / "services").mkdir()
    (tmp_path / "services" / "mlflow.db").write_bytes(b"no database at all" * 100)
    message = r"(?s)MLflow server ended .*mlflow\.log:.*file is not a database"
    with pytest.raises(ServiceError, match=message), local_services(tmp_path):
        pass
    assert children() == before


@pytest.mark.fault
def test_a_full_disk_is_refused_before_a_server_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", TRACKING_ELSEWHERE)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_500_000_000))
    before = children()
    message = r"disk of .*services has 1\.5 GB free, and the S3 server there wants 2\.1 .*: make room"
    with pytest.raises(ServiceError, match=message), local_services(tmp_path):
        pass
    assert children() == before


def test_a_port_that_was_taken_meanwhile_is_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", TRACKING_ELSEWHERE)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        offers = [[*server_process.free_ports(7), taken.getsockname()[1]], server_process.free_ports(8)]
        monkeypatch.setattr(services, "free_ports", lambda count: offers.pop(0))
        with local_services(tmp_path) as endpoints:
            CheckpointStore("s3://saferlhf-test", environment=endpoints.environment).probe()
    assert offers == []


def test_a_shell_reaches_the_servers_with_what_env_prints(upped: Callable[[], Endpoints], tmp_path: Path) -> None:
    endpoints = upped()
    saferlhf = Path(sys.executable).with_name("saferlhf")
    program = "import boto3, os; boto3.client('s3').list_buckets(); print(os.environ['MLFLOW_TRACKING_URI'])"
    script = f'eval "$({saferlhf} env --workdir {tmp_path})" && {sys.executable} -c "{program}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == endpoints.tracking_uri, done.stderr
    assert done.stderr == ""  # they ran already


def test_env_says_that_it_has_started_servers_and_how_to_stop_them(tmp_path: Path) -> None:
    saferlhf = Path(sys.executable).with_name("saferlhf")
    (tmp_path / "services").mkdir()  # as a run leaves it
    command = [saferlhf, "env", "--workdir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    words, _, stop = done.stderr.strip().partition("; to stop them: ")
    try:
        assert words == "saferlhf: started MLflow and S3, which stay"
        assert all(line.startswith("export ") for line in done.stdout.splitlines())
    finally:
        stopped = subprocess.run(shlex.split(stop), capture_output=True, text=True, check=False)
    assert stopped.stdout == "stopped\n"
    assert down(tmp_path) is False
