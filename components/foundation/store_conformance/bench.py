"""What every check stands on: a client, keys of its own, and the store's answers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from components.foundation.s3 import ONE_TRY, S3

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


Result = Literal["ok", "failed", "not tested"]


class Broken(Exception):
    """The store does not what S3 does. The message is a predicate of the store: "ignores IfMatch on writes"."""


class NotTested(Exception):
    """A check lacks what it needs; the message says how to give it."""


@dataclass
class Bench:
    """A place below a prefix that nobody else uses; what is made there through `key` and `begin_upload` is removed.

    Attributes:
        s3: for the client, which sends every request once: a repeated one would blur what the store does.
        prefix: of every key, without a slash at its end.
        environment: endpoint and credentials, also those of other identities.
    """

    s3: S3
    bucket: str
    prefix: str
    environment: Mapping[str, str]
    keys: list[str] = field(default_factory=list)
    uploads: list[tuple[str, str]] = field(default_factory=list)

    @property
    def client(self) -> S3Client:
        return self.s3.client

    def key(self, name: str) -> str:
        """Key of an object that a check may write."""
        self.keys.append(f"{self.prefix}/{name}")
        return self.keys[-1]

    def put(self, key: str, body: bytes, **condition: Any) -> str:
        """Write an object; its ETag."""
        return self.client.put_object(**self.place(key), Body=body, **condition)["ETag"]

    def read(self, key: str, **options: Any) -> bytes:
        return self.client.get_object(**self.place(key), **options)["Body"].read()

    def delete(self, key: str) -> None:
        self.client.delete_object(**self.place(key))

    def listed(self, prefix: str) -> list[str]:
        """Keys that begin so."""
        return [key for page in self.pages(prefix, 1000) for key in page]

    def pages(self, prefix: str, size: int) -> list[list[str]]:
        """Keys that begin so, page by page."""
        replies = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=prefix, PaginationConfig={"PageSize": size}
        )
        return [[entry["Key"] for entry in reply.get("Contents", [])] for reply in replies]

    def place(self, key: str) -> dict[str, Any]:
        """Arguments of a call about one object."""
        return {"Bucket": self.bucket, "Key": key}

    def begin_upload(self, key: str, parts: list[bytes]) -> dict[str, Any]:
        """Begin a multipart upload and send its parts -> arguments of the call that completes it."""
        place = self.place(key)
        upload = self.client.create_multipart_upload(**place)["UploadId"]
        self.uploads.append((key, upload))
        sent = []
        for number, part in enumerate(parts, start=1):
            reply = self.client.upload_part(**place, UploadId=upload, PartNumber=number, Body=part)
            sent.append({"PartNumber": number, "ETag": reply["ETag"]})
        return {**place, "UploadId": upload, "MultipartUpload": {"Parts": sent}}

    def identity(self, **credentials: str) -> Bench:
        """The same place seen with other keys: what is made with them is removed with ours."""
        environment = {**self.environment, "AWS_SESSION_TOKEN": "", **credentials}
        return dataclasses.replace(self, s3=S3(environment, ONE_TRY), environment=environment)

    def clean(self) -> None:
        """Remove what was made, whatever the store says to it."""
        from botocore.exceptions import BotoCoreError, ClientError

        for key, upload in self.uploads:
            with contextlib.suppress(BotoCoreError, ClientError):
                self.client.abort_multipart_upload(**self.place(key), UploadId=upload)
        for key in self.keys:
            with contextlib.suppress(BotoCoreError, ClientError):
                self.delete(key)


@dataclass(frozen=True)
class Check:
    """One question to a store.

    Attributes:
        name: what the table calls it.
        asked: what is done, in a few words.
        follows: what it means for saferlhf where the store fails.
        run: says what the store did. Raises Broken, NotTested, or what boto3 raises.
        required: saferlhf loses or mixes up data without it; otherwise it is worth having.
    """

    name: str
    asked: str
    follows: str
    run: Callable[[Bench], str]
    required: bool = True


@dataclass(frozen=True)
class Outcome:
    """One check's answer.

    Attributes:
        did: what the store did, or how to have it tested.
        follows: for saferlhf; empty where all is well.
    """

    check: str
    required: bool
    result: Result
    asked: str
    did: str
    follows: str


@dataclass(frozen=True)
class Answer:
    """HTTP status, and S3's error code where it is an error."""

    status: int
    code: str = ""

    def __str__(self) -> str:
        return f"{self.status} {self.code}".rstrip()


def ask(call: Callable[[], object]) -> Answer:
    """The store's answer, also where it is an error."""
    from botocore.exceptions import ClientError

    try:
        call()
    except ClientError as error:
        return answer_of(error)
    return Answer(200)


def answer_of(error: Any) -> Answer:
    """The answer in a ClientError."""
    status = int(error.response["ResponseMetadata"]["HTTPStatusCode"])
    code = str(error.response["Error"].get("Code", ""))
    return Answer(status, "" if code == str(status) else code)


def require(holds: bool, otherwise: str) -> None:
    """Raises: Broken with the predicate `otherwise`, where it does not hold."""
    if not holds:
        raise Broken(otherwise)
