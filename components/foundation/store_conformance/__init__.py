"""Is this store as good as S3? One suite of checks for any S3-compatible store.

    bench.py        what checks stand on: keys below a prefix of their own, answers, outcomes
    conditional.py  conditional writes, one after the other and in a race
    objects.py      reads, writes, lists, multipart uploads, ranges, checksums
    access.py       wrong keys, read-only keys, another tenant's keys

`examine` makes all of them, for `saferlhf doctor --store`; `probe` makes the two without which no run may start.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence

from components.foundation.errors import StoreError
from components.foundation.s3 import ONE_TRY, S3, split_uri
from components.foundation.store_conformance.access import ACCESS
from components.foundation.store_conformance.bench import (
    Bench,
    Broken,
    Check,
    NotTested,
    Outcome,
    Result,
    answer_of,
    ask,
)
from components.foundation.store_conformance.conditional import CONDITIONAL, CREATE_ONCE, REPLACE_KNOWN
from components.foundation.store_conformance.objects import OBJECTS

__all__ = ["CHECKS", "Outcome", "conforms", "examine", "probe"]

CHECKS: Sequence[Check] = (*CONDITIONAL, *OBJECTS, *ACCESS)

_QUICK = {**ONE_TRY, "connect_timeout": 3, "read_timeout": 4}


def examine(root_uri: str, environment: Mapping[str, str]) -> list[Outcome]:
    """What each check finds out about the store at `root_uri`, in the order of CHECKS; last, whether all was removed.

    Everything is written below a new prefix of `root_uri`, and removed at the end and when a check breaks off.

    Raises:
        StoreError: `root_uri` is no S3 URI, or it cannot be written at all.
    """
    bench = _bench(root_uri, S3(environment, ONE_TRY), environment)
    try:
        with bench.s3.errors(root_uri):  # the write tells keys that may not ask for the bucket, as those of a prefix
            if ask(lambda: bench.client.head_bucket(Bucket=bench.bucket)).status == 404:
                raise StoreError(f"the bucket of {root_uri} does not exist at {bench.s3.endpoint}: create it")
            bench.put(bench.key("first"), b"")
        outcomes = [_outcome(check, bench) for check in CHECKS]
    finally:
        bench.clean()
    return [*outcomes, _outcome(_CLEAN, bench)]


def conforms(outcomes: Sequence[Outcome]) -> bool:
    """Whether nothing that saferlhf needs is broken."""
    return all(outcome.result != "failed" for outcome in outcomes if outcome.required)


def probe(root_uri: str, environment: Mapping[str, str]) -> None:
    """Check within about ten seconds that `root_uri` can be written and that conditional writes are honoured.

    Makes the bucket where there is none.

    Raises:
        StoreError: saying what is wrong with which endpoint.
    """
    s3 = S3(environment, _QUICK)
    bench = _bench(root_uri, s3, environment)
    s3.ensure_bucket(bench.bucket)
    try:
        with s3.errors(f"s3://{bench.bucket}/{bench.prefix}"):
            for check in (CREATE_ONCE, REPLACE_KNOWN):
                check.run(bench)
    except Broken as broken:
        message = f"the S3 store at {s3.endpoint} {broken}; two runs could overwrite each other"
        raise StoreError(f"{message}: use a store with conditional writes") from broken
    finally:
        bench.clean()


def _bench(root_uri: str, s3: S3, environment: Mapping[str, str]) -> Bench:
    bucket, prefix = split_uri(root_uri)
    return Bench(s3, bucket, f"{prefix.rstrip('/')}/.probe-{uuid.uuid4().hex}".lstrip("/"), environment)


def _outcome(check: Check, bench: Bench) -> Outcome:
    from botocore.exceptions import BotoCoreError, ClientError

    def outcome(result: Result, did: str, follows: str = "") -> Outcome:
        return Outcome(check.name, check.required, result, check.asked, did, follows)

    try:
        return outcome("ok", check.run(bench))
    except NotTested as reason:
        return outcome("not tested", str(reason))
    except Broken as broken:
        return outcome("failed", str(broken), check.follows)
    except ClientError as error:
        return outcome("failed", f"answers {answer_of(error)} to {error.operation_name}", check.follows)
    except BotoCoreError as error:
        return outcome("failed", f"breaks off: {error}", check.follows)


def _nothing_left(bench: Bench) -> str:
    left = [f"s3://{bench.bucket}/{key}" for key in bench.listed(f"{bench.prefix}/")]
    if left:
        raise Broken(f"keeps {len(left)} objects, as {left[0]}")
    return "nothing is left"


_CLEAN = Check(
    "clean up", "delete what the checks have made", "delete by hand what is left", _nothing_left, required=False
)
