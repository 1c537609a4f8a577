from __future__ import annotations

import pytest

from components.foundation.store_conformance import Outcome, conforms
from pipelines.doctor.store_report import store_table

GOOD = Outcome("list", True, "ok", "list after a write", "it was seen", "")
BAD = Outcome("create once", True, "failed", "PUT twice", "ignores IfNoneMatch", "two could win")
WORSE = Outcome("abort", False, "failed", "abort an upload", "answers 501", "parts would stay")
OPEN = Outcome("two tenants", True, "not tested", "read with other keys", "set KEYS", "")


@pytest.mark.golden
def test_the_table_by_hand() -> None:
    assert store_table("s3://b/p", [GOOD, BAD, WORSE, OPEN]).splitlines() == [
        "check        need         result      what was asked, and what the store did",
        "list         required     ok          list after a write",
        "                                      it was seen",
        "create once  required     FAILED      PUT twice",
        "                                      ignores IfNoneMatch",
        "                                      -> two could win",
        "abort        recommended  FAILED      abort an upload",
        "                                      answers 501",
        "                                      -> parts would stay",
        "two tenants  required     not tested  read with other keys",
        "                                      set KEYS",
        "s3://b/p is no store for saferlhf: create once",
    ]


@pytest.mark.golden
@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        ([GOOD, OPEN], "s3://b/p has all that saferlhf needs"),
        ([GOOD, WORSE], "s3://b/p has all that saferlhf needs, but lacks abort"),
    ],
)
def test_what_is_recommended_or_was_not_tested_is_no_reason_to_refuse(outcomes: list[Outcome], verdict: str) -> None:
    assert conforms(outcomes)
    assert store_table("s3://b/p", outcomes).splitlines()[-1] == verdict
