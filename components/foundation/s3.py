"""Objects in S3 by URI: every failure is a StoreError that names the URI and says what to do.

Endpoint, credentials and region come from the environment that boto3 reads (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import random
import re
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.foundation.errors import (
    ConflictError,
    IntegrityError,
    MissingError,
    StoreError,
    StoreUnavailableError,
)
from components.foundation.untrusted import MAX_TEXT_BYTES, one_line

if TYPE_CHECKING:
    from boto3.session import Session
    from mypy_boto3_s3 import S3Client

ABSENT = {"IfNoneMatch": "*"}
"""Write condition: only when there is no such object."""

PATIENT: Mapping[str, Any] = {"retries": {"mode": "standard", "total_max_attempts": 5}}
ONE_TRY: Mapping[str, Any] = {"retries": {"mode": "standard", "total_max_attempts": 1}}
"""Settings of a client: how often a request is sent before its failure is told."""

SMALL_BYTES = 64 * 1024 * 1024
"""The largest file that is sent in one request."""

_ONE_REPLY_BYTES = 8 * 1024 * 1024
"""The largest file that is asked for in one request: what takes longest with small ones is asking."""

_SYNC_BYTES = 64 * 1024 * 1024
"""What is downloaded is sent to the disk in pieces of at least so many bytes, while more arrives."""

_READ_TRIES = 4
_UNDECIDED_WAITS = (0.1, 0.4, 1.6)
"""Seconds before a write is repeated to which the store answered that another one was under way."""

_ONE_AT_A_TIME = threading.Lock()
"""boto3's sessions are not for several threads; its clients are."""

_MISSING = {"404", "NoSuchKey", "NotFound"}
_REFUSED = {"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"}
_AWAY = {"502", "503", "504", "BadGateway", "ServiceUnavailable", "GatewayTimeout", "SlowDown"}
_UNDECIDED = {"409", "ConditionalRequestConflict", "OperationAborted"}
_TAKEN = {"412", "PreconditionFailed", "BucketAlreadyExists", "BucketAlreadyOwnedByYou"} | _UNDECIDED


