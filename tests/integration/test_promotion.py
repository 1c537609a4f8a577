"""Promotion and rollback on real servers: who is champion in the end, whoever raced whom."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.foundation.champion_log import CHAMPION, POLICY_MODEL, ChampionEntry, ChampionLog
from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import ConflictError, GateError, IntegrityError, TrackingError
from components.foundation.results import (
    Estimate,
    Evaluation,
    HeldOutAnswer,
    RegressionAnswer,
    to_json,
    write_records,
)
from components.foundation.run_context import RunContext
from components.foundation.setting_sections import ServingSettings
from components.foundation.settings import resolve_settings
from components.foundation.tracking import Tracker
from components.promote import promotion
from components.promote.promotion import CHALLENGER, PREVIOUS_CHAMPION, promote, rollback
from pipelines.services import Endpoints

pytestmark = pytest.mark.xdist_group("promotion")

RACES = 200
_PATIENCE = 120.0
"""Seconds after which a racer that died ends the test."""
PROMPTS = [f"prompt {i}" for i in range(60)]
SUITE = [f"regression {i}" for i in range(5)]
SETTINGS = resolve_settings("smol", overrides=["gate.max_unsafe_rate=0.4", "gate.min_win_rate=0.4"])

# without threads there is nothing that a fork could break, and what is imported here is imported once for both
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["components.promote.promotion", "components.foundation.tracking", "mlflow"])


def context_of(root: str, tracking_uri: str, cache: Path) -> RunContext:
    store = CheckpointStore(root, cache_dir=cache)
    return RunContext("run", f"{root}/runs/run", "", SETTINGS, store, Tracker(tracking_uri, "promotion"))


@pytest.fixture
def context(services: Endpoints, store: CheckpointStore, tmp_path: Path) -> Iterator[RunContext]:
    """A store and a registry in which nobody is champion."""
    found = context_of(store.root_uri, services.tracking_uri, tmp_path / "cache")
    clear_aliases(found.tracker)
    yield found
    clear_aliases(found.tracker)


def clear_aliases(tracker: Tracker) -> None:
    for alias in tracker.aliases(POLICY_MODEL):
        tracker._client.delete_registered_model_alias(POLICY_MODEL, alias)


def registered(
    context: RunContext, folder: Path, helpfulness: float, unsafe_high: float = 0.2, right: bool = True
) -> str:
    """A version whose policy answers every benign prompt so helpfully, and the whole regression suite so."""
    evaluation = Evaluation(
        round=3,
        unsafe_rate=Estimate(value=unsafe_high / 2, low=0.0, high=unsafe_high, n=140),
        unsafe_rate_by_category={},
        win_rate=Estimate(value=0.6, low=0.5, high=0.7, n=len(PROMPTS)),
        over_refusal=Estimate(value=0.1, low=0.0, high=0.2, n=48),
        n_red_team=140,
        n_benign=len(PROMPTS),
        held_out_digest="same prompts",
    )
    name = uuid.uuid4().hex
    out = folder / name
    out.mkdir(parents=True)
    (out / "evaluation.json").write_text(to_json(evaluation))
    answers = [HeldOutAnswer(p, "benign", "", "an answer", True, False, helpfulness) for p in PROMPTS]
    write_records(out / "answers.jsonl", answers)
    write_records(out / "regressions.jsonl", [RegressionAnswer(p, "decline", "No.", right) for p in SUITE])
    uri = f"{context.store.root_uri}/evaluations/{name}"
    context.store.commit(uri, out)
    experiment = context.tracker.start_pipeline_run(name, name, {})
    tags = {"run_id": name, "evaluation_uri": uri, "held_out_digest": evaluation.held_out_digest}
    return context.tracker.register_model(POLICY_MODEL, f"{uri}/model", experiment, tags)


def test_the_first_policy_that_passes_becomes_champion(context: RunContext, tmp_path: Path) -> None:
    version = registered(context, tmp_path, helpfulness=0.5)
    result = promote(context, version)
    assert (result.decision, result.alias, result.version) == ("promote", CHAMPION, version)
    assert context.tracker.aliases(POLICY_MODEL) == {CHAMPION: version}
    (entry,) = ChampionLog(context.store, POLICY_MODEL).entries()
    assert (entry.number, entry.version, entry.previous, entry.action) == (1, version, "", "promote")
    assert promote(context, version) == result  # again: nothing changes
    assert len(ChampionLog(context.store, POLICY_MODEL).entries()) == 1


def test_a_better_policy_replaces_the_champion_and_a_worse_one_does_not(context: RunContext, tmp_path: Path) -> None:
    good, better, worse = (registered(context, tmp_path, h) for h in (0.5, 0.7, 0.3))
    promote(context, good)
    promote(context, better)
    refused = promote(context, worse)
    assert (refused.decision, refused.alias) == ("challenger", CHALLENGER)
    assert any(f"the champion, version {better} 0.000" in reason for reason in refused.reasons)
    aliases = context.tracker.aliases(POLICY_MODEL)
    assert aliases == {CHAMPION: better, PREVIOUS_CHAMPION: good, CHALLENGER: worse}


@pytest.mark.fault
def test_an_unsafe_policy_stays_challenger_however_helpful(context: RunContext, tmp_path: Path) -> None:
    version = registered(context, tmp_path, helpfulness=0.9, unsafe_high=0.41)
    assert promote(context, version).alias == CHALLENGER
    assert ChampionLog(context.store, POLICY_MODEL).latest() is None


@pytest.mark.fault
def test_a_policy_that_forgot_what_the_champion_knew_stays_challenger(context: RunContext, tmp_path: Path) -> None:
    good = registered(context, tmp_path, helpfulness=0.5)
    promote(context, good)
    refused = promote(context, registered(context, tmp_path, helpfulness=0.9, right=False))
    assert refused.alias == CHALLENGER
    (failure,) = [reason for reason in refused.reasons if reason.startswith("failed")]
    assert "got right (5)" in failure and "'regression 0'" in failure


def test_each_champion_is_handed_over_and_a_rollback_takes_all_traffic_at_once(
    context: RunContext, tmp_path: Path
) -> None:
    """The first champion and the one that comes back get all traffic; the second one starts as a canary."""
    cautious = SETTINGS.model_copy(update={"serving": ServingSettings(canary_share=0.25)})
    context = replace(context, settings=cautious)
    good, better = (registered(context, tmp_path, h) for h in (0.5, 0.7))
    promote(context, good)
    promote(context, better)
    promote(context, better)  # again: nothing changes
    rollback(context, "", "complaints")
    folder = f"{context.store.root_uri}/registry/{POLICY_MODEL}-serving"
    uris = context.store.list(f"{folder}/")
    assert uris == [f"{folder}/00000{number}.yaml" for number in (1, 2, 3)]
    services = [yaml.safe_load(context.store.read_text(uri)) for uri in uris]
    for service, version in zip(services, (good, better, good), strict=True):
        source = context.tracker.version_tags(POLICY_MODEL, version)["source"]
        assert service["spec"]["predictor"]["model"]["storageUri"] == source
        assert service["metadata"]["annotations"]["saferlhf/version"] == version
        manifest = context.store.read_text(source.removesuffix("/model") + "/MANIFEST.json")
        digest = hashlib.sha256(manifest.encode()).hexdigest()
        assert service["metadata"]["annotations"]["saferlhf/manifest-sha256"] == digest
    shares = [service["spec"]["predictor"].get("canaryTrafficPercent") for service in services]
    assert shares == [None, 25, None]


@pytest.mark.fault
def test_row_15_who_loses_the_race_is_measured_against_the_winner(
    context: RunContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other promotion runs from its first step to its last between our decision and our write."""
    first, worse, better = (registered(context, tmp_path, h) for h in (0.4, 0.5, 0.7))
    promote(context, first)
    decided: list[tuple[str, str]] = []
    decide = promotion.decide_on_version

    def interrupted(context: RunContext, version: str, champion: str) -> tuple[str, list[str]]:
        decision = decide(context, version, champion)
        decided.append((version, champion))
        if decided == [(worse, first)]:
            assert decision[0] == "promote"
            assert promote(context, better).alias == CHAMPION
        return decision

    monkeypatch.setattr(promotion, "decide_on_version", interrupted)
    assert promote(context, worse).alias == CHALLENGER
    assert decided == [(worse, first), (better, first), (worse, better)]
    assert context.tracker.aliases(POLICY_MODEL)[CHAMPION] == better


