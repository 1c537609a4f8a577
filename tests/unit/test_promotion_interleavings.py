"""Promotions at once, in every order of their steps: the real code, on a store and a registry that are only models.

The models answer as S3 and MLflow do: a write that must be the first of its name or fails, an alias that the last
writer has. What the real ones do is in `tests/integration/test_promotion.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from components.foundation.champion_log import CHAMPION, POLICY_MODEL, ChampionEntry, ChampionLog
from components.foundation.errors import ConflictError, GateError
from components.foundation.results import PromotionResult, from_json
from components.foundation.run_context import RunContext
from components.foundation.tracking import Tracker
from components.promote import promotion
from components.promote.gate import CHALLENGE, PROMOTE
from components.promote.promotion import CHALLENGER, PREVIOUS_CHAMPION, promote, rollback
from tests.unit.interleavings import Access, Program, State, World, final_states, result_of

pytestmark = pytest.mark.fault

ROOT = "s3://bucket"
LOG, SERVING = f"{ROOT}/registry/{POLICY_MODEL}/", f"{ROOT}/registry/{POLICY_MODEL}-serving/"
CONFLICT = ConflictError("it was already written by somebody else")


@dataclass(frozen=True)
class Registry:
    """All that promotions share.

    Attributes:
        objects: of the store, (URI, text), sorted.
        aliases: (alias, version), sorted.
        losses: how many answers to a write the network may still lose.
    """

    objects: tuple[tuple[str, str], ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    losses: int = 0

    def log(self) -> list[ChampionEntry]:
        return [from_json(ChampionEntry, text) for uri, text in self.objects if uri.startswith(LOG)]


def _with(pairs: tuple[tuple[str, str], ...], key: str, value: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({**dict(pairs), key: value}.items()))


class ModelStore:
    """As much of a CheckpointStore as a promotion uses. Objects never change: reading a listed one is no step."""

    root_uri = ROOT

    def __init__(self, world: World[Registry], written: dict[str, str]) -> None:
        self._world, self._written = world, written

    def list(self, prefix: str) -> list[str]:
        def look(shared: Registry) -> list[tuple[Registry, Any]]:
            return [(shared, tuple(pair for pair in shared.objects if pair[0].startswith(prefix)))]

        found = self._world.do(Access(f"list {prefix}", look))
        self._written.update(found)
        return [uri for uri, _ in found]

    def read_text(self, uri: str) -> str:
        if uri in self._written:
            return self._written[uri]
        return cast(str, self._world.do(Access(f"read {uri}", lambda shared: [(shared, dict(shared.objects)[uri])])))

    def has_text(self, uri: str) -> bool:
        return cast(
            bool, self._world.do(Access(f"look for {uri}", lambda shared: [(shared, uri in dict(shared.objects))]))
        )

    def write_text(self, uri: str, text: str) -> None:
        """The first write of an object succeeds. Where its answer is lost, the client repeats it, and is refused."""

        def write(shared: Registry) -> list[tuple[Registry, Any]]:
            if uri in dict(shared.objects):
                return [(shared, CONFLICT)]
            after = replace(shared, objects=_with(shared.objects, uri, text))
            lost = [(replace(after, losses=shared.losses - 1), CONFLICT)] if shared.losses else []
            return [(after, None), *lost]

        self._world.do(Access(f"write {uri} {text}", write, late=True))


class ModelTracker:
    """As much of a Tracker."""

    def __init__(self, world: World[Registry]) -> None:
        self._world = world

    def aliases(self, model: str) -> dict[str, str]:
        return dict(self._world.do(Access("aliases", lambda shared: [(shared, shared.aliases)])))

    def set_alias(self, model: str, alias: str, version: str) -> None:
        def write(shared: Registry) -> list[tuple[Registry, Any]]:
            return [(replace(shared, aliases=_with(shared.aliases, alias, version)), None)]

        self._world.do(Access(f"alias {alias}={version}", write, late=True))

    def version_tags(self, model: str, version: str) -> dict[str, str]:
        return {"run_id": f"run-{version}"}


def context_of(world: World[Registry]) -> RunContext:
    settings = cast(Any, SimpleNamespace(serving=SimpleNamespace(canary_share=0.25)))
    store, tracker = cast(Any, ModelStore(world, {})), cast(Any, ModelTracker(world))
    return RunContext("run", f"{ROOT}/runs/run", "", settings, store, tracker)


def promoting(version: str, against: str | None = None) -> Program[Registry]:
    return lambda world: promote(context_of(world), version, against)


def rolling_back(reason: str = "complaints") -> Program[Registry]:
    return lambda world: rollback(context_of(world), "", reason)


@pytest.fixture(autouse=True)
def plain_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version passes a champion with a lower number; time stands still; a manifest is the entry's version."""

    def decide(context: RunContext, version: str, champion: str, raced: bool) -> tuple[str, list[str]]:
        return (PROMOTE if version > champion else CHALLENGE), [f"{version} against {champion}"]

    monkeypatch.setattr(promotion, "decide_on_version", decide)
    monkeypatch.setattr(promotion, "_now", lambda: "2026-01-01T00:00:00+00:00")
    monkeypatch.setattr("components.promote.serving.served_policy", lambda store, version, tags: version)
    monkeypatch.setattr("components.promote.serving.inference_service", lambda policy, settings, share: {"of": policy})


