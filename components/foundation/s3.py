"""Objects in S3 by URI: every failure is a StoreError that names the URI and says what to do.

Endpoint, credentials and region come from the environment that boto3 reads (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.foundation.errors import ConflictError, IntegrityError, StoreError, StoreUnavailableError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ABSENT = {"IfNoneMatch": "*"}
"""Write condition: only when there is no such object."""

_MULTIPART_BYTES = 64 * 1024 * 1024
_MISSING = {"404", "NoSuchKey", "NotFound"}
_REFUSED = {"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"}
_AWAY = {"503", "ServiceUnavailable", "SlowDown"}
_TAKEN = {"409", "412", "PreconditionFailed", "ConditionalRequestConflict", "BucketAlreadyExists", "OperationAborted"}


class S3:
    """One endpoint with one set of credentials; connects at the first call.

    Every method raises StoreError, and more exactly IntegrityError for an object that is missing,
    ConflictError for a write whose condition did not hold, and StoreUnavailableError for a store that is away.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = os.environ if environment is None else environment

    @property
    def endpoint(self) -> str:
        """URL for messages."""
        return _endpoint(self._environment) or "AWS"

    @functools.cached_property
    def _client(self) -> S3Client:
        return _new_client(self._environment, retries={"mode": "standard", "total_max_attempts": 5})

    def exists(self, uri: str) -> bool:
        bucket, key = split_uri(uri)
        try:
            with self._errors(uri):
                self._client.head_object(Bucket=bucket, Key=key)
        except IntegrityError:
            return False
        return True

    def get(self, uri: str) -> tuple[str, str]:
        """(text, ETag) of a small object."""
        bucket, key = split_uri(uri)
        with self._errors(uri):
            reply = self._client.get_object(Bucket=bucket, Key=key)
            body = reply["Body"].read()
        try:
            return body.decode(), reply["ETag"]
        except UnicodeDecodeError as error:
            raise IntegrityError(f"{uri} is not text: {error}") from error

    def put(self, uri: str, text: str, condition: Mapping[str, str]) -> None:
        """Write a small object if `condition` (ABSENT, {"IfMatch": etag}, or none) holds."""
        bucket, key = split_uri(uri)
        with self._errors(uri):
            self._client.put_object(Bucket=bucket, Key=key, Body=text.encode(), **condition)  # type: ignore[arg-type]

    def upload(self, path: Path, uri: str) -> None:
        """File -> object, in parts and in parallel when it is big."""
        from boto3.s3.transfer import TransferConfig

        bucket, key = split_uri(uri)
        config = TransferConfig(multipart_threshold=_MULTIPART_BYTES, multipart_chunksize=_MULTIPART_BYTES // 2)
        with self._errors(uri):
            self._client.upload_file(str(path), bucket, key, Config=config)

    def download(self, uri: str, path: Path) -> None:
        """Object -> file."""
        bucket, key = split_uri(uri)
        with self._errors(uri):
            self._client.download_file(bucket, key, str(path))

    def list(self, prefix_uri: str) -> list[str]:
        """URIs of all objects whose URI starts so."""
        bucket, prefix = split_uri(prefix_uri)
        with self._errors(prefix_uri):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            return [f"s3://{bucket}/{entry['Key']}" for page in pages for entry in page.get("Contents", [])]

    def delete(self, uri: str) -> None:
        """Remove an object; nothing happens where there is none."""
        bucket, key = split_uri(uri)
        with self._errors(uri):
            self._client.delete_object(Bucket=bucket, Key=key)

    def ensure_bucket(self, bucket: str) -> None:
        """Create the bucket unless it exists."""
        with self._errors(f"s3://{bucket}"):
            client = self._client
        self._ensure_bucket(client, bucket)

    def probe(self, root_uri: str) -> None:
        """Check within about ten seconds that `root_uri` can be written and that conditional writes are honoured."""
        bucket, prefix = split_uri(root_uri)
        key = f"{prefix}/.probe-{uuid.uuid4().hex}".lstrip("/")
        uri = f"s3://{bucket}/{key}"
        with self._errors(uri):
            once = {"mode": "standard", "total_max_attempts": 1}
            client = _new_client(self._environment, connect_timeout=3, read_timeout=4, retries=once)
        self._ensure_bucket(client, bucket)
        try:
            with self._errors(uri):
                client.put_object(Bucket=bucket, Key=key, Body=b"first", IfNoneMatch="*")
            for condition in (ABSENT, {"IfMatch": '"00000000000000000000000000000000"'}):
                with contextlib.suppress(ConflictError), self._errors(uri):
                    client.put_object(Bucket=bucket, Key=key, Body=b"second", **condition)  # type: ignore[arg-type]
                    raise StoreError(
                        f"the S3 store at {self.endpoint} ignores {next(iter(condition))} on writes, so two runs could "
                        "overwrite each other: use a store with conditional writes"
                    )
        finally:
            with contextlib.suppress(StoreError), self._errors(uri):
                client.delete_object(Bucket=bucket, Key=key)

    def _ensure_bucket(self, client: S3Client, bucket: str) -> None:
        uri = f"s3://{bucket}"
        with contextlib.suppress(IntegrityError), self._errors(uri):
            client.head_bucket(Bucket=bucket)
            return
        region = client.meta.region_name
        options: dict[str, Any] = {}
        if region not in {"us-east-1", "aws-global"}:
            options["CreateBucketConfiguration"] = {"LocationConstraint": region}
        try:
            with contextlib.suppress(ConflictError), self._errors(uri):  # a race is settled by the look that follows
                client.create_bucket(Bucket=bucket, **options)
            with self._errors(uri):
                client.head_bucket(Bucket=bucket)
        except IntegrityError as error:
            message = f"{self.endpoint} answers, but not as an S3 store: {uri} cannot be made; check AWS_ENDPOINT_URL"
            raise StoreError(message) from error

    @contextlib.contextmanager
    def _errors(self, uri: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            ConnectionError,
            FlexibleChecksumError,
            HTTPClientError,
            NoCredentialsError,
        )

        try:
            yield
        except ClientError as error:
            raise self._explained(uri, error.response.get("Error", {}).get("Code", ""), error) from error
        except NoCredentialsError as error:
            raise StoreError(f"no S3 credentials for {uri}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
        except FlexibleChecksumError as error:
            raise IntegrityError(f"{uri} arrived damaged: {error}") from error
        except (ConnectionError, HTTPClientError) as error:
            message = f"cannot reach the S3 store at {self.endpoint} for {uri}: check AWS_ENDPOINT_URL and the network"
            raise StoreUnavailableError(f"{message} ({error})") from error
        except (BotoCoreError, Boto3Error, ValueError) as error:  # ValueError: botocore's word on a malformed endpoint
            raise StoreError(f"{uri}: the S3 store at {self.endpoint} cannot be used: {error}") from error

    def _explained(self, uri: str, code: str, error: Exception) -> StoreError:
        if code == "NoSuchBucket":
            return StoreError(f"the bucket of {uri} does not exist at {self.endpoint}: create it or change store.uri")
        if code in _MISSING:
            return IntegrityError(f"{uri} does not exist")
        if code in _TAKEN or code == "BucketAlreadyOwnedByYou":
            return ConflictError(f"{uri} was already written by somebody else")
        if code in _REFUSED:
            return StoreError(
                f"the S3 store at {self.endpoint} refuses {uri} ({code}): check AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY and the rights of this key"
            )
        kind = StoreUnavailableError if code in _AWAY else StoreError
        return kind(f"{uri}: the S3 store at {self.endpoint} failed: {error}")


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


def _new_client(environment: Mapping[str, str], **config: Any) -> S3Client:
    import boto3
    from botocore.config import Config

    endpoint = _endpoint(environment)
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if endpoint:
        config["s3"] = {"addressing_style": "path"}  # other stores than AWS seldom answer to bucket.host
    session = boto3.session.Session(
        aws_access_key_id=environment.get("AWS_ACCESS_KEY_ID"),
        aws_secret_access_key=environment.get("AWS_SECRET_ACCESS_KEY"),
        aws_session_token=environment.get("AWS_SESSION_TOKEN"),
        region_name=region or ("us-east-1" if endpoint else None),
    )
    return session.client("s3", endpoint_url=endpoint, config=Config(**config))
