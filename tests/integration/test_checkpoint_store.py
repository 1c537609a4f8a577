from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import ConflictError, IntegrityError, StoreError
from components.foundation.s3 import S3, split_uri
from pipelines.local.services import Endpoints
from tests.integration.s3_proxy import Forward, Reply, Request, proxied

WEIGHTS = bytes(range(256)) * 40


def make_folder(folder: Path, weights: bytes = WEIGHTS) -> Path:
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "tokenizer" / "vocab.json").write_text('{"é": 1}')
    (folder / "empty").touch()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def object_at(s3: Any, uri: str) -> bytes:
    bucket, key = split_uri(uri)
    body: bytes = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
    return body


def replace_object(s3: Any, uri: str, body: bytes) -> None:
    bucket, key = split_uri(uri)
    s3.put_object(Bucket=bucket, Key=key, Body=body)


def delete_object(s3: Any, uri: str) -> None:
    bucket, key = split_uri(uri)
    s3.delete_object(Bucket=bucket, Key=key)


def run_before_put(monkeypatch: pytest.MonkeyPatch, name: str, intruder: Callable[[], object]) -> None:
    """Let `intruder` act once, just before the next write of an object called `name`."""
    real_put, waiting = S3.put, [intruder]

    def put(self: S3, uri: str, text: str, condition: Any) -> None:
        if uri.endswith(f"/{name}") and waiting:
            waiting.pop()()
        real_put(self, uri, text, condition)

    monkeypatch.setattr(S3, "put", put)


