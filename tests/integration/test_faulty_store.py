"""The checkpoint store behind a network that fails: nothing is lost, nothing is served damaged, all errors are ours."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from components.foundation import s3 as s3_module
from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import ConflictError, IntegrityError, MissingError, StoreError, StoreUnavailableError
from pipelines.local.services import Endpoints
from tests.integration.faulty_proxy import KINDS, Faults, Scripted
from tests.integration.s3_proxy import Request, proxied
from tests.integration.store_workload import Worker
from tests.s3_identities import BUCKET

pytestmark = pytest.mark.fault

OPERATIONS = int(os.environ.get("SAFERLHF_STORE_OPERATIONS", "1000"))
SEED = int(os.environ.get("SAFERLHF_STORE_SEED", "1"))
WORKERS = 16
FAULT_SHARE = 0.05


def test_mixed_operations_on_a_failing_network(
    services: Endpoints, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "SMALL_BYTES", 10 << 20)  # so that 11 MiB are sent in parts
    root = f"s3://{BUCKET}/faulty-{SEED}"
    faults = Faults(SEED, FAULT_SHARE)
    begin = time.monotonic()
    with proxied(services.environment, faults) as environment, ThreadPoolExecutor(WORKERS) as pool:
        workers = [Worker(number, SEED, root, environment, tmp_path / str(number)) for number in range(WORKERS)]
        for done in [pool.submit(worker.work, OPERATIONS // WORKERS) for worker in workers]:
            done.result()
    seconds = time.monotonic() - begin
    outcomes = sum((worker.record.outcomes for worker in workers), Counter[str]())
    print(f"\n{OPERATIONS} operations in {seconds:.0f} s: {dict(outcomes)}")
    print(f"{faults.requests} requests, {faults.repeats} of them repeated, faults: {dict(faults.injected)}")
    store = CheckpointStore(root, cache_dir=tmp_path / "cache", environment=services.environment)
    with ThreadPoolExecutor(WORKERS) as pool:
        for done in [pool.submit(worker.check, store) for worker in workers]:
            done.result()
    check_log(store, workers)
    check_that_nothing_else_is_there(store, workers)
    assert set(faults.injected) == set(KINDS)
    assert min(outcomes[kind] for kind in ("success", "conflict", "error")) > 0


def check_log(store: CheckpointStore, workers: list[Worker]) -> None:
    """Each number once; what a worker was told is there is there, and what it was told is not, is not."""
    uris = store.list(f"{store.root_uri}/log/")
    assert uris == [f"{store.root_uri}/log/{number:06d}" for number in range(1, len(uris) + 1)]
    entries = [store.read_text(uri) for uri in uris]
    assert len(set(entries)) == len(entries)
    for worker in workers:
        assert worker.claimed <= set(entries)
        assert not worker.denied & set(entries)


def check_that_nothing_else_is_there(store: CheckpointStore, workers: list[Worker]) -> None:
    names = {name for worker in workers for name in worker.record.values}
    for uri in store.list(f"{store.root_uri}/"):
        step = uri.removesuffix("/tokenizer/vocab.json").removesuffix("/weights").removesuffix("/MANIFEST.json")
        known = step in names or uri.removesuffix("/LATEST") in names or uri.startswith(f"{store.root_uri}/log/")
        assert known, f"{uri} was written by nobody"


@contextlib.contextmanager
def behind(
    store: CheckpointStore, services: Endpoints, ask: str, *kinds: str, before: Callable[[], object] = lambda: None
) -> Iterator[CheckpointStore]:
    """The store for a client whose first requests like `ask`, as "PUT /LATEST", fail in these ways, one by one."""
    method, end = ask.split()

    def matches(request: Request) -> bool:
        return request.method == method and request.path.partition("?uploadId")[0].endswith(end)

    script = Scripted(matches, *kinds, before=before)
    with proxied(services.environment, script) as environment:
        yield CheckpointStore(store.root_uri, environment=environment)
    assert script.used_up


def folder_with(folder: Path, content: bytes = b"weights") -> Path:
    folder.mkdir()
    (folder / "weights").write_bytes(content)
    return folder


@pytest.mark.parametrize("kinds", [["lost reply"], ["lost reply", "503"], ["503", "lost reply"]], ids=str)
def test_a_write_whose_reply_was_lost_has_succeeded(
    store: CheckpointStore, services: Endpoints, kinds: list[str]
) -> None:
    uri = f"{store.root_uri}/entry.json"
    with behind(store, services, "PUT /entry.json", *kinds) as client:
        client.write_text(uri, "mine")
    assert store.read_text(uri) == "mine"


def test_a_commit_and_a_move_of_latest_whose_replies_were_lost_have_succeeded(
    store: CheckpointStore, services: Endpoints, tmp_path: Path
) -> None:
    steps = [f"{store.root_uri}/step-{number}" for number in (1, 2)]
    for step in steps:
        with behind(store, services, "PUT /MANIFEST.json", "lost reply") as client:
            client.commit(step, folder_with(tmp_path / step[-1], step.encode()))
        with behind(store, services, "PUT /LATEST", "lost reply") as client:
            client.set_latest(store.root_uri, step)
        assert store.latest(store.root_uri) == step
        assert (store.fetch(step) / "weights").read_bytes() == step.encode()
    with behind(store, services, "PUT /LATEST", "lost reply") as client:
        client.adopt(f"{store.root_uri}/other", steps[0])
    assert store.latest(f"{store.root_uri}/other") == steps[0]


def test_a_repeated_write_that_finds_somebody_elses_is_a_conflict(store: CheckpointStore, services: Endpoints) -> None:
    uri = f"{store.root_uri}/entry.json"
    with (
        behind(store, services, "PUT /entry.json", "503", before=lambda: store.write_text(uri, "theirs")) as client,
        pytest.raises(ConflictError, match=r"entry\.json was already written"),
    ):
        client.write_text(uri, "mine")
    assert store.read_text(uri) == "theirs"


def test_the_same_text_again_is_a_conflict_where_no_reply_was_lost(store: CheckpointStore) -> None:
    uri = f"{store.root_uri}/entry.json"
    store.write_text(uri, "same")
    with pytest.raises(ConflictError):
        store.write_text(uri, "same")


def test_what_the_store_did_not_decide_is_asked_again(store: CheckpointStore, services: Endpoints) -> None:
    """409: another write was under way. It may have failed since, so nothing is known yet."""
    uri = f"{store.root_uri}/entry.json"
    with behind(store, services, "PUT /entry.json", "409", "409") as client:
        client.write_text(uri, "mine")
    assert store.read_text(uri) == "mine"
    with (
        behind(store, services, "PUT /never.json", *["409"] * 4) as client,
        pytest.raises(ConflictError, match=r"never\.json"),
    ):
        client.write_text(f"{store.root_uri}/never.json", "mine")
    assert not store.has_text(f"{store.root_uri}/never.json")


@pytest.mark.parametrize("kind", ["truncated", "damaged"])
def test_a_reply_that_breaks_off_or_arrives_damaged_is_read_again(
    store: CheckpointStore, services: Endpoints, kind: str
) -> None:
    uri = f"{store.root_uri}/entry.json"
    store.write_text(uri, "text")
    with behind(store, services, "GET /entry.json", *[kind] * 3) as client:
        assert client.read_text(uri) == "text"
    if kind == "truncated":  # also where the reply is an error
        with behind(store, services, "GET /missing.json", kind) as client, pytest.raises(MissingError):
            client.read_text(f"{store.root_uri}/missing.json")


@pytest.mark.parametrize(("kind", "error"), [("truncated", StoreUnavailableError), ("damaged", IntegrityError)])
def test_a_latest_that_cannot_be_read_is_not_taken_for_none(
    store: CheckpointStore, services: Endpoints, tmp_path: Path, kind: str, error: type[StoreError]
) -> None:
    """A stage would begin anew, where it should go on."""
    step = f"{store.root_uri}/step-1"
    store.commit(step, folder_with(tmp_path / "folder"))
    store.set_latest(store.root_uri, step)
    with behind(store, services, "GET /LATEST", *[kind] * 8) as client:
        for read in (lambda: client.latest(store.root_uri), lambda: client.has_text(f"{store.root_uri}/LATEST")):
            with pytest.raises(error, match="LATEST") as raised:
                read()
            assert type(raised.value) is error


def test_a_multipart_upload_whose_completion_lost_its_reply(
    store: CheckpointStore, services: Endpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "SMALL_BYTES", 10 << 20)
    content = bytes(11 << 20)
    with behind(store, services, "POST /weights", "lost reply") as client:
        client.commit(f"{store.root_uri}/step-1", folder_with(tmp_path / "folder", content))
    assert (store.fetch(f"{store.root_uri}/step-1") / "weights").read_bytes() == content
