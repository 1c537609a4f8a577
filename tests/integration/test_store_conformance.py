"""The conformance suite: a real SeaweedFS passes it, and a store with a fault fails exactly what the fault breaks."""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from typer.testing import CliRunner

from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import SettingsError, StoreError
from components.foundation.store_conformance import CHECKS, Outcome, conforms, examine
from components.foundation.store_conformance.bench import Bench
from pipelines.cli import app
from pipelines.local.services import Endpoints
from tests.integration.s3_proxy import Forward, Reply, Request, proxied
from tests.s3_identities import BUCKET, TEAM_A, keys_of


@pytest.fixture
def other_keys() -> dict[str, str]:
    """Variables with the keys of two other identities."""
    reader = {f"SAFERLHF_READ_ONLY_{name}": value for name, value in keys_of("reader").items()}
    return reader | {f"SAFERLHF_OTHER_TENANT_{name}": value for name, value in keys_of("team-b").items()}


@pytest.fixture
def root(s3: Any) -> str:
    """A place in a bucket that exists."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


def failed(outcomes: list[Outcome]) -> dict[str, str]:
    """What the store did at each check that failed."""
    return {outcome.check: outcome.did for outcome in outcomes if outcome.result == "failed"}


def objects_below(s3: Any, prefix: str) -> list[str]:
    uploads = s3.list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads", [])
    objects = s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    return [entry["Key"] for entry in (*uploads, *objects)]


def test_seaweedfs_has_all_also_for_keys_of_one_prefix(
    services: Endpoints, s3: Any, other_keys: dict[str, str]
) -> None:
    outcomes = examine(TEAM_A, services.environment | other_keys | keys_of("team-a"))
    assert {outcome.result for outcome in outcomes} == {"ok"}, outcomes
    assert [outcome.check for outcome in outcomes] == [*(check.name for check in CHECKS), "clean up"]
    assert objects_below(s3, "team-a") == []


def test_row_35_a_team_works_in_its_prefix_and_nowhere_else(services: Endpoints, s3: Any) -> None:
    team = CheckpointStore(TEAM_A, environment=services.environment | keys_of("team-a"))
    other = CheckpointStore(TEAM_A, environment=services.environment | keys_of("team-b"))
    uri = f"{TEAM_A}/{uuid.uuid4().hex}.txt"
    team.probe()
    team.ensure_bucket()
    team.write_text(uri, "private")
    assert team.list(TEAM_A + "/") == [uri]
    for attempt in (other.probe, lambda: other.read_text(uri), lambda: other.write_text(uri, "forged", overwrite=True)):
        with pytest.raises(StoreError, match=r"refuses s3://saferlhf-test/team-a.*the rights of this key"):
            attempt()
    assert team.read_text(uri) == "private"
    s3.delete_object(Bucket=BUCKET, Key=uri.removeprefix(f"s3://{BUCKET}/"))


def signed(request: Request, environment: Mapping[str, str]) -> Request:
    """The request as if the owner of `environment` had made it."""
    url = environment["AWS_ENDPOINT_URL"] + request.path
    kept = {n: v for n, v in request.headers.items() if n not in {"authorization", "x-amz-date", "host"}}
    made = AWSRequest(request.method, url, data=request.body, headers=kept)
    keys = Credentials(environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"])
    S3SigV4Auth(keys, "s3", environment["AWS_DEFAULT_REGION"]).add_auth(made)
    headers = {name.lower(): str(value) for name, value in made.headers.items()}
    return replace(request, headers=headers | {"host": urlsplit(url).netloc})


class Ignores:
    """A store that does not know some headers."""

    def __init__(self, environment: Mapping[str, str], *names: str) -> None:
        self._environment, self._names = environment, names

    def __call__(self, request: Request, forward: Forward) -> Reply:
        if request.headers.keys() & set(self._names):
            request = signed(request.without(*self._names), self._environment)
        return forward(request)


class Sloppy:
    """A store whose lists, ranges, aborts and keys are no good, while its writes are."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def __call__(self, request: Request, forward: Forward) -> Reply:
        query = urlsplit(request.path).query
        if request.method == "DELETE" and "uploadId=" in query:
            return Reply(204, {}, b"")
        page = re.sub(r"&?continuation-token=[^&]*", "", query)
        path = urlsplit(request.path).path + (f"?{page}" if page else "")
        return forward(signed(replace(request, path=path).without("range"), self._environment))


