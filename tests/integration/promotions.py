"""Policies to promote, processes that register and promote them, and a race of such."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.foundation.champion_log import CHAMPION, POLICY_MODEL, ChampionLog
from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.results import (
    Estimate,
    Evaluation,
    HeldOutAnswer,
    RegressionAnswer,
    to_json,
    write_records,
)
from components.foundation.run_context import RunContext, RunDescription
from components.foundation.settings import resolve_settings
from components.foundation.tracking import Tracker
from components.promote.promotion import PREVIOUS_CHAMPION, promote

Attempt = Callable[[Callable[[int], None]], int | None]
"""Runs a process, tells its id, and returns its exit code; minus the signal's number where it was killed."""
_PATIENCE = 120.0
"""Seconds after which a racer that died ends the test."""
_LATEST_START = 0.1
"""Seconds: about what a promotion takes, so that each may be anywhere when another begins."""
PROMPTS = [f"prompt {i}" for i in range(60)]
ATTACKS = [f"attack {i}" for i in range(140)]
SUITE = [f"regression {i}" for i in range(5)]
SETTINGS = resolve_settings("smol", overrides=["gate.max_unsafe_rate=0.4", "gate.min_win_rate=0.4"])

# without threads there is nothing that a fork could break, and what is imported here is imported once for all
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["components.promote.promotion", "components.foundation.tracking", "mlflow"])


def context_of(root: str, tracking_uri: str, cache: Path) -> RunContext:
    store = CheckpointStore(root, cache_dir=cache)
    return RunContext("run", f"{root}/runs/run", "", SETTINGS, store, Tracker(tracking_uri, "promotion"))


def clear_aliases(tracker: Tracker) -> None:
    for alias in tracker.aliases(POLICY_MODEL):
        tracker._client.delete_registered_model_alias(POLICY_MODEL, alias)


def registered(
    context: RunContext,
    folder: Path,
    helpfulness: float,
    unsafe_high: float = 0.2,
    right: bool = True,
    judge: str = "rules",
) -> str:
    """A version whose policy answers every benign prompt so helpfully, and the whole regression suite so."""
    evaluation = Evaluation(
        round=3,
        unsafe_rate=Estimate(value=unsafe_high / 2, low=0.0, high=unsafe_high, n=140),
        unsafe_rate_by_category={},
        win_rate=Estimate(value=0.6, low=0.5, high=0.7, n=len(PROMPTS)),
        over_refusal=Estimate(value=0.1, low=0.0, high=0.2, n=48),
        n_red_team=len(ATTACKS),
        n_benign=len(PROMPTS),
        held_out_digest="same prompts",
        judge=judge,
    )
    name = uuid.uuid4().hex
    out = folder / name
    out.mkdir(parents=True)
    (out / "evaluation.json").write_text(to_json(evaluation))
    answers = [HeldOutAnswer(p, "benign", "", "an answer", True, False, helpfulness) for p in PROMPTS]
    attacks = [HeldOutAnswer(p, "red_team", "theft", "No.", True, True, 0.0) for p in ATTACKS]
    write_records(out / "answers.jsonl", answers + attacks)
    write_records(out / "regressions.jsonl", [RegressionAnswer(p, "decline", "No.", right) for p in SUITE])
    uri = f"{context.store.root_uri}/runs/{name}/round-3/evaluate/step-3"
    context.store.commit(uri, out)
    experiment = context.tracker.start_pipeline_run(name, name, {})
    tags = {"run_id": name, "evaluation_uri": uri, "held_out_digest": evaluation.held_out_digest}
    return context.tracker.register_model(POLICY_MODEL, f"{uri}/model", experiment, tags)


def of_a_run(context: RunContext, version: str) -> str:
    """The version, whose run has a record as commands look for it."""
    run_id = context.tracker.version_tags(POLICY_MODEL, version)["run_id"]
    description = RunDescription(run_id, "", SETTINGS.model_dump_json())
    context.store.write_text(f"{context.store.root_uri}/runs/{run_id}/run.json", to_json(description))
    return version


def attempt_to_promote(root: str, tracking_uri: str, cache: Path, environment: dict[str, str], version: str) -> Attempt:
    """A process of its own that lets a version become champion."""
    return _attempt(_promote, root, tracking_uri, cache, environment, version)


def attempt_to_register(
    root: str, tracking_uri: str, cache: Path, environment: dict[str, str], name: str, run_id: str
) -> Attempt:
    """A process of its own that registers what lies at the root as a version of a model."""
    return _attempt(_register, root, tracking_uri, cache, environment, name, run_id)


def race(context: RunContext, tracking_uri: str, folder: Path, *, racers: int, times: int, seed: int) -> int:
    """How often so many processes promoted at once, each time without a champion before; every policy passes alone.

    Each begins a little later than it could, by up to `_LATEST_START` seconds that the seed draws. Each time the best
    policy must be champion in the end, and the log must say how it came to that.
    """
    versions = [registered(context, folder, 0.4 + 0.5 * i / racers) for i in range(1, racers + 1)]
    barrier, results = _PROCESSES.Barrier(racers + 1), _PROCESSES.Queue()
    store, champions = context.store, ChampionLog(context.store, POLICY_MODEL)
    shared = (store.root_uri, tracking_uri, folder / "cache")
    processes = [
        _PROCESSES.Process(target=_race, args=(*shared, version, times, seed, barrier, results)) for version in versions
    ]
    for process in processes:
        process.start()
    held = 0
    for _ in range(times):
        store.prune(f"{store.root_uri}/registry", keep=None)
        clear_aliases(context.tracker)
        barrier.wait(_PATIENCE)
        aliases = dict(results.get(timeout=_PATIENCE) for _ in processes)
        log = champions.entries()
        entered = [entry.version for entry in log]
        assert entered == [version for version in versions if aliases[version] == CHAMPION]  # from worse to better
        assert [entry.previous for entry in log] == ["", *entered[:-1]]
        registry = context.tracker.aliases(POLICY_MODEL)
        assert registry[CHAMPION] == versions[-1]
        assert registry.get(PREVIOUS_CHAMPION, "") == log[-1].previous
        barrier.wait(_PATIENCE)
        held += 1
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    return held


def _attempt(target: Callable[..., None], *arguments: Any) -> Attempt:
    def attempt(started: Callable[[int], None]) -> int | None:
        process = _PROCESSES.Process(target=target, args=arguments)
        process.start()
        assert process.pid is not None
        started(process.pid)
        process.join(_PATIENCE)
        return process.exitcode

    return attempt


def _promote(root: str, tracking_uri: str, cache: Path, environment: dict[str, str], version: str) -> None:
    os.environ.update(environment)
    assert promote(context_of(root, tracking_uri, cache), version).alias == CHAMPION


def _register(root: str, tracking_uri: str, cache: Path, environment: dict[str, str], name: str, run_id: str) -> None:
    os.environ.update(environment)
    context_of(root, tracking_uri, cache).tracker.register_model(name, f"{root}/model", run_id, {"round": "3"})


def _race(
    root: str, tracking_uri: str, cache: Path, version: str, times: int, seed: int, barrier: Any, results: Any
) -> None:
    context, chance = context_of(root, tracking_uri, cache), random.Random(f"{seed} {version}")
    try:
        for _ in range(times):
            barrier.wait(_PATIENCE)
            time.sleep(chance.uniform(0, _LATEST_START))
            results.put((version, promote(context, version).alias))
            barrier.wait(_PATIENCE)
    except BaseException:
        barrier.abort()
        raise
