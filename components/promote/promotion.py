"""Who becomes champion: decided against whoever is champion at that moment, however many promotions run at once.

Promote: 1 read the log's last entry, 2 decide against its version, 3 append an entry, or start again where somebody
else was faster, 4 copy the entry to MLflow's aliases, `previous_champion` first, 5 write what serves the champion.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from components.foundation.champion_log import CHAMPION, POLICY_MODEL, ChampionEntry, ChampionLog, champion_version
from components.foundation.errors import ConflictError, GateError, SettingsError, StoreError, TrackingError
from components.foundation.results import (
    Evaluation,
    HeldOutAnswer,
    PromotionResult,
    RegressionAnswer,
    read_record,
    read_records,
)
from components.foundation.run_context import RunContext
from components.foundation.statistics import wilson
from components.foundation.tracking import Tracker
from components.promote.gate import CHALLENGE, PROMOTE, Comparison, RegressionResults, compare, decide
from components.promote.serving import hand_over, is_handed_over

PREVIOUS_CHAMPION, CHALLENGER = "previous_champion", "challenger"
ROLLBACK = "rollback"
_NOBODY_BEFORE = "there is no champion before the present one to roll back to"
log = logging.getLogger("saferlhf")


def promote(context: RunContext, version: str, against: str | None = None) -> PromotionResult:
    """Let the version become champion if the gate lets it pass the present champion, else challenger.

    A version that is champion already stays it, so the call can be repeated.

    Args:
        against: of a run, the champion that its gate measured the version against; another one now was faster in a
            race. A run, which may be repeated by itself, does not undo a rollback.
    """
    champions = ChampionLog(context.store, POLICY_MODEL)
    by_run = against is not None
    while True:
        last = champions.latest()
        champion = champion_version(context.tracker, last)
        against = champion if against is None else against
        if champion == version:
            if last is not None:  # in case that an earlier promotion was cut off
                _follow(context, champions, last)
            reasons = last.reasons if last is not None else ["passed: it is the champion already"]
            return PromotionResult(PROMOTE, reasons, POLICY_MODEL, version, CHAMPION)
        if by_run and _was_rolled_back(champions.entries(), version):
            decision, reasons = (
                CHALLENGE,
                [f"failed: somebody rolled back from it; `saferlhf promote {version}` lets it try again"],
            )
        else:
            decision, reasons = decide_on_version(context, version, champion, raced=champion != against)
        if decision != PROMOTE:
            context.tracker.set_alias(POLICY_MODEL, CHALLENGER, version)
            return PromotionResult(CHALLENGE, reasons, POLICY_MODEL, version, CHALLENGER, champion)
        number = 1 if last is None else last.number + 1
        entry = ChampionEntry(number, version, champion, PROMOTE, reasons, context.run_id, _now())
        try:
            champions.append(entry)
        except ConflictError:
            log.info("another version became champion meanwhile: version %s is measured against it", version)
            continue
        _follow(context, champions, entry)
        return PromotionResult(PROMOTE, reasons, POLICY_MODEL, version, CHAMPION, champion)


def rollback(context: RunContext, to_version: str, reason: str) -> ChampionEntry:
    """Let an earlier champion be champion again; without `to_version` the one that the present one was promoted over.

    So what was rolled back from never comes back by a second call, only by its name. A call that was cut off can be
    repeated: it is completed.

    Raises:
        GateError: there is no such earlier champion.
        ConflictError: the champion changed meanwhile: look again before you roll back.
    """
    champions = ChampionLog(context.store, POLICY_MODEL)
    entries = champions.entries()
    if not entries:
        raise GateError(_NOBODY_BEFORE)
    now = entries[-1]
    if now.action == ROLLBACK and not to_version and not is_handed_over(context.store, POLICY_MODEL, now.number):
        _follow(context, champions, now)
        return now
    target = to_version or _promoted_over(entries)
    if not target:
        raise GateError(_NOBODY_BEFORE)
    if target == now.version:
        raise GateError(f"version {target} is champion now: name another one to roll back to")
    if target not in {entry.version for entry in entries} | {entry.previous for entry in entries}:
        raise GateError(f"version {target} was never champion: promote it, then the gate decides")
    entry = ChampionEntry(
        now.number + 1, target, now.version, ROLLBACK, [reason], run_of_version(context.tracker, target), _now()
    )
    champions.append(entry)
    _follow(context, champions, entry)
    return entry


def copy_aliases(tracker: Tracker, champions: ChampionLog) -> None:
    """Let MLflow's aliases say what the log says.

    An alias is set without a condition, so two copiers may overwrite each other; but each looks at the log again after
    it wrote, so the one that writes last writes the last entry.
    """
    entry = champions.latest()
    while entry is not None:
        if entry.previous:
            tracker.set_alias(POLICY_MODEL, PREVIOUS_CHAMPION, entry.previous)
        tracker.set_alias(POLICY_MODEL, CHAMPION, entry.version)
        copied, entry = entry, champions.latest()
        if entry == copied:
            return


def decide_on_version(context: RunContext, version: str, champion: str, raced: bool = False) -> tuple[str, list[str]]:
    """The gate on a registered version against a champion ('': the SFT model), by their stored evaluations.

    Raises:
        GateError: the version was registered without an evaluation.
    """
    if champion == version:
        return PROMOTE, ["passed: it is the champion already"]
    tags = context.tracker.version_tags(POLICY_MODEL, version)
    if "evaluation_uri" not in tags:
        raise GateError(f"{POLICY_MODEL} version {version} has no evaluation: register it from a run")
    folder = context.store.fetch(tags["evaluation_uri"])
    evaluation = read_record(Evaluation, folder / "evaluation.json")
    comparison = Comparison("SFT", evaluation.win_rate)
    regressions = RegressionResults(stored_regressions(folder))
    if champion:
        theirs = _evaluation_folder(context, champion)
        comparison = replace(_compare(context, folder, theirs, f"the champion, version {champion}"), raced=raced)
        regressions = replace(regressions, champions=stored_regressions(theirs) if theirs else [])
    return decide(evaluation, comparison, regressions, context.settings.gate)


def stored_regressions(evaluation_folder: Path) -> list[RegressionAnswer]:
    """A policy's answers to the regression suite; none where it was evaluated before there was one."""
    file = evaluation_folder / "regressions.jsonl"
    return read_records(RegressionAnswer, file) if file.exists() else []


