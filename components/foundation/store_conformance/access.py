"""Who may read and write: wrong keys, keys that may only read, and keys of somebody else."""

from __future__ import annotations

from components.foundation.s3 import ONE_TRY, S3
from components.foundation.store_conformance.bench import Answer, Bench, Check, NotTested, ask, require

READ_ONLY = "SAFERLHF_READ_ONLY_"
OTHER_TENANT = "SAFERLHF_OTHER_TENANT_"
"""What stands before AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the names of variables with other keys."""

_UNKNOWN_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken"}


def _wrong_keys(bench: Bench) -> str:
    from botocore import UNSIGNED

    key = bench.key("wrong-keys")
    bench.put(key, b"secret")
    known = bench.environment.get("AWS_ACCESS_KEY_ID") or "saferlhf-unknown-key"
    forger = bench.identity(AWS_ACCESS_KEY_ID=known, AWS_SECRET_ACCESS_KEY="wrong")
    nobody = bench.identity()
    nobody.s3 = S3(bench.environment, {**ONE_TRY, "signature_version": UNSIGNED})
    answers = []
    for who, stranger in (("a wrong secret", forger), ("no signature", nobody)):
        answers.append(_refused_read(stranger, key, who))
        _refused_writes(stranger, key, who)
    return f"{answers[0]} to a wrong secret, {answers[1]} to no signature"


def _read_only(bench: Bench) -> str:
    reader = _given(bench, READ_ONLY)
    key = bench.key("read-only")
    bench.put(key, b"to read")
    seen = ask(lambda: reader.read(key))
    require(seen.status == 200, f"answers {seen} when these keys read")
    require(reader.listed(key) == [key], "does not list for these keys what is there")
    return f"reading and listing went; writing and deleting: {_refused_writes(reader, key, 'these keys')}"


def _two_tenants(bench: Bench) -> str:
    other = _given(bench, OTHER_TENANT)
    key = bench.key("two-tenants")
    bench.put(key, b"private")
    answer = _refused_read(other, key, "the other tenant's keys")
    require(answer.code not in _UNKNOWN_KEYS, f"does not know the other tenant's keys ({answer}): nothing was tested")
    listed = ask(lambda: other.listed(bench.prefix))
    require(listed.status == 403, f"answers {listed} when the other tenant lists, where 403 is due")
    _refused_writes(other, key, "the other tenant's keys")
    return f"reading, listing, writing and deleting: {answer}"


def _refused_read(stranger: Bench, key: str, who: str) -> Answer:
    answer = ask(lambda: stranger.read(key))
    require(answer.status == 403, f"answers {answer} when {who} would read, where 403 is due")
    return answer


def _refused_writes(stranger: Bench, key: str, who: str) -> Answer:
    new = stranger.key("stranger")
    for deed, answer in (
        ("write", ask(lambda: stranger.put(new, b"forged"))),
        ("overwrite", ask(lambda: stranger.put(key, b"forged"))),
        ("upload", ask(lambda: stranger.begin_upload(new, []))),
        ("delete", ask(lambda: stranger.delete(key))),
    ):
        require(answer.status == 403, f"answers {answer} when {who} would {deed}, where 403 is due")
    return answer


def _given(bench: Bench, prefix: str) -> Bench:
    """The bench with the keys of the variables that begin so."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    credentials = {name: bench.environment.get(prefix + name, "") for name in names}
    if not all(credentials[name] for name in names[:2]):
        raise NotTested(f"set {prefix}{names[0]} and {prefix}{names[1]}")
    return bench.identity(**credentials)


ACCESS = (
    Check(
        "wrong keys",
        "read, write and delete with a wrong secret, and with no signature",
        "whoever reaches the store could read the data and replace the champion",
        _wrong_keys,
    ),
    Check(
        "read-only keys",
        "read and list, then write and delete, with keys that may only read",
        "whoever serves a policy could also replace it",
        _read_only,
    ),
    Check(
        "two tenants",
        "read, list, write and delete with another team's keys",
        "teams that share the store could read and replace each other's models",
        _two_tenants,
    ),
)
