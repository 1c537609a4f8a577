"""Reading, writing and listing: what fetches, commits and pruning stand on."""

from __future__ import annotations

import base64
import hashlib
import random

from components.foundation.store_conformance.bench import Bench, Broken, Check, NotTested, ask, require

_MIB = 1 << 20
_LARGE_BYTES = 16 * _MIB
_PART_BYTES = 5 * _MIB
"""S3 takes no smaller part, but for the last."""

_LISTED = 5
_PAGE = 2
_UNUSUAL = "a b+c%41&é=日本#'(1)~;,@!.safetensors"


def _round_trip(bench: Bench) -> str:
    key = bench.key("round-trip")
    for content in (b"first", b"second"):
        etag = bench.put(key, content)
        reply = bench.client.get_object(**bench.place(key))
        require(reply["Body"].read() == content, "does not give back what was just written")
        require(reply["ETag"] == etag, "gives an object another ETag than its write was told")
    return "each time what was just written, with the ETag of the write"


def _missing(bench: Bench) -> str:
    place = bench.place(bench.key("missing"))
    answers = [ask(lambda: bench.client.head_object(**place)), ask(lambda: bench.client.get_object(**place))]
    for answer in answers:
        require(answer.status == 404, f"answers {answer}, where 404 is due (on AWS: these keys lack s3:ListBucket)")
    return f"{answers[0]} and {answers[1]}"


def _empty(bench: Bench) -> str:
    key = bench.key("empty")
    bench.put(key, b"")
    require(bench.read(key) == b"", "gives back something for an empty object")
    return "it is there, and empty"


def _large(bench: Bench) -> str:
    content = _bytes(_LARGE_BYTES)
    key = bench.key("large")
    bench.put(key, content)
    require(bench.read(key) == content, "gives back other bytes")
    return "every byte came back"


def _unusual_key(bench: Bench) -> str:
    key = bench.key(_UNUSUAL)
    bench.put(key, b"unusual")
    require(bench.read(key) == b"unusual", "gives back something else")
    require(bench.listed(key) == [key], f"lists it as {bench.listed(key)}")
    return "it is read and listed under its name"


def _list(bench: Bench) -> str:
    keys = [bench.key(f"list/{number}") for number in range(_LISTED)]
    for key in keys:
        bench.put(key, b"x")
    found = bench.listed(f"{bench.prefix}/list/")
    require(sorted(found) == keys, f"lists {len(found)} of {_LISTED} objects that were just written")
    bench.delete(keys[0])
    found = bench.listed(f"{bench.prefix}/list/")
    require(sorted(found) == keys[1:], "still lists an object that was just deleted")
    require(ask(lambda: bench.read(keys[0])).status == 404, "still serves an object that was just deleted")
    return "each write and the deletion were seen at once"


def _pages(bench: Bench) -> str:
    from botocore.exceptions import PaginationError

    keys = [bench.key(f"pages/{number}") for number in range(_LISTED)]
    for key in keys:
        bench.put(key, b"x")
    try:
        pages = bench.pages(f"{bench.prefix}/pages/", _PAGE)
    except PaginationError as error:
        raise Broken("answers with the same page again and again") from error
    found = [key for page in pages for key in page]
    require(sorted(found) == keys, f"gives {len(found)} keys for {_LISTED} objects, on {len(pages)} pages")
    require(len(pages) > 1, "ignores max-keys")
    return f"{len(pages)} pages, each object once"


def _multipart(bench: Bench) -> str:
    content, key = _bytes(_PART_BYTES + 1000), bench.key("multipart")
    upload = bench.begin_upload(key, [content[:_PART_BYTES], content[_PART_BYTES:]])
    before = ask(lambda: bench.read(key))
    require(before.status == 404, f"answers {before} for an object whose upload is not complete")
    bench.client.complete_multipart_upload(**upload)
    require(bench.read(key) == content, "gives back other bytes")
    return "nothing is there until it is complete; then every byte"


def _abort(bench: Bench) -> str:
    key = bench.key("abort")
    upload = bench.begin_upload(key, [b"part"])["UploadId"]
    bench.client.abort_multipart_upload(**bench.place(key), UploadId=upload)
    if ask(lambda: bench.client.list_multipart_uploads(Bucket=bench.bucket, Prefix=key)).status == 403:
        raise NotTested("these keys may not list uploads: give them s3:ListBucketMultipartUploads")
    left = bench.client.list_multipart_uploads(Bucket=bench.bucket, Prefix=key).get("Uploads", [])
    require(not left, "still lists the upload")
    parts = ask(lambda: bench.client.list_parts(**bench.place(key), UploadId=upload))
    require(parts.status == 404, f"answers {parts} to the list of its parts, where 404 is due")
    return f"the upload is gone; its parts: {parts}"


