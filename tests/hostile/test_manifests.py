"""What lies in the store, as somebody who can write there might leave it: manifests, records, pointers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.foundation.checkpoint_store import CheckpointStore, ManifestFile, parse_manifest
from components.foundation.errors import IntegrityError, SettingsError, StoreError
from components.foundation.lineage import lineage_text
from components.foundation.results import Evaluation, HeldOutAnswer, PpoTrace, from_json, read_record, read_records
from components.foundation.run_context import open_run
from components.foundation.s3 import split_uri
from tests.hostile.bounded import bounded

pytestmark = pytest.mark.fault

MEGABYTE = 1_000_000
URI = "s3://bucket/step-1"
FILE: dict[str, Any] = {"path": "a/model", "size": 1, "sha256": "0" * 64}
GOOD: dict[str, Any] = {"uri": URI, "files": [FILE], "parents": ["s3://bucket/other"], "labels": {"stage": "sft"}}
GOOD |= {"settings_digest": "d", "git_sha": "g", "image_digest": "", "format_version": 1}


def manifest(**changes: Any) -> str:
    return json.dumps(GOOD | changes)


def refused(text: str) -> str:
    with pytest.raises(IntegrityError) as error:
        parse_manifest(text, URI)
    message = str(error.value)
    assert message.startswith(f"{URI}/MANIFEST.json") and message.isprintable() and len(message) < 1000
    return message


def test_a_good_manifest_is_read() -> None:
    assert parse_manifest(manifest(), URI).files == [ManifestFile("a/model", 1, "0" * 64)]


PATHS = ["../x", "a/../../x", "/etc/passwd", "//x", "a//b", "./a", "a/.", "..", "a/..", "", "a\\..\\x", "C:\\x", "a\0b",
         "a\nb", "\x1b[2J", "\u202egnp.exe", "\ud800", "a" * 2000, "é" * 600, "..\u2028/x", "a/\u00a0"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ascii(path[:20]))
def test_a_path_that_could_leave_its_folder_or_be_no_name_is_refused(path: str) -> None:
    assert "refused" in refused(manifest(files=[FILE | {"path": path}]))


@pytest.mark.parametrize("path", ["%2e%2e/x", "...", ".hidden", "a/..b", "~", "$HOME", "-rf", "con", "a b", "日本"])
def test_an_odd_name_stays_in_its_folder(path: str, tmp_path: Path) -> None:
    (file,) = parse_manifest(manifest(files=[FILE | {"path": path}]), URI).files
    assert (tmp_path / file.path).resolve().is_relative_to(tmp_path.resolve())


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {}},
        {"files": "ab"},
        {"files": [[]]},
        {"files": [""]},
        {"files": [None]},
        {"files": [FILE | {"size": -1}]},
        {"files": [FILE | {"size": True}]},
        {"files": [FILE | {"size": 1.0}]},
        {"files": [FILE | {"size": "1"}]},
        {"files": [FILE | {"sha256": "0" * 63}]},
        {"files": [FILE | {"sha256": "../" * 21 + "x"}]},
        {"files": [FILE | {"sha256": "0" * 64 + "\n"}]},
        {"files": [FILE, FILE]},
        {"files": [FILE | {"path": "a"}, FILE]},
        {"parents": "s3"},
        {"parents": {}},
        {"parents": ["\x1b]8;;http://h\x07"]},
        {"labels": []},
        {"labels": ""},
        {"labels": {"a": 1}},
        {"labels": {"\x1b[2J": "x"}},
        {"git_sha": "\x1b[2J"},
        {"image_digest": "\ud800"},
        {"format_version": True},
        {"format_version": 10**400},
        {"more": 1},
        {"uri": None},
    ],
    ids=lambda changes: ascii(changes)[:50],
)
def test_a_manifest_with_a_field_of_another_kind_is_refused(changes: dict[str, Any]) -> None:
    refused(manifest(**changes))


TEXTS = [
    "",
    "[]",
    '""',
    "null",
    "0",
    "NaN",
    "[" * 100_000,
    '{"files":' * 100_000,
    '{"size": ' + "9" * 5000 + "}",
    "\ufeff{}",
]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text[:12]))
@pytest.mark.parametrize("kind", [Evaluation, HeldOutAnswer, PpoTrace])
def test_a_record_that_is_none_is_refused(kind: type[Any], text: str) -> None:
    refused(text)
    with pytest.raises(IntegrityError) as error:
        from_json(kind, text)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 400, "true", '"1"', "[1]", "null"])
def test_a_figure_that_is_no_finite_number_is_refused(number: str) -> None:
    """Charts and gates are made of these."""
    with pytest.raises(IntegrityError):
        from_json(PpoTrace, f'{{"threshold": {number}}}')
    with pytest.raises(IntegrityError):
        from_json(PpoTrace, f'{{"threshold": 1.0, "cost": [{number}]}}')


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5) | st.just(FILE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*GOOD, *FILE]), inner, max_size=4),
    max_leaves=10,
)


@given(st.sampled_from([*GOOD, *FILE]), JSON)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_whatever_a_field_holds_the_manifest_is_refused_or_stays_in_its_folder(field: str, value: Any) -> None:
    text = manifest(files=[FILE | {field: value}]) if field in FILE else manifest(**{field: value})
    try:
        read = parse_manifest(text, URI)
    except IntegrityError as error:
        assert str(error).isprintable() and len(str(error)) < 1000
        return
    for file in read.files:
        assert Path("/cache/view").joinpath(file.path).resolve().is_relative_to("/cache/view")
    assert all(parent.isprintable() for parent in read.parents)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"{}", b"[" * 100_000, b""], ids=["binary", "empty", "deep", "nothing"]
)
def test_a_file_of_records_that_is_none_names_itself(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(IntegrityError):
        read_record(PpoTrace, path)
    if content:
        with pytest.raises(IntegrityError):
            read_records(PpoTrace, path)
    with pytest.raises(IntegrityError, match="nowhere"):
        read_record(PpoTrace, tmp_path / "nowhere.json")


def test_a_record_of_a_gigabyte_takes_little_memory(tmp_path: Path) -> None:
    huge = tmp_path / "state.json"
    with huge.open("wb") as file:
        file.truncate(1000 * MEGABYTE)
    imports = "from pathlib import Path; from components.foundation.results import *"
    said = bounded(imports, "read_record(PpoTrace, Path(sys.argv[1]))", huge, more_bytes=300 * MEGABYTE)
    assert said == f"IntegrityError {huge} cannot be read: {huge} is over 100000000 bytes"


def put(s3: Any, uri: str, body: bytes) -> None:
    bucket, key = split_uri(uri)
    s3.put_object(Bucket=bucket, Key=key, Body=body)


def test_an_object_of_a_gigabyte_is_no_record(store: CheckpointStore, s3: Any) -> None:
    """Here 101 MB, which the store has to take first."""
    uri = f"{store.root_uri}/sft"
    put(s3, f"{uri}/LATEST", b" " * 101 * MEGABYTE)
    imports = "from components.foundation.checkpoint_store import CheckpointStore; import boto3; boto3.client('s3')"
    said = bounded(
        imports, "CheckpointStore(sys.argv[1]).latest(sys.argv[2])", store.root_uri, uri, more_bytes=90 * MEGABYTE
    )
    assert said == f"IntegrityError {uri}/LATEST has 101000000 bytes, and is no record of ours"


@pytest.mark.parametrize("size", [7, 9 * MEGABYTE], ids=["asked for in one request", "asked for in parts"])
def test_an_object_that_is_larger_than_its_manifest_says_does_not_fill_the_disk(
    store: CheckpointStore, s3: Any, tmp_path: Path, size: int
) -> None:
    uri, folder = f"{store.root_uri}/step-1", tmp_path / "folder"
    folder.mkdir()
    (folder / "model").write_bytes(bytes(size))
    store.commit(uri, folder)
    put(s3, f"{uri}/model", bytes(100 * MEGABYTE))
    imports = "from pathlib import Path; from components.foundation.checkpoint_store import CheckpointStore"
    fetch, cache = "CheckpointStore(sys.argv[1], cache_dir=Path(sys.argv[2])).fetch(sys.argv[3])", tmp_path / "small"
    limits = {"more_bytes": 300 * MEGABYTE, "file_bytes": 50 * MEGABYTE}
    said = bounded(imports, fetch, store.root_uri, cache, uri, **limits)
    assert said == f"IntegrityError {uri}/model is damaged: it has more than the {size} bytes of its manifest"
    assert not [path for path in cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["../../other", "/etc", "step-1\nstep-2", "\x1b[2J", "", "a" * 5000, "s3://other/x"])
def test_a_pointer_that_leads_elsewhere_is_refused(store: CheckpointStore, name: str) -> None:
    store.write_text(f"{store.root_uri}/sft/LATEST", name + "\n")
    with pytest.raises(IntegrityError) as error:
        store.latest(f"{store.root_uri}/sft")
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "settings_json", ["", "{}x", "[]", '{"ppo": {"steps": 0}}', '{"nonsense": 1}', "[" * 10_000, '{"profile": NaN}']
)
def test_a_run_whose_record_was_changed_is_refused_by_name(store: CheckpointStore, settings_json: str) -> None:
    run = f"{store.root_uri}/runs/run"
    store.write_text(
        f"{run}/run.json", json.dumps({"run_id": "run", "mlflow_run_id": "m", "settings_json": settings_json})
    )
    with pytest.raises((IntegrityError, SettingsError), match=f"^{run}/run.json cannot be used: "):
        open_run(run)


def test_parents_that_go_in_a_circle_or_nowhere_end(store: CheckpointStore) -> None:
    first, second = f"{store.root_uri}/step-1", f"{store.root_uri}/step-2"
    store.write_text(f"{first}/MANIFEST.json", manifest(parents=[second] * 50))
    store.write_text(f"{second}/MANIFEST.json", manifest(parents=[first] * 50))
    assert lineage_text(store, first).count("(above)") == 99
    store.write_text(f"{second}/MANIFEST.json", manifest(parents=["file:///etc/passwd"]), overwrite=True)
    with pytest.raises(StoreError, match="is not an S3 URI"):
        lineage_text(store, first)