def test_a_commit_comes_back_byte_for_byte(store: CheckpointStore, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder")
    uri = f"{store.root_uri}/step-1"
    manifest = store.commit(uri, folder, parents=["s3://b-1/x"], labels={"stage": "sft"}, settings_digest="abc")
    assert contents(store.fetch(uri)) == contents(folder)
    assert store.exists(uri)
    assert store.manifest(uri) == manifest
    assert (manifest.parents, manifest.labels, manifest.settings_digest) == (["s3://b-1/x"], {"stage": "sft"}, "abc")
    found = {file.path: (file.size, file.sha256) for file in manifest.files}
    assert found["model.safetensors"] == (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())
    assert set(found) == {"model.safetensors", "tokenizer/vocab.json", "empty"}


def test_provenance_comes_from_the_environment(store: CheckpointStore, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SAFERLHF_GIT_SHA", "0123abcd")
    monkeypatch.setenv("SAFERLHF_IMAGE_DIGEST", "sha256:55")
    manifest = store.commit(f"{store.root_uri}/step-1", make_folder(tmp_path / "folder"))
    assert (manifest.git_sha, manifest.image_digest) == ("0123abcd", "sha256:55")


def test_a_big_file_is_sent_in_parts(store: CheckpointStore, tmp_path: Path, s3: Any) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with (folder / "big").open("wb") as stream:
        stream.seek(65 * 1024 * 1024)
        stream.write(b"end")
    uri = f"{store.root_uri}/step-1"
    store.commit(uri, folder)
    bucket, key = split_uri(f"{uri}/big")
    assert "-" in s3.head_object(Bucket=bucket, Key=key)["ETag"]  # S3's mark of a multipart upload
    assert (store.fetch(uri) / "big").stat().st_size == 65 * 1024 * 1024 + 3


def test_the_same_commit_again_changes_nothing(store: CheckpointStore, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder")
    uri = f"{store.root_uri}/step-1"
    first = store.commit(uri, folder, labels={"attempt": "1"})
    assert store.commit(uri, folder, labels={"attempt": "2"}) == first


def test_another_commit_in_the_same_place_is_refused_and_harmless(store: CheckpointStore, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder")
    uri = f"{store.root_uri}/step-1"
    store.commit(uri, folder)
    with pytest.raises(ConflictError, match="step-1 is already committed with other files"):
        store.commit(uri, make_folder(tmp_path / "other", b"other weights"))
    assert contents(store.fetch(uri)) == contents(folder)


def test_row_17_of_two_writers_with_different_files_one_is_told(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{store.root_uri}/step-1"
    winner = make_folder(tmp_path / "winner", b"first")
    run_before_put(monkeypatch, "MANIFEST.json", lambda: store.commit(uri, winner))
    with pytest.raises(ConflictError, match="step-1"):
        store.commit(uri, make_folder(tmp_path / "loser", b"second"))


def test_row_01_an_unfinished_commit_is_no_commit(store: CheckpointStore, tmp_path: Path, monkeypatch: Any) -> None:
    def crash() -> None:
        raise KeyboardInterrupt

    uri = f"{store.root_uri}/step-1"
    run_before_put(monkeypatch, "MANIFEST.json", crash)
    with pytest.raises(KeyboardInterrupt):
        store.commit(uri, make_folder(tmp_path / "torn", b"torn"))
    assert not store.exists(uri)
    with pytest.raises(IntegrityError, match=r"step-1 has no MANIFEST\.json"):
        store.fetch(uri)
    folder = make_folder(tmp_path / "folder")
    store.commit(uri, folder)
    assert contents(store.fetch(uri)) == contents(folder)


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        (WEIGHTS[:5000] + bytes([WEIGHTS[5000] ^ 1]) + WEIGHTS[5001:], "is damaged"),
        (WEIGHTS[:-1], "is damaged"),
        (WEIGHTS + b"\0", "is damaged"),
        (None, "does not exist"),
    ],
    ids=["flipped bit", "truncated", "longer", "deleted"],
)
def test_row_19_a_damaged_object_is_refused_by_name(
    store: CheckpointStore, tmp_path: Path, s3: Any, damaged: bytes | None, reason: str
) -> None:
    uri = f"{store.root_uri}/step-1"
    store.commit(uri, make_folder(tmp_path / "folder"))
    if damaged is None:
        delete_object(s3, f"{uri}/model.safetensors")
    else:
        replace_object(s3, f"{uri}/model.safetensors", damaged)
    with pytest.raises(IntegrityError, match=rf"{uri}/model\.safetensors {reason}"):
        store.fetch(uri)
    replace_object(s3, f"{uri}/model.safetensors", WEIGHTS)
    assert (store.fetch(uri) / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("copies", [1, 1000], ids=["asked for in one request", "asked for in parts"])
def test_row_19_damage_on_the_way_is_cured_by_a_second_try(
    services: Endpoints, store: CheckpointStore, tmp_path: Path, copies: int
) -> None:
    folder, damaged = make_folder(tmp_path / "folder", WEIGHTS * copies), []

    def damage(request: Request, forward: Forward) -> Reply:
        reply = forward(request)
        if request.method == "GET" and request.path.endswith("/model.safetensors") and not damaged:
            damaged.append(request.path)
            reply = replace(reply, body=reply.body[:-1] + bytes([reply.body[-1] ^ 1]))
        return reply

    uri = f"{store.root_uri}/step-1"
    with proxied(services.environment, damage) as environment:
        behind = CheckpointStore(store.root_uri, tmp_path / "cache", environment)
        behind.commit(uri, folder)
        assert contents(behind.fetch(uri)) == contents(folder)
    assert damaged


@pytest.mark.fault
def test_a_disk_that_fails_while_a_file_arrives_is_heard(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells of it once, to whoever syncs next; that is long before the file's end."""
    uri = f"{store.root_uri}/step-1"
    store.commit(uri, make_folder(tmp_path / "folder", WEIGHTS * 1000))
    real_sync, failures = os.fsync, [OSError(errno.EIO, "Input/output error")]

    def sync(file: int) -> None:
        if failures and os.fstat(file).st_size > len(WEIGHTS):
            raise failures.pop()
        real_sync(file)

    monkeypatch.setattr("components.foundation.s3._SYNC_BYTES", len(WEIGHTS))
    monkeypatch.setattr(os, "fsync", sync)
    cache = tmp_path / "other-cache"
    with pytest.raises(StoreError, match=r"cannot be kept in the cache .*Input/output error"):
        CheckpointStore(store.root_uri, cache).fetch(uri)
    assert not list(cache.rglob("*.partial"))
    assert not failures


def test_small_files_travel_beside_each_other(services: Endpoints, store: CheckpointStore, tmp_path: Path) -> None:
    """No request is answered before four are under way."""
    files, together = 8, threading.Barrier(4)
    (tmp_path / "folder").mkdir()
    for number in range(files):
        (tmp_path / "folder" / f"part-{number}").write_text(f"text {number}")

    def watch(request: Request, forward: Forward) -> Reply:
        if "/part-" in request.path:
            together.wait(timeout=60)
        return forward(request)

    with proxied(services.environment, watch) as environment:
        behind = CheckpointStore(store.root_uri, tmp_path / "cache", environment)
        uri = f"{store.root_uri}/step-1"
        behind.commit(uri, tmp_path / "folder")
        assert contents(behind.fetch(uri)) == contents(tmp_path / "folder")


@pytest.mark.fault
def test_one_file_that_cannot_be_stored_ends_the_commit(
    services: Endpoints, store: CheckpointStore, tmp_path: Path
) -> None:
    folder, asked = make_folder(tmp_path / "folder"), []
    for number in range(100):
        (folder / f"part-{number:03}").write_text(f"text {number}")

    def refuse(request: Request, forward: Forward) -> Reply:
        asked.append(request.path)
        return Reply.error(403, "AccessDenied") if request.method == "PUT" else forward(request)

    uri = f"{store.root_uri}/step-1"
    with proxied(services.environment, refuse) as environment:
        behind = CheckpointStore(store.root_uri, tmp_path / "cache", environment)
        with pytest.raises(StoreError, match=f"refuses {uri}/"):
            behind.commit(uri, folder)
    assert len(asked) < 50
    assert not store.exists(uri)


def test_what_is_cached_is_not_downloaded_again(store: CheckpointStore, tmp_path: Path, s3: Any) -> None:
    folder = make_folder(tmp_path / "folder")
    first, second = f"{store.root_uri}/step-1", f"{store.root_uri}/step-2"
    store.commit(first, folder)
    store.commit(second, folder)
    store.fetch(first)
    for uri in (first, second):
        delete_object(s3, f"{uri}/model.safetensors")
    assert contents(store.fetch(first)) == contents(store.fetch(second)) == contents(folder)


@pytest.mark.fault
def test_a_rank_that_downloads_later_leaves_the_folder_of_the_first(store: CheckpointStore, tmp_path: Path) -> None:
    """All ranks of a machine share the cache, and all find it empty; one of them reads from its folder already."""
    uri = f"{store.root_uri}/step-1"
    store.commit(uri, make_folder(tmp_path / "folder"))
    fetched = store.fetch(uri)
    before = {path: path.stat().st_ino for path in fetched.rglob("*")}
    for file in store.manifest(uri).files:
        store._download(f"{uri}/{file.path}", file)
    assert store.fetch(uri) == fetched
    assert {path: path.stat().st_ino for path in fetched.rglob("*")} == before


def test_a_folder_that_somebody_changed_is_made_again(store: CheckpointStore, tmp_path: Path) -> None:
    uri = f"{store.root_uri}/step-1"
    folder = make_folder(tmp_path / "folder")
    store.commit(uri, folder)
    fetched = store.fetch(uri)
    (fetched / "model.safetensors").unlink()
    (fetched / "model.safetensors").write_bytes(b"mine")
    assert contents(store.fetch(uri)) == contents(folder)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ({"path": "../outside"}, "could leave its folder"),
        ({"path": "a/../../outside"}, "could leave its folder"),
        ({"path": "/tmp/outside"}, "could leave its folder"),
        ({"path": "a\\..\\outside"}, "could leave its folder"),
        ({"path": ""}, "could leave its folder"),
        ({"sha256": "../../outside"}, "no SHA-256"),
        ({"size": "12"}, "cannot be used"),
    ],
)
def test_a_hostile_manifest_is_refused(store: CheckpointStore, file: dict[str, Any], reason: str) -> None:
    uri = f"{store.root_uri}/step-1"
    body = manifest_with([{"path": "model", "size": 1, "sha256": "0" * 64} | file])
    store.write_text(f"{uri}/MANIFEST.json", body)
    with pytest.raises(IntegrityError, match=reason):
        store.fetch(uri)


@pytest.mark.parametrize("paths", [["a", "a"], ["a", "a/b"]])
def test_two_files_in_one_place_are_refused(store: CheckpointStore, paths: list[str]) -> None:
    uri = f"{store.root_uri}/step-1"
    store.write_text(
        f"{uri}/MANIFEST.json", manifest_with([{"path": path, "size": 1, "sha256": "0" * 64} for path in paths])
    )
    with pytest.raises(IntegrityError, match="same place"):
        store.fetch(uri)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format_version": 1'])
def test_a_malformed_manifest_is_refused(store: CheckpointStore, text: str) -> None:
    uri = f"{store.root_uri}/step-1"
    store.write_text(f"{uri}/MANIFEST.json", text)
    with pytest.raises(IntegrityError, match=r"step-1/MANIFEST\.json cannot be used"):
        store.manifest(uri)


def test_a_newer_format_is_refused(store: CheckpointStore) -> None:
    uri = f"{store.root_uri}/step-1"
    store.write_text(f"{uri}/MANIFEST.json", manifest_with([], format_version=2))
    with pytest.raises(IntegrityError, match="format 2; this version reads format 1"):
        store.manifest(uri)


def manifest_with(files: list[dict[str, Any]], format_version: int = 1) -> str:
    fields: dict[str, Any] = {"uri": "s3://elsewhere/x", "files": files, "parents": [], "labels": {}}
    fields |= {"settings_digest": "", "git_sha": "", "image_digest": "", "format_version": format_version}
    return json.dumps(fields)


def test_folders_that_cannot_be_committed(store: CheckpointStore, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="holds no files"):
        store.commit(f"{store.root_uri}/step-1", tmp_path / "empty")
    (tmp_path / "empty" / "MANIFEST.json").write_text("{}")
    with pytest.raises(StoreError, match="belongs to the store"):
        store.commit(f"{store.root_uri}/step-1", tmp_path / "empty")


def committed_steps(store: CheckpointStore, tmp_path: Path, count: int) -> list[str]:
    steps = [f"{store.root_uri}/step-{number}" for number in range(count)]
    folder = make_folder(tmp_path / "steps")
    for step in steps:
        store.commit(step, folder)
    return steps


def test_latest_names_the_last_step_set(store: CheckpointStore, tmp_path: Path) -> None:
    assert store.latest(store.root_uri) is None
    for step in committed_steps(store, tmp_path, 2):
        store.set_latest(store.root_uri, step)
        assert store.latest(store.root_uri) == step


def test_latest_never_names_what_is_not_committed(store: CheckpointStore, tmp_path: Path) -> None:
    (step,) = committed_steps(store, tmp_path, 1)
    for stage, uri in [(store.root_uri, f"{store.root_uri}/step-7"), (f"{store.root_uri}/other", step)]:
        with pytest.raises(StoreError, match="not a committed step of this stage"):
            store.set_latest(stage, uri)


@pytest.mark.parametrize("before", [0, 1], ids=["no LATEST yet", "LATEST exists"])
def test_row_17_of_two_writers_of_latest_the_slower_is_told(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    old, mine, other = committed_steps(store, tmp_path, 3)
    if before:
        store.set_latest(store.root_uri, old)
    run_before_put(monkeypatch, "LATEST", lambda: store.set_latest(store.root_uri, other))
    with pytest.raises(ConflictError, match="LATEST"):
        store.set_latest(store.root_uri, mine)
    assert store.latest(store.root_uri) == other


def test_two_writers_with_the_same_latest_agree(store: CheckpointStore, tmp_path: Path, monkeypatch: Any) -> None:
    (step,) = committed_steps(store, tmp_path, 1)
    run_before_put(monkeypatch, "LATEST", lambda: store.set_latest(store.root_uri, step))
    store.set_latest(store.root_uri, step)
    assert store.latest(store.root_uri) == step


def test_row_01_pruning_leaves_the_kept_step_alone_and_nothing_else(
    store: CheckpointStore, tmp_path: Path, s3: Any
) -> None:
    """A step whose name begins like the kept one's, an upload that never got its manifest, and a neighbour's stage."""
    steps = committed_steps(store, tmp_path, 12)  # step-0 ... step-11
    stage, kept = store.root_uri, steps[1]
    neighbour = f"{stage}-two/step-1"
    store.commit(neighbour, make_folder(tmp_path / "neighbour"))
    replace_object(s3, f"{stage}/step-99/model.safetensors", b"half")
    store.set_latest(stage, kept)
    store.prune(stage, keep=kept)
    assert store.latest(stage) == kept
    assert contents(store.fetch(kept))
    assert [step for step in steps if store.exists(step)] == [kept]
    assert len(s3.list_objects_v2(Bucket=split_uri(stage)[0], Prefix=f"{split_uri(stage)[1]}/")["Contents"]) == (
        len(store.manifest(kept).files) + 2
    )
    store.prune(stage, keep=None)
    assert store.latest(stage) is None
    assert "Contents" not in s3.list_objects_v2(Bucket=split_uri(stage)[0], Prefix=f"{split_uri(stage)[1]}/")
    assert store.exists(neighbour)


def test_texts(store: CheckpointStore) -> None:
    uri = f"{store.root_uri}/result.json"
    with pytest.raises(IntegrityError, match=r"result\.json does not exist"):
        store.read_text(uri)
    store.write_text(uri, "résumé\n")
    with pytest.raises(ConflictError, match=r"result\.json"):
        store.write_text(uri, "other")
    assert store.read_text(uri) == "résumé\n"
    store.write_text(uri, "other", overwrite=True)
    assert store.read_text(uri) == "other"
    store.replace_text(uri, "other", "third")
    with pytest.raises(ConflictError, match=r"result\.json"):
        store.replace_text(uri, "other", "fourth")
    assert store.read_text(uri) == "third"


@pytest.mark.fault
def test_of_two_that_replace_a_text_the_slower_is_told(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{store.root_uri}/name"
    store.write_text(uri, "old")
    run_before_put(monkeypatch, "name", lambda: store.replace_text(uri, "old", "theirs"))
    with pytest.raises(ConflictError, match="name"):
        store.replace_text(uri, "old", "mine")
    assert store.read_text(uri) == "theirs"


def test_probe_makes_the_bucket_and_leaves_nothing(s3: Any) -> None:
    store = CheckpointStore("s3://saferlhf-probed/some/prefix")
    store.probe()
    store.ensure_bucket()
    assert s3.list_objects_v2(Bucket="saferlhf-probed").get("Contents", []) == []


def test_a_missing_bucket_is_named(services: Any) -> None:
    with pytest.raises(StoreError, match="the bucket of s3://saferlhf-nowhere/x does not exist"):
        CheckpointStore("s3://saferlhf-nowhere").read_text("s3://saferlhf-nowhere/x")


def test_wrong_keys_are_named(services: Any) -> None:
    environment = services.environment | {"AWS_SECRET_ACCESS_KEY": "wrong"}
    with pytest.raises(StoreError, match=r"refuses s3://saferlhf-test.*AWS_SECRET_ACCESS_KEY"):
        CheckpointStore("s3://saferlhf-test/x", environment=environment).probe()


def test_an_unreachable_store_is_named() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        environment = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        with pytest.raises(StoreError, match=f"cannot reach the S3 store at {url} for s3://saferlhf-test"):
            CheckpointStore("s3://saferlhf-test/x", environment=environment).probe()


@pytest.mark.parametrize("uri", ["/tmp/x", "s3://", "s3://x/y", "gs://bucket/x", "s3://Bucket/x"])
def test_other_uris_are_refused(uri: str) -> None:
    with pytest.raises(StoreError, match="is not an S3 URI"):
        CheckpointStore(uri)


@contextmanager
def server_that_answers(status: int) -> Iterator[dict[str, str]]:
    """Environment of a web server that gives the same answer to every request."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.send_header("ETag", '"1"')
            self.end_headers()

        do_HEAD = do_DELETE = do_PUT

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        yield {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (200, "ignores IfNoneMatch on writes"),  # as some imitations of S3 do
        (404, "answers, but not as an S3 store"),
        (500, "failed"),
    ],
)
def test_row_18_a_server_that_is_no_good_store_is_refused(status: int, reason: str) -> None:
    with server_that_answers(status) as environment:
        url = environment["AWS_ENDPOINT_URL"]
        with pytest.raises(StoreError, match=f"{url} {reason}"):
            CheckpointStore("s3://saferlhf-test/x", environment=environment).probe()
