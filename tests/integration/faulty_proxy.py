"""A network and a store that fail, between boto3 and a real S3 server: what fails is drawn from a seed."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from tests.integration.s3_proxy import Forward, Hangup, Reply, Request

KINDS = ("delay", "reset", "truncated", "500", "503", "lost reply")
"""What `Faults` draws from. delay: some milliseconds. reset: before the server hears of it. truncated: within the
reply's body. lost reply: the server did what was asked, and the client does not know. A test may also ask for 409
(nothing was decided) and damaged (a flipped bit in the reply's body)."""

_CODES = {"409": "ConditionalRequestConflict", "500": "InternalError", "503": "SlowDown"}
_DELAY_SECONDS = 0.05
_STUBBORN_SHARE = 0.08
_STUBBORN_REQUESTS = 8
"""A stubborn fault hits so many requests for the same thing, one after the other: more than boto3 repeats."""


def inject(kind: str, request: Request, forward: Forward, where: float = 0.5) -> Reply:
    """Let a request fail; `where` in [0, 1): in which part of a body, or of the longest delay."""
    if kind == "delay":
        time.sleep(where * _DELAY_SECONDS)
        return forward(request)
    if kind == "reset":
        raise Hangup
    if kind in _CODES:
        return Reply.error(int(kind), _CODES[kind])
    reply = forward(request)
    if kind == "truncated" and reply.body:
        return replace(reply, cut=int(where * len(reply.body)))
    if kind == "damaged":
        return replace(reply, body=bytes([reply.body[0] ^ 1]) + reply.body[1:])
    raise Hangup


class Faults:
    """Lets a share of all requests fail.

    What happens to a request depends on the seed, on what it asks for, and on how often that was asked before: not on
    the order in which several clients come.

    Attributes:
        requests: how many came.
        repeats: how many of them boto3 sent for at least the second time.
        injected: faults by kind.
    """

    def __init__(self, seed: int, share: float) -> None:
        self._seed, self._share = seed, share
        self._lock = threading.Lock()
        self._asked: Counter[tuple[str, str]] = Counter()
        self._stubborn: dict[tuple[str, str], tuple[str, int]] = {}
        self.requests = self.repeats = 0
        self.injected: Counter[str] = Counter()

    def __call__(self, request: Request, forward: Forward) -> Reply:
        kind, where = self._draw(request)
        return inject(kind, request, forward, where) if kind else forward(request)

    def _draw(self, request: Request) -> tuple[str, float]:
        """(kind or '', where)."""
        target = (request.method, request.path)
        with self._lock:
            self.requests += 1
            self.repeats += "attempt=1" not in request.headers.get("amz-sdk-request", "attempt=1")
            self._asked[target] += 1
            chance = random.Random(f"{self._seed} {target} {self._asked[target]}")
            kind, left = self._stubborn.pop(target, ("", 0))
            if not kind and chance.random() < self._share:
                kind = chance.choice(KINDS)
                left = _STUBBORN_REQUESTS if chance.random() < _STUBBORN_SHARE else 1
            if left > 1:
                self._stubborn[target] = (kind, left - 1)
            self.injected.update([kind] if kind else [])
        return kind, chance.random()


class Scripted:
    """Lets the first requests that match fail, each in its way; `before` runs before each of them."""

    def __init__(
        self, matches: Callable[[Request], bool], *kinds: str, before: Callable[[], object] = lambda: None
    ) -> None:
        self._matches, self._kinds, self._before = matches, list(kinds), before

    def __call__(self, request: Request, forward: Forward) -> Reply:
        if not self._kinds or not self._matches(request):
            return forward(request)
        kind = self._kinds.pop(0)
        self._before()
        return inject(kind, request, forward)

    @property
    def used_up(self) -> bool:
        """Whether all of them have happened."""
        return not self._kinds