def _range(bench: Bench) -> str:
    content, key = _bytes(1000), bench.key("range")
    bench.put(key, content)
    for wanted, due, place in (
        ("bytes=0-99", content[:100], "0-99"),
        ("bytes=500-599", content[500:600], "500-599"),
        ("bytes=900-", content[900:], "900-999"),
    ):
        reply = bench.client.get_object(**bench.place(key), Range=wanted)
        require(reply["Body"].read() == due, f"gives other bytes than {wanted}")
        require(reply.get("ContentRange") == f"bytes {place}/1000", f"says {reply.get('ContentRange')} to {wanted}")
    return "the bytes that were asked for, with Content-Range"


def _range_beyond(bench: Bench) -> str:
    key = bench.key("range-beyond")
    bench.put(key, b"short")
    answer = ask(lambda: bench.read(key, Range="bytes=1000-"))
    require(answer.status == 416, f"answers {answer}, where 416 is due")
    return str(answer)


def _wrong_checksum(bench: Bench) -> str:
    key = bench.key("wrong-checksum")
    answer = ask(lambda: bench.put(key, b"content", ChecksumSHA256=_sha256(b"other content")))
    require(answer.status == 400, f"answers {answer}, where 400 is due")
    require(ask(lambda: bench.read(key)).status == 404, "refuses the write, but keeps the object")
    return f"{answer}; nothing was kept"


def _right_checksum(bench: Bench) -> str:
    key, checksum = bench.key("right-checksum"), _sha256(b"content")
    bench.put(key, b"content", ChecksumSHA256=checksum)
    said = bench.client.head_object(**bench.place(key), ChecksumMode="ENABLED").get("ChecksumSHA256")
    require(said == checksum, f"says {said}, where {checksum} is due")
    return "it was kept and returned"


def _bytes(count: int) -> bytes:
    return random.Random(count).randbytes(count)


def _sha256(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


_UNFETCHED = "weights could not be committed or fetched"
OBJECTS = (
    Check(
        "round trip", "PUT, GET, overwrite, GET", "a stage could read an old LATEST and do its work twice", _round_trip
    ),
    Check(
        "missing object",
        "HEAD and GET an object that is not there",
        "saferlhf could not tell a stage that has not run from one that it may not see",
        _missing,
    ),
    Check("empty object", "PUT and GET no bytes", "a folder with an empty file could not be committed", _empty),
    Check("large object", f"PUT and GET {_LARGE_BYTES // _MIB} MiB", _UNFETCHED, _large),
    Check(
        "unusual key",
        f"PUT, GET and list {_UNUSUAL}",
        "a base model with such a file name could not be committed; saferlhf's own names are plain",
        _unusual_key,
        required=False,
    ),
    Check(
        "list",
        f"list after {_LISTED} writes and after a deletion",
        "pruning could leave steps behind, and a promotion could miss the last entry of the champion log",
        _list,
    ),
    Check(
        "pages",
        f"list {_LISTED} objects, {_PAGE} a page",
        "beyond 1000 objects, pruning would leave steps behind and the champion log would have gaps",
        _pages,
    ),
    Check(
        "multipart",
        f"upload {_PART_BYTES // _MIB} MiB and 1000 bytes in two parts",
        "files above 64 MiB, as weights are, could not be committed",
        _multipart,
    ),
    Check(
        "abort",
        "abort a multipart upload",
        "parts of uploads that failed would stay and cost money: let a lifecycle rule of the bucket remove them",
        _abort,
        required=False,
    ),
    Check(
        "range",
        "GET the first, middle and last 100 of 1000 bytes",
        "files above 8 MiB are fetched in parts, so weights could not be fetched",
        _range,
    ),
    Check(
        "range beyond the end",
        "GET bytes that an object does not have",
        "nothing today: saferlhf asks for the size before it asks for ranges",
        _range_beyond,
        required=False,
    ),
    Check(
        "wrong checksum",
        "PUT with an x-amz-checksum-sha256 of other content",
        "damage on the way into the store is found by the first fetch and not by the commit",
        _wrong_checksum,
        required=False,
    ),
    Check(
        "right checksum",
        "PUT with x-amz-checksum-sha256, HEAD with x-amz-checksum-mode",
        "damage of small texts on the way out goes unnoticed; weights have digests in their manifest",
        _right_checksum,
        required=False,
    ),
)