def alone(shared: Registry, program: Program[Registry]) -> Registry:
    """The state after a process that nobody disturbs; where an answer may be lost, it is not."""
    answers: tuple[Any, ...] = ()
    while True:
        world: World[Registry] = World(answers)
        try:
            program(world)
        except BaseException:
            if world.next is None:
                raise
            shared, answer = world.next.outcomes(shared)[0]
            answers = (*answers, answer)
        else:
            return shared


def check_log(state: State[Registry]) -> None:
    """Each entry was decided against the one before it, whatever happened."""
    log = state.shared.log()
    previous = ""
    for number, entry in enumerate(log, start=1):
        assert (entry.number, entry.previous) == (number, previous), state.trace
        assert entry.action == "rollback" or entry.version > previous, state.trace
        previous = entry.version


def check_copies(shared: Registry, trace: tuple[str, ...]) -> None:
    """The aliases and what is served are those of the log's last entry."""
    last, aliases = shared.log()[-1], dict(shared.aliases)
    assert aliases[CHAMPION] == last.version, trace
    assert aliases.get(PREVIOUS_CHAMPION, "") == last.previous, trace
    assert dict(shared.objects)[f"{SERVING}{last.number:06d}.yaml"] == f"of: '{last.version}'\n", trace


def check_promotions(state: State[Registry], programs: list[Program[Registry]]) -> None:
    """Nobody died: everybody was told what the log says, and the best version that tried is champion."""
    check_log(state)
    check_copies(state.shared, state.trace)
    log = state.shared.log()
    results = [result_of(p, answers) for p, answers in zip(programs, state.answers, strict=True)]
    for result in results:
        assert isinstance(result, PromotionResult), (result, state.trace)
        entered = result.version in [entry.version for entry in log]
        assert result.alias == (CHAMPION if entered else CHALLENGER), state.trace
    assert log[-1].version == max(result.version for result in results), state.trace


@pytest.mark.parametrize(
    ("versions", "losses"), [(("1", "2"), 2), (("1", "1"), 2), (("1", "2", "3"), 0), (("1", "2", "2"), 0)]
)
@pytest.mark.parametrize("champion", ["", "0"])
def test_row_15_in_every_order_of_their_steps_the_best_of_all_promotions_is_champion(
    versions: tuple[str, ...], losses: int, champion: str
) -> None:
    start = alone(Registry(), promoting(champion)) if champion else Registry()
    programs = [promoting(version) for version in versions]
    ends = 0
    for state in final_states(replace(start, losses=losses), programs):
        check_promotions(state, programs)
        ends += 1
    assert ends > 1


@pytest.mark.parametrize(("versions", "losses"), [(("1", "2"), 2), (("1", "2", "3"), 0)])
@pytest.mark.parametrize("champion", ["", "0"])
def test_row_15_in_every_order_the_best_of_policies_that_would_pass_each_other_is_champion(
    monkeypatch: pytest.MonkeyPatch, versions: tuple[str, ...], losses: int, champion: str
) -> None:
    """The bounds let each pass any champion that it did not race with; all were measured against the same one."""

    def lenient(context: RunContext, version: str, champion: str, raced: bool) -> tuple[str, list[str]]:
        return (PROMOTE if not raced or version > champion else CHALLENGE), [f"{version} against {champion}"]

    monkeypatch.setattr(promotion, "decide_on_version", lenient)
    start = alone(Registry(), promoting(champion)) if champion else Registry()
    programs = [promoting(version, champion) for version in versions]
    for state in final_states(replace(start, losses=losses), programs):
        check_promotions(state, programs)