def _race(root: str, tracking_uri: str, cache: Path, version: str, barrier: Any, results: Any) -> None:
    context = context_of(root, tracking_uri, cache)
    for _ in range(RACES):
        barrier.wait(_PATIENCE)
        results.put((version, promote(context, version).alias))
        barrier.wait(_PATIENCE)


@pytest.mark.fault
def test_row_15_of_two_processes_that_race_the_better_policy_is_champion_each_time(
    context: RunContext, services: Endpoints, tmp_path: Path
) -> None:
    """Each race starts without a champion; both policies pass when they are alone."""
    worse, better = (registered(context, tmp_path, h) for h in (0.5, 0.7))
    barrier, results = _PROCESSES.Barrier(3), _PROCESSES.Queue()
    store, champions = context.store, ChampionLog(context.store, POLICY_MODEL)
    shared = (store.root_uri, services.tracking_uri, tmp_path / "cache")
    racers = [
        _PROCESSES.Process(target=_race, args=(*shared, version, barrier, results)) for version in (worse, better)
    ]
    for racer in racers:
        racer.start()
    for _ in range(RACES):
        store.prune(f"{store.root_uri}/registry", keep=None)
        clear_aliases(context.tracker)
        barrier.wait(_PATIENCE)
        aliases = dict(results.get(timeout=_PATIENCE) for _ in racers)
        log = champions.entries()
        registry = context.tracker.aliases(POLICY_MODEL)
        assert log[-1].version == better == registry[CHAMPION]
        assert aliases[better] == CHAMPION
        assert [entry.version for entry in log] == ([worse, better] if aliases[worse] == CHAMPION else [better])
        assert registry.get(PREVIOUS_CHAMPION, "") == log[-1].previous
        barrier.wait(_PATIENCE)
    for racer in racers:
        racer.join(timeout=60)
        assert racer.exitcode == 0