class S3:
    """One endpoint with one set of credentials; connects at the first call.

    Every method raises StoreError, and more exactly MissingError for an object that is not there, IntegrityError for
    one that arrived damaged, ConflictError for a write whose condition did not hold, and StoreUnavailableError for a
    store that is away.

    Args:
        environment: where endpoint and credentials are read; default: the process's environment.
        client_config: arguments of botocore's Config, for instance ONE_TRY.
    """

    def __init__(
        self, environment: Mapping[str, str] | None = None, client_config: Mapping[str, Any] = PATIENT
    ) -> None:
        self._environment = os.environ if environment is None else environment
        self._client_config = client_config

    @property
    def endpoint(self) -> str:
        """URL for messages."""
        return _endpoint(self._environment) or "AWS"

    @functools.cached_property
    def client(self) -> S3Client:
        """boto3's client, for calls inside `errors`."""
        return _new_client(self._environment, **self._client_config)

    def exists(self, uri: str) -> bool:
        bucket, key = split_uri(uri)
        try:
            with self.errors(uri):
                self.client.head_object(Bucket=bucket, Key=key)
        except MissingError:
            return False
        return True

    def get(self, uri: str) -> tuple[str, str]:
        """(text, ETag) of a small object."""
        body, etag = self._read(uri, MAX_TEXT_BYTES, "has {} bytes, and is no record of ours")
        try:
            return body.decode(), etag
        except UnicodeDecodeError as error:
            raise IntegrityError(f"{uri} is not text: {one_line(error)}") from error

    def _read(self, uri: str, most: int, complaint: str) -> tuple[bytes, str]:
        """(content, ETag) of an object of at most so many bytes; of a larger one, an IntegrityError complains."""
        from botocore.exceptions import FlexibleChecksumError, IncompleteReadError, ResponseStreamingError
        from urllib3.exceptions import ProtocolError

        bucket, key = split_uri(uri)
        with self.errors(uri):
            for tries_left in reversed(range(_READ_TRIES)):
                try:
                    reply = self.client.get_object(Bucket=bucket, Key=key)
                    if reply["ContentLength"] > most:
                        reply["Body"].close()
                        raise IntegrityError(f"{uri} {complaint.format(reply['ContentLength'])}")
                    return reply["Body"].read(), reply["ETag"]
                # a reply that broke off: boto3 repeats requests, but not the reading of what get_object returns
                except (FlexibleChecksumError, IncompleteReadError, ResponseStreamingError, ProtocolError):
                    if not tries_left:
                        raise
        raise AssertionError("the last try raises")

    def put(self, uri: str, text: str, condition: Mapping[str, str]) -> None:
        """Write a small object if `condition` (ABSENT, {"IfMatch": etag}, or none) holds.

        A write whose reply was lost is repeated, and then its condition fails because of the first try: such a write
        has succeeded. 409 says that another write was under way and nothing was decided: the same is asked again.
        """
        from botocore.exceptions import ClientError

        bucket, key = split_uri(uri)
        waits, repeated = iter(_UNDECIDED_WAITS), False
        with self.errors(uri):
            while True:
                try:
                    self.client.put_object(Bucket=bucket, Key=key, Body=text.encode(), **condition)  # type: ignore[arg-type]
                    return
                except ClientError as error:
                    code = error.response.get("Error", {}).get("Code", "")
                    repeated = repeated or error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0
                    if code in _TAKEN and repeated and self._holds(uri, text):
                        return
                    wait = next(waits, None) if code in _UNDECIDED else None
                    if wait is None:
                        raise
                    time.sleep(wait * random.uniform(0.5, 1.0))  # two writers must not go on in step

    def upload(self, path: Path, uri: str) -> None:
        """File -> object, in parts and in parallel when it has more than SMALL_BYTES."""
        from boto3.s3.transfer import TransferConfig

        bucket, key = split_uri(uri)
        with self.errors(uri):
            if path.stat().st_size <= SMALL_BYTES:
                with path.open("rb") as stream:
                    self.client.put_object(Bucket=bucket, Key=key, Body=stream)
                return
            config = TransferConfig(multipart_threshold=SMALL_BYTES, multipart_chunksize=SMALL_BYTES // 2)
            self.client.upload_file(str(path), bucket, key, Config=config)

    def download(self, uri: str, path: Path, size: int) -> str:
        """Object -> file, which is on the disk when this returns; the SHA-256 of what arrived.

        Raises:
            IntegrityError: the object has more than `size` bytes; the rest was not asked for.
        """
        complaint = f"is damaged: it has more than the {size} bytes of its manifest"
        with path.open("wb", buffering=0) as stream, ThreadPoolExecutor(1) as syncing:
            file = _DurableFile(stream, size, IntegrityError(f"{uri} {complaint}"), syncing)
            if size <= _ONE_REPLY_BYTES:
                file.write(self._read(uri, size, complaint)[0])
            else:
                bucket, key = split_uri(uri)
                with self.errors(uri):
                    self.client.download_fileobj(bucket, key, file)  # type: ignore[arg-type]
            return file.finish()

    def download_file(self, uri: str, path: Path, most: int) -> None:
        """Object of a size that nobody wrote down -> file.

        Raises:
            IntegrityError: it has more than `most` bytes; nothing was asked for.
        """
        bucket, key = split_uri(uri)
        with self.errors(uri):
            size = self.client.head_object(Bucket=bucket, Key=key)["ContentLength"]
        if size > most:
            raise IntegrityError(f"{uri} has {size} bytes, and at most {most} are read: give it in parts")
        self.download(uri, path, size)

    def list(self, prefix_uri: str) -> list[str]:
        """URIs of all objects whose URI starts so."""
        bucket, prefix = split_uri(prefix_uri)
        with self.errors(prefix_uri):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            return [f"s3://{bucket}/{entry['Key']}" for page in pages for entry in page.get("Contents", [])]

    def delete(self, uri: str) -> None:
        """Remove an object; nothing happens where there is none."""
        bucket, key = split_uri(uri)
        with self.errors(uri):
            self.client.delete_object(Bucket=bucket, Key=key)

    def ensure_bucket(self, bucket: str) -> None:
        """Create the bucket unless it exists, or unless these keys may not ask: then the first write will tell."""
        from botocore.exceptions import ClientError

        uri = f"s3://{bucket}"
        with self.errors(uri):
            try:
                self.client.head_bucket(Bucket=bucket)
                return
            except ClientError as error:
                status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                if status == 403:  # as for keys that are limited to a prefix
                    return
                if status != 404:
                    raise
        region = self.client.meta.region_name
        options: dict[str, Any] = {}
        if region not in {"us-east-1", "aws-global"}:
            options["CreateBucketConfiguration"] = {"LocationConstraint": region}
        try:
            with contextlib.suppress(ConflictError), self.errors(uri):  # a race is settled by the look that follows
                self.client.create_bucket(Bucket=bucket, **options)
            with self.errors(uri):
                self.client.head_bucket(Bucket=bucket)
        except MissingError as error:
            message = f"{self.endpoint} answers, but not as an S3 store: {uri} cannot be made; check AWS_ENDPOINT_URL"
            raise StoreError(message) from error

    @contextlib.contextmanager
    def errors(self, uri: str) -> Iterator[None]:
        """What boto3 raises in the block is raised as a StoreError about `uri`."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            ConnectionError,
            FlexibleChecksumError,
            HTTPClientError,
            IncompleteReadError,
            NoCredentialsError,
        )
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ClientError as error:
            raise self._explained(uri, error.response.get("Error", {}).get("Code", ""), error) from error
        except NoCredentialsError as error:
            raise StoreError(f"no S3 credentials for {uri}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
        except FlexibleChecksumError as error:
            raise IntegrityError(f"{uri} arrived damaged: {error}") from error
        # HTTPError: boto3 lets some through
        except (ConnectionError, HTTPClientError, HTTPError, IncompleteReadError) as error:
            message = f"cannot reach the S3 store at {self.endpoint} for {uri}: check AWS_ENDPOINT_URL and the network"
            raise StoreUnavailableError(f"{message} ({error})") from error
        except (BotoCoreError, Boto3Error, ValueError) as error:  # ValueError: botocore's word on a malformed endpoint
            raise StoreError(f"{uri}: the S3 store at {self.endpoint} cannot be used: {error}") from error

    def _explained(self, uri: str, code: str, error: Exception) -> StoreError:
        if code == "NoSuchBucket":
            return StoreError(f"the bucket of {uri} does not exist at {self.endpoint}: create it or change store.uri")
        if code in _MISSING:
            return MissingError(f"{uri} does not exist")
        if code in _TAKEN:
            return ConflictError(f"{uri} was already written by somebody else")
        if code in _REFUSED:
            return StoreError(
                f"the S3 store at {self.endpoint} refuses {uri} ({code}): check AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY and the rights of this key"
            )
        kind = StoreUnavailableError if code in _AWAY else StoreError
        return kind(f"{uri}: the S3 store at {self.endpoint} failed: {error}")

    def _holds(self, uri: str, text: str) -> bool:
        try:
            return self.get(uri)[0] == text
        except MissingError:
            return False


class _DurableFile:
    """A file that is written from its beginning to its end, and hashed and sent to the disk on the way.

    It has no `seek`: boto3 then writes parts in their order, each once, from one thread.

    Args:
        too_large: is raised when more than `size` bytes are written.
        syncing: one thread.
    """

    def __init__(self, stream: FileIO, size: int, too_large: Exception, syncing: ThreadPoolExecutor) -> None:
        self._stream, self._room, self._too_large, self._executor = stream, size, too_large, syncing
        self._digest = hashlib.sha256()
        self._unsynced = 0
        self._syncing: Future[None] | None = None

    def write(self, data: bytes) -> None:
        self._room -= len(data)
        if self._room < 0:
            raise self._too_large
        self._digest.update(data)
        rest = memoryview(data)
        while rest:
            rest = rest[self._stream.write(rest) :]
        self._unsynced += len(data)
        if self._unsynced >= _SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            self._sync()

    def finish(self) -> str:
        """The SHA-256 of what was written; all of it is on the disk."""
        self._sync()
        self._wait()
        return self._digest.hexdigest()

    def _sync(self) -> None:
        """Begin to send what was written to the disk: a power failure could leave a whole name on half a file."""
        self._wait()
        self._unsynced = 0
        self._syncing = self._executor.submit(os.fsync, self._stream.fileno())

    def _wait(self) -> None:
        """Until what was sent is there. A failure is told once, to whoever waits: it must not get lost."""
        if self._syncing is not None:
            self._syncing.result()


def split_uri(uri: str) -> tuple[str, str]:
    """s3://bucket/key -> (bucket, key).

    Raises:
        StoreError: it is no S3 URI.
    """
    match = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{2,62})(?:/(.*))?", uri)
    if match is None:
        raise StoreError(
            f"{uri!r} is not an S3 URI: write s3://bucket/prefix, with a bucket name of 3 to 63 characters"
        )
    return match[1], match[2] or ""


def _endpoint(environment: Mapping[str, str]) -> str | None:
    return environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or None


@functools.cache
def _session() -> Session:
    """One for the process: a new one would parse the description of S3 again, for a quarter of a second."""
    import boto3

    return boto3.session.Session()


def _new_client(environment: Mapping[str, str], **config: Any) -> S3Client:
    from botocore.config import Config

    endpoint = _endpoint(environment)
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if endpoint:
        config["s3"] = {"addressing_style": "path"}  # other stores than AWS seldom answer to bucket.host
    with _ONE_AT_A_TIME:
        return _session().client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=environment.get("AWS_ACCESS_KEY_ID"),
            aws_secret_access_key=environment.get("AWS_SECRET_ACCESS_KEY"),
            aws_session_token=environment.get("AWS_SESSION_TOKEN"),
            region_name=region or ("us-east-1" if endpoint else None),
            config=Config(**config),
        )