def test_row_15_in_every_order_a_rollback_meets_the_champion_that_it_saw_or_says_so() -> None:
    start = alone(alone(Registry(), promoting("1")), promoting("2"))
    programs = [promoting("3"), rolling_back()]
    lost = 0
    for state in final_states(replace(start, losses=1), programs):
        check_log(state)
        check_copies(state.shared, state.trace)
        promoted, back = (result_of(p, answers) for p, answers in zip(programs, state.answers, strict=True))
        versions = [entry.version for entry in state.shared.log()]
        if isinstance(back, ConflictError):
            lost += 1
            assert versions == ["1", "2", "3"], state.trace
        else:
            assert versions in (["1", "2", "1", "3"], ["1", "2", "3", "2"]), state.trace
        assert promoted.alias == CHAMPION
    assert lost > 0


def test_row_15_in_every_order_two_rollbacks_do_not_bring_back_what_both_rolled_back_from() -> None:
    start = alone(alone(Registry(), promoting("1")), promoting("2"))
    programs = [rolling_back(), rolling_back("it is rude")]
    kinds = set()
    for state in final_states(replace(start, losses=1), programs):
        check_log(state)
        check_copies(state.shared, state.trace)
        assert [entry.version for entry in state.shared.log()] == ["1", "2", "1"], state.trace
        kinds |= {type(result_of(p, answers)) for p, answers in zip(programs, state.answers, strict=True)}
    assert kinds == {ChampionEntry, ConflictError, GateError}  # who is slower is refused, or completes what is there


def test_row_15_a_rollback_that_dies_anywhere_is_completed_when_repeated() -> None:
    start = alone(alone(Registry(), promoting("1")), promoting("2"))
    ends = 0
    for state in final_states(replace(start, losses=1), [rolling_back()], deaths=1):
        after = state.shared
        with contextlib.suppress(GateError):  # all was done, and there is no champion before
            after = alone(state.shared, rolling_back())
        assert [entry.version for entry in after.log()] == ["1", "2", "1"], state.trace
        check_copies(after, state.trace)
        ends += 1
    assert ends > 1


@pytest.mark.parametrize("versions", [("1", "2"), ("2", "2")])
def test_row_15_a_promotion_that_dies_anywhere_leaves_what_the_next_one_mends(versions: tuple[str, str]) -> None:
    """Also where a write of the dead one arrives long after: the log stands, and its copies are made anew."""
    programs = [promoting(version) for version in versions]
    ends = mended = 0
    for state in final_states(Registry(losses=1), programs, deaths=1):
        check_log(state)
        ends += 1
        if log := state.shared.log():
            after = alone(state.shared, promoting(log[-1].version))
            assert after.log() == log, state.trace
            check_copies(after, state.trace)
            mended += after != state.shared
    assert ends > mended > 0


def _copy_once(tracker: Tracker, champions: ChampionLog) -> None:
    """The aliases, without a second look at the log."""
    entry = champions.latest()
    assert entry is not None
    tracker.set_alias(POLICY_MODEL, CHAMPION, entry.version)
    if entry.previous:
        tracker.set_alias(POLICY_MODEL, PREVIOUS_CHAMPION, entry.previous)


def _write_over(self: ModelStore, uri: str, text: str) -> None:
    """Without a condition, the later write wins."""

    def write(shared: Registry) -> list[tuple[Registry, Any]]:
        return [(replace(shared, objects=_with(shared.objects, uri, text)), None)]

    self._world.do(Access(f"write {uri} {text}", write))


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (promotion, "copy_aliases", _copy_once),
        (ModelStore, "write_text", _write_over),
    ],
)
def test_a_protocol_with_a_hole_is_found(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, broken: Callable[..., None]
) -> None:
    """The checker itself: without the second look, or without the condition, some order ends badly."""
    monkeypatch.setattr(owner, name, broken)
    programs = [promoting("1"), promoting("2")]
    with pytest.raises((AssertionError, KeyError)):
        for state in final_states(Registry(), programs):
            check_promotions(state, programs)