class LooksFirst:
    """A store that knows conditions, but looks and writes in two steps: all writers look before one writes."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._lookers = threading.Barrier(4)

    def __call__(self, request: Request, forward: Forward) -> Reply:
        absent, match = request.headers.get("if-none-match"), request.headers.get("if-match")
        if request.method != "PUT" or not (absent or match):
            return forward(request)
        there = forward(signed(Request("HEAD", request.path, {}, b""), self._environment))
        if (absent and there.status == 200) or (match and there.headers.get("etag") != match):
            return Reply.error(412, "PreconditionFailed")
        if "/race-" in request.path:
            self._lookers.wait(timeout=30)
        return forward(signed(request.without("if-match", "if-none-match"), self._environment))


@pytest.mark.fault
@pytest.mark.parametrize(
    ("header", "broken", "did"),
    [
        ("if-none-match", {"create once", "race to create", "complete once"}, "ignores IfNoneMatch on writes"),
        ("if-match", {"replace known", "race to replace"}, "ignores IfMatch on writes"),
        ("x-amz-checksum-sha256", {"wrong checksum", "right checksum"}, "answers 200, where 400 is due"),
    ],
)
def test_a_store_that_ignores_a_header_fails_what_needs_it(
    services: Endpoints, s3: Any, root: str, header: str, broken: set[str], did: str
) -> None:
    with proxied(services.environment, Ignores(services.environment, header)) as environment:
        outcomes = examine(root, environment)
    assert failed(outcomes).keys() == broken
    assert next(iter(failed(outcomes).values())).startswith(did)
    assert conforms(outcomes) == (header == "x-amz-checksum-sha256")  # which is worth having, no more
    assert objects_below(s3, root.rpartition("/")[2]) == []


@pytest.mark.fault
def test_a_store_that_looks_and_then_writes_fails_the_races_alone(services: Endpoints, root: str) -> None:
    with proxied(services.environment, LooksFirst(services.environment)) as environment:
        outcomes = examine(root, environment)
        CheckpointStore(root, environment=environment).probe()  # one after the other, it does well
    assert failed(outcomes) == dict.fromkeys(("race to create", "race to replace"), "lets 4 of 4 writers win")


@pytest.mark.fault
def test_a_sloppy_store_is_told_each_of_its_faults(
    services: Endpoints, s3: Any, root: str, other_keys: dict[str, str]
) -> None:
    with proxied(services.environment | other_keys, Sloppy(services.environment)) as environment:
        outcomes = examine(root, environment)
    assert failed(outcomes) == {
        "pages": "answers with the same page again and again",
        "abort": "still lists the upload",
        "range": "gives other bytes than bytes=0-99",
        "range beyond the end": "answers 200, where 416 is due",
        "wrong keys": "answers 200 when a wrong secret would read, where 403 is due",
        "read-only keys": "answers 200 when these keys would write, where 403 is due",
        "two tenants": "answers 200 when the other tenant's keys would read, where 403 is due",
    }
    for entry in s3.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []):
        if entry["Key"].startswith(root.rpartition("/")[2]):  # this store would not let go of them
            s3.abort_multipart_upload(Bucket=BUCKET, Key=entry["Key"], UploadId=entry["UploadId"])
    assert objects_below(s3, root.rpartition("/")[2]) == []


def test_what_a_good_store_may_also_do(services: Endpoints, root: str) -> None:
    """As Amazon S3: 409 to writers that were at it at once, and no list of uploads without a right of its own."""

    def amazon(request: Request, forward: Forward) -> Reply:
        if "uploads&" in request.path:
            return Reply.error(403, "AccessDenied")
        reply = forward(request)
        undecided = reply.status == 412 and "/race-" in request.path
        return Reply.error(409, "ConditionalRequestConflict") if undecided else reply

    with proxied(services.environment, amazon) as environment:
        outcomes = examine(root, environment)
    told = {outcome.check: outcome for outcome in outcomes}
    assert failed(outcomes) == {}
    assert told["race to create"].did.endswith("9 x 409 ConditionalRequestConflict, after which saferlhf asks again")
    assert (told["abort"].result, told["abort"].follows) == ("not tested", "")
    assert "s3:ListBucketMultipartUploads" in told["abort"].did


@pytest.mark.fault
def test_what_was_made_is_removed_also_when_the_suite_is_interrupted(
    services: Endpoints, s3: Any, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "pages", interrupt)
    with pytest.raises(KeyboardInterrupt):
        examine(root, services.environment)
    assert objects_below(s3, root.rpartition("/")[2]) == []


@pytest.mark.fault
def test_a_bucket_that_is_not_there_is_not_made(services: Endpoints, s3: Any) -> None:
    with pytest.raises(StoreError, match="the bucket of s3://saferlhf-nowhere/x does not exist at http://127"):
        examine("s3://saferlhf-nowhere/x", services.environment)
    assert "saferlhf-nowhere" not in [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]]


def test_the_command_tells_what_holds_and_what_was_not_tested(services: Endpoints, root: str) -> None:
    done = CliRunner().invoke(app, ["doctor", "--store", root, "--json"])
    told = {outcome["check"]: outcome for outcome in json.loads(done.stdout)}
    assert done.exit_code == 0
    assert {name for name, outcome in told.items() if outcome["result"] != "ok"} == {"read-only keys", "two tenants"}
    assert told["two tenants"]["did"] == (
        "set SAFERLHF_OTHER_TENANT_AWS_ACCESS_KEY_ID and SAFERLHF_OTHER_TENANT_AWS_SECRET_ACCESS_KEY"
    )


@pytest.mark.fault
def test_keys_that_the_store_does_not_know_prove_nothing_about_a_tenant(
    services: Endpoints, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in keys_of("nobody").items():
        monkeypatch.setenv(f"SAFERLHF_OTHER_TENANT_{name}", value)
    done = CliRunner().invoke(app, ["doctor", "--store", root])
    assert done.exit_code == 1
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    row = lines.index("two tenants required FAILED read, list, write and delete with another team's keys")
    assert lines[row + 1] == ("does not know the other tenant's keys (403 InvalidAccessKeyId): nothing was tested")
    assert lines[row + 2] == "-> teams that share the store could read and replace each other's models"
    assert lines[-1] == f"{root} is no store for saferlhf: two tenants"


@pytest.mark.fault
def test_the_suite_goes_with_no_other_check() -> None:
    done = CliRunner().invoke(app, ["doctor", "mlflow", "--store", "s3://saferlhf-test"])
    assert isinstance(done.exception, SettingsError)
    assert "leave out mlflow" in str(done.exception)