def run_of_version(tracker: Tracker, version: str) -> str:
    """Id of the pipeline run that trained a version.

    Raises:
        SettingsError: the version was not registered by a run.
    """
    run_id = tracker.version_tags(POLICY_MODEL, version).get("run_id", "")
    if not run_id:
        raise SettingsError(f"{POLICY_MODEL} version {version} names no run: it was not registered by a pipeline run")
    return run_id


def _evaluation_folder(context: RunContext, version: str) -> Path | None:
    """Where a version's stored evaluation is; None where it was registered without one."""
    uri = context.tracker.version_tags(POLICY_MODEL, version).get("evaluation_uri", "")
    return context.store.fetch(uri) if uri else None


def _compare(context: RunContext, ours: Path, champions: Path | None, opponent: str) -> Comparison:
    """By the stored evaluations of both."""
    confidence, min_common = context.settings.evaluate.confidence, context.settings.gate.min_common_share
    unknown = Comparison(opponent, wilson(0, 0, confidence))
    if champions is None:
        return replace(unknown, obstacle="was registered without an evaluation")
    judges = [read_record(Evaluation, folder / "evaluation.json").judge for folder in (ours, champions)]
    if judges[0] != judges[1]:
        our_judge, their_judge = (judge or "a judge that was not recorded" for judge in judges)
        return replace(unknown, obstacle=f"was judged by {their_judge}, and the policy by {our_judge}")
    our_answers, their_answers = (read_records(HeldOutAnswer, folder / "answers.jsonl") for folder in (ours, champions))
    return compare(opponent, our_answers, their_answers, confidence, min_common)


def _follow(context: RunContext, champions: ChampionLog, entry: ChampionEntry) -> None:
    """What follows from an entry of the log: the aliases, and the manifest that serves the champion.

    Raises:
        StoreError, TrackingError: not all of it could be done; the message says that the entry stands all the same.
    """
    try:
        copy_aliases(context.tracker, champions)
        hand_over(context, POLICY_MODEL, entry, _canary_share(context, entry))
    except (StoreError, TrackingError) as error:
        raise type(error)(
            f"{POLICY_MODEL} version {entry.version} is champion by entry {entry.number} of the log, but not all that "
            f"follows from it was done: {error}; `saferlhf promote {entry.version}` completes it"
        ) from error


def _promoted_over(entries: Sequence[ChampionEntry]) -> str:
    """Who was champion when the present one was promoted, or further back, where somebody rolled back from that one;
    '' where nobody was, or nobody knows."""
    seen, found = set[str](), entries[-1].version
    while found not in seen:
        seen.add(found)
        found = next((e.previous for e in reversed(entries) if e.version == found and e.action == PROMOTE), "")
        if found not in seen and not _was_rolled_back(entries, found):
            return found
    return ""


def _was_rolled_back(entries: Sequence[ChampionEntry], version: str) -> bool:
    """Whether the version's time as champion ended last by a rollback."""
    for entry in reversed(entries):
        if entry.version == version:
            return False
        if entry.action == ROLLBACK and entry.previous == version:
            return True
    return False


def _canary_share(context: RunContext, entry: ChampionEntry) -> float:
    """All of the traffic for a first champion, and for one that stood the test before."""
    return 1.0 if entry.action == ROLLBACK or not entry.previous else context.settings.serving.canary_share


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