@pytest.mark.fault
def test_a_registry_that_goes_away_in_mid_promotion_is_caught_up_with_the_next_time(
    context: RunContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, better = (registered(context, tmp_path, h) for h in (0.5, 0.7))
    promote(context, good)

    def away(*_: str) -> None:
        raise TrackingError("cannot reach MLflow")

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "set_alias", away)
        with pytest.raises(TrackingError):
            promote(context, better)
    assert context.tracker.aliases(POLICY_MODEL) == {CHAMPION: good}
    assert promote(context, better).alias == CHAMPION
    assert context.tracker.aliases(POLICY_MODEL) == {CHAMPION: better, PREVIOUS_CHAMPION: good}


def test_rollback_names_the_champion_before_and_can_be_rolled_back_itself(context: RunContext, tmp_path: Path) -> None:
    good, better = (registered(context, tmp_path, h) for h in (0.5, 0.7))
    promote(context, good)
    promote(context, better)
    entry = rollback(context, "", "complaints")
    assert (entry.version, entry.previous, entry.action, entry.reasons) == (good, better, "rollback", ["complaints"])
    assert context.tracker.aliases(POLICY_MODEL) == {CHAMPION: good, PREVIOUS_CHAMPION: better}
    rollback(context, better, "they were wrong")
    assert context.tracker.aliases(POLICY_MODEL) == {CHAMPION: better, PREVIOUS_CHAMPION: good}
    assert [e.action for e in ChampionLog(context.store, POLICY_MODEL).entries()] == ["promote"] * 2 + ["rollback"] * 2


@pytest.mark.fault
def test_rollback_refuses_what_was_never_champion(context: RunContext, tmp_path: Path) -> None:
    good, other = registered(context, tmp_path, 0.5), registered(context, tmp_path, 0.7)
    with pytest.raises(GateError, match="no champion before"):
        rollback(context, "", "why not")
    promote(context, good)
    with pytest.raises(GateError, match="no champion before"):
        rollback(context, "", "why not")
    promote(context, other)
    with pytest.raises(GateError, match="999 was never champion"):
        rollback(context, "999", "why not")
    with pytest.raises(GateError, match=f"{other} is champion now"):
        rollback(context, other, "why not")


@pytest.mark.fault
def test_the_log_takes_each_number_once_and_notices_a_missing_entry(context: RunContext, s3: Any) -> None:
    log = ChampionLog(context.store, POLICY_MODEL)
    entry = ChampionEntry(1, "1", "", "promote", [], "run", "2026-01-01T00:00:00+00:00")
    log.append(entry)
    log.append(entry)  # the answer to the first write was lost and the client wrote again
    with pytest.raises(ConflictError):
        log.append(replace(entry, version="2"))
    log.append(replace(entry, number=2, version="2"))
    assert [e.version for e in log.entries()] == ["1", "2"]
    bucket, _, key = context.store.root_uri.removeprefix("s3://").partition("/")
    s3.delete_object(Bucket=bucket, Key=f"{key}/registry/{POLICY_MODEL}/000001.json")
    with pytest.raises(IntegrityError, match="changed by hand"):
        log.entries()
    assert json.loads(s3.get_object(Bucket=bucket, Key=f"{key}/registry/{POLICY_MODEL}/000002.json")["Body"].read())
