"""Record files that lie in S3: where a run's pods can read them, too."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from components.foundation import preference
from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import DataError, IntegrityError, MissingError
from components.foundation.preference import Demonstration, load_records
from components.foundation.s3 import split_uri

ROWS = [json.dumps({"prompt": f"What is {n} and {n}?", "response": str(2 * n)}) for n in range(3)] + ["{broken"]
LINES = "\n".join(ROWS).encode() + b"\n"


@pytest.fixture
def put(store: CheckpointStore, s3: Any) -> Any:
    """Stores bytes under a name; returns their URI."""

    def put(name: str, body: bytes) -> str:
        uri = f"{store.root_uri}/{name}"
        bucket, key = split_uri(uri)
        s3.put_object(Bucket=bucket, Key=key, Body=body)
        return uri

    return put


def test_an_object_is_read_like_a_file(put: Any, tmp_path: Any) -> None:
    (tmp_path / "mine.jsonl").write_bytes(LINES)
    here = load_records(str(tmp_path / "mine.jsonl"), Demonstration)
    for uri in (put("mine.jsonl", LINES), put("mine.jsonl.gz", gzip.compress(LINES))):
        there = load_records(uri, Demonstration)
        assert (there.records, there.bad, there.digest) == (here.records, here.bad, here.digest)
        assert there.source == uri
        assert (len(there.records), [bad.row for bad in there.bad]) == (3, [4])


@pytest.mark.fault
def test_what_is_wrong_with_an_object_is_told_of_its_address(
    put: Any, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = f"{store.root_uri}/absent.jsonl"
    with pytest.raises(MissingError, match=f"{absent} does not exist"):
        load_records(absent, Demonstration)
    with pytest.raises(DataError, match=r"cannot read .*/mine\.csv: use \.jsonl"):
        load_records(put("mine.csv", LINES), Demonstration)
    broken = put("broken.jsonl.gz", b"no gzip")
    with pytest.raises(DataError, match=f"cannot read {broken}: "):
        load_records(broken, Demonstration)
    monkeypatch.setattr(preference, "MAX_FILE_BYTES", len(LINES) - 1)
    with pytest.raises(IntegrityError, match=f"has {len(LINES)} bytes, and at most {len(LINES) - 1} are read"):
        load_records(put("large.jsonl", LINES), Demonstration)
