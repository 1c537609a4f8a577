"""Conditional writes: what makes a store safe against two writers."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from components.foundation.store_conformance.bench import Answer, Bench, Check, ask, require

_WRITERS = 4
_ROUNDS = 3
_STALE = '"00000000000000000000000000000000"'


def _create_once(bench: Bench) -> str:
    key = bench.key("create-once")
    bench.put(key, b"first", IfNoneMatch="*")
    second = ask(lambda: bench.put(key, b"second", IfNoneMatch="*"))
    require(second.status != 200, "ignores IfNoneMatch on writes: an object that stood there was overwritten")
    require(second.status == 412, f"answers {second} to the second write, where 412 is due")
    require(bench.read(key) == b"first", "answers 412, but the first content is gone")
    return f"200, then {second}; the first content stands"


def _replace_known(bench: Bench) -> str:
    key = bench.key("replace-known")
    old = bench.put(key, b"old")
    new = bench.put(key, b"new", IfMatch=old)
    for stale in (old, _STALE):
        answer = ask(functools.partial(bench.put, key, b"stale", IfMatch=stale))
        require(answer.status != 200, "ignores IfMatch on writes: an object that had changed was overwritten")
        require(answer.status == 412, f"answers {answer} to a stale ETag, where 412 is due")
    require(bench.read(key) == b"new", "answers 412, but the content has changed")
    require(new != old, "gives other content the same ETag")
    return "200 with the right ETag, 412 with stale ones; the content stands"


def _race_to_create(bench: Bench) -> str:
    return _race(bench, "race-to-create", lambda key: {"IfNoneMatch": "*"})


def _race_to_replace(bench: Bench) -> str:
    return _race(bench, "race-to-replace", lambda key: {"IfMatch": bench.put(key, b"old")})


def _race(bench: Bench, name: str, condition_of: Callable[[str], Mapping[str, str]]) -> str:
    """Let several writers start together, again and again: a store that looks first and writes then lets two win.

    A loser may be told 412, or 409: then nothing was decided for it, as another write was under way.
    """
    losers: Counter[str] = Counter()
    with ThreadPoolExecutor(_WRITERS) as pool:
        for number in range(_ROUNDS):
            key = bench.key(f"{name}-{number}")
            condition = condition_of(key)
            start = threading.Barrier(_WRITERS)
            write = functools.partial(_write_together, bench, key, condition, start)
            answers = list(pool.map(write, range(_WRITERS)))
            winners = [writer for writer, answer in enumerate(answers) if answer.status == 200]
            require(len(winners) == 1, f"lets {len(winners)} of {_WRITERS} writers win")
            require(bench.read(key) == b"%d" % winners[0], "keeps the content of a writer that was refused")
            losers.update(str(answer) for answer in answers if answer.status != 200)
    strange = sorted(answer for answer in losers if not answer.startswith(("412", "409")))
    require(not strange, f"answers {', '.join(strange)} to the losers, where 412 or 409 is due")
    told = ", ".join(f"{count} x {answer}" for answer, count in sorted(losers.items()))
    again = ", after which saferlhf asks again" if any(answer.startswith("409") for answer in losers) else ""
    return f"one winner in each of {_ROUNDS} rounds; the losers got {told}{again}"


def _write_together(
    bench: Bench, key: str, condition: Mapping[str, str], start: threading.Barrier, writer: int
) -> Answer:
    start.wait()
    return ask(lambda: bench.put(key, b"%d" % writer, **condition))


def _complete_once(bench: Bench) -> str:
    key = bench.key("complete-once")
    complete = bench.client.complete_multipart_upload
    first, second = (bench.begin_upload(key, [content]) for content in (b"first", b"second"))
    complete(**first, IfNoneMatch="*")
    answer = ask(lambda: complete(**second, IfNoneMatch="*"))
    require(answer.status == 412, f"answers {answer} to the second completion, where 412 is due")
    require(bench.read(key) == b"first", "answers 412, but the first content is gone")
    return f"200, then {answer}; the first content stands"


CREATE_ONCE = Check(
    "create once",
    "PUT an object twice, each with If-None-Match: *",
    "two attempts of a stage could both write a manifest, and two promotions the same entry of the champion log",
    _create_once,
)
REPLACE_KNOWN = Check(
    "replace known",
    "PUT with If-Match: the right ETag, then stale ones",
    "two attempts of a stage could both move LATEST, and the slower one would go unnoticed",
    _replace_known,
)
CONDITIONAL = (
    CREATE_ONCE,
    REPLACE_KNOWN,
    Check(
        "race to create",
        f"{_WRITERS} writers at once PUT one new object, each with If-None-Match: *",
        "two attempts that end at the same moment could both believe that their commit stands",
        _race_to_create,
    ),
    Check(
        "race to replace",
        f"{_WRITERS} writers at once PUT one object with If-Match: its ETag",
        "of two attempts that move LATEST at the same moment, one would be lost in silence",
        _race_to_replace,
    ),
    Check(
        "complete once",
        "complete two multipart uploads of one object with If-None-Match: *",
        "nothing today: weights are written without a condition, only manifests, LATEST and the log have one",
        _complete_once,
        required=False,
    ),
)
