"""Promotion and rollback on real servers: who is champion in the end, whoever raced whom."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.client import Configuration
from typer.testing import CliRunner

from components.foundation.champion_log import CHAMPION, POLICY_MODEL, ChampionEntry, ChampionLog
from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import ClusterError, ConflictError, GateError, IntegrityError
from components.foundation.results import PromotionResult, to_json
from components.foundation.run_context import RunContext, RunDescription
from components.foundation.setting_sections import ServingSettings
from components.foundation.train_job.kubernetes_api import Backoff, Cluster, KubernetesApi, new_client
from components.promote import deployment, promotion
from components.promote.deployment import deploy_champion
from components.promote.promote import run_set_alias
from components.promote.promotion import CHALLENGER, PREVIOUS_CHAMPION, promote, rollback
from pipelines.cli import app
from pipelines.local.services import Endpoints
from tests.integration.kubernetes_server import KubernetesServer, kubeconfig
from tests.integration.kubernetes_state import Fault
from tests.integration.promotions import SETTINGS, clear_aliases, context_of, of_a_run, race, registered

RACES = int(os.environ.get("SAFERLHF_PROMOTION_RACES", "80"))
RACES_SEED = int(os.environ.get("SAFERLHF_PROMOTION_SEED", "0"))

pytestmark = pytest.mark.xdist_group("promotion")


@pytest.fixture
def context(services: Endpoints, store: CheckpointStore, tmp_path: Path) -> Iterator[RunContext]:
    """A store and a registry in which nobody is champion."""
    found = context_of(store.root_uri, services.tracking_uri, tmp_path / "cache")
    clear_aliases(found.tracker)
    yield found
    clear_aliases(found.tracker)


def command(*arguments: str) -> tuple[int, str]:
    """A command of `saferlhf`: its exit status, and what it said."""
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output + (str(result.exception) if result.exception else "")


def figures_of(version: str, unsafe: str = "0.100 (0.000 to 0.200)") -> str:
    """Of a version that `registered` made."""
    rates = "benign win rate over SFT 0.600 (0.500 to 0.700), over-refusal 0.100 (0.000 to 0.200)"
    return f"version {version}: unsafe rate {unsafe}, {rates}\n"


def test_a_refused_promotion_shows_the_figures_of_both(context: RunContext, tmp_path: Path) -> None:
    unsafe = of_a_run(context, registered(context, tmp_path, 0.9, unsafe_high=0.5))
    status, said = command("promote", unsafe)
    assert status == 1
    assert f"{figures_of(unsafe, '0.250 (0.000 to 0.500)')}there is no champion yet\n" in said, said
    good, worse = (of_a_run(context, registered(context, tmp_path, h)) for h in (0.5, 0.3))
    status, said = command("promote", good)
    assert (status, "unsafe rate 0.1" in said) == (0, False)
    status, said = command("promote", worse)
    assert status == 1
    assert f"version {worse} is challenger\n{figures_of(worse)}champion {figures_of(good)}" in said
    assert f"\n{figures_of(good)}" in command("registry", "show", good)[1]


def test_a_rollback_shows_the_figures_of_both(context: RunContext, tmp_path: Path) -> None:
    good, better = (of_a_run(context, registered(context, tmp_path, h)) for h in (0.5, 0.7))
    promote(context, good)
    promote(context, better)
    status, said = command("rollback", "--reason", "complaints")
    assert status == 0, said
    again = f"{POLICY_MODEL} version {good} is champion again, in place of version {better}\n"
    assert said.startswith(f"{again}{figures_of(good)}{figures_of(better)}to serve it: ")
    status, said = command("rollback", "--reason", "they were wrong", "--to", better)
    assert (status, f"version {better} is champion again, in place of version {good}\n" in said) == (0, True), said
    status, said = command("rollback", "--reason", "why not", "--to", "999")
    assert (status, "999 was never champion" in said) == (1, True), said


def test_the_champion_is_served_in_the_namespace_that_is_named(
    context: RunContext, server: KubernetesServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = of_a_run(context, registered(context, tmp_path, 0.5))
    promote(context, version)
    monkeypatch.setenv("KUBECONFIG", kubeconfig(tmp_path / "kubeconfig", server.url, "elsewhere"))
    status, said = command("serve", "apply", "--namespace", "team")
    assert (status, said.startswith("applied InferenceService team/saferlhf-policy: s3://")) == (0, True), said
    assert server.services["saferlhf-policy"]["metadata"]["annotations"]["saferlhf/version"] == version


@pytest.mark.fault
@pytest.mark.parametrize("evaluation", ["gone", None])
def test_a_rollback_needs_no_figures(context: RunContext, tmp_path: Path, evaluation: str | None) -> None:
    """The policy that has to go may be one whose evaluation was lost, or that never had one."""
    good, better = (of_a_run(context, registered(context, tmp_path, h)) for h in (0.5, 0.7))
    promote(context, good)
    promote(context, better)
    if evaluation is None:
        context.tracker._client.delete_model_version_tag(POLICY_MODEL, better, "evaluation_uri")
    else:
        uri = f"{context.store.root_uri}/{evaluation}"
        context.tracker._client.set_model_version_tag(POLICY_MODEL, better, "evaluation_uri", uri)
    status, said = command("rollback", "--reason", "complaints")
    words = "registered without an evaluation" if evaluation is None else "its evaluation cannot be read ("
    assert (status, f"\nversion {better}: {words}" in said, "\nto serve it: " in said) == (0, True, True)


def test_a_version_that_was_registered_by_hand_is_in_nobodys_way(context: RunContext, tmp_path: Path) -> None:
    good, better = (of_a_run(context, registered(context, tmp_path, h)) for h in (0.5, 0.7))
    promote(context, good)
    promote(context, better)
    context.tracker._client.create_model_version(POLICY_MODEL, "s3://elsewhere/1/artifacts/model")
    status, said = command("rollback", "--reason", "complaints")
    assert status == 0, said
    assert context.tracker.aliases(POLICY_MODEL)[CHAMPION] == good


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


@pytest.mark.fault
@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ("rules", "model small", "was judged by model small, and the policy by rules"),
        ("model small", "rules", "was judged by rules, and the policy by model small"),
        ("rules", "", "was judged by a judge that was not recorded, and the policy by rules"),
    ],
)
def test_a_policy_that_another_judge_judged_is_not_compared_however_good(
    context: RunContext, tmp_path: Path, ours: str, theirs: str, words: str
) -> None:
    champion = registered(context, tmp_path, helpfulness=0.5, judge=theirs)
    promote(context, champion)
    refused = promote(context, registered(context, tmp_path, helpfulness=0.9, judge=ours))
    assert refused.alias == CHALLENGER
    failures = [reason for reason in refused.reasons if reason.startswith("failed")]
    assert failures == [f"failed: the champion, version {champion} {words}"]


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


@pytest.fixture
def cluster(server: KubernetesServer) -> Cluster:
    return Cluster(new_client(Configuration(host=server.url)), "team", "set-alias", "a-uid")


def source_of(context: RunContext, version: str) -> str:
    return context.tracker.version_tags(POLICY_MODEL, version)["source"]


def served(server: KubernetesServer) -> str:
    """The model that the cluster serves."""
    uri: str = server.services["saferlhf-policy"]["spec"]["predictor"]["model"]["storageUri"]
    return uri


def test_a_new_champion_is_given_to_the_cluster_where_the_run_asks_for_it(
    context: RunContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: KubernetesServer,
    cluster: Cluster,
) -> None:
    """What the cluster refuses fails the step, with the champion in its place; the step again completes it."""
    monkeypatch.setattr("components.promote.promote.in_cluster", lambda: cluster)
    settings = SETTINGS.model_copy(update={"serving": ServingSettings(apply=True)})
    versions = [registered(context, tmp_path, h) for h in (0.5, 0.7, 0.3)]
    runs = [f"{context.store.root_uri}/runs/of-{version}" for version in versions]
    for run, version in zip(runs, versions, strict=True):
        parent = context.tracker.start_pipeline_run(version, version, {})
        run_id = run.rpartition("/")[2]
        context.store.write_text(f"{run}/run.json", to_json(RunDescription(run_id, parent, settings.model_dump_json())))
        gate = PromotionResult("promote", [], POLICY_MODEL, version, "", against="")
        context.store.write_text(f"{run}/gate.json", to_json(gate))
    assert run_set_alias(runs[0], versions[0], CHAMPION) == CHAMPION
    assert served(server) == source_of(context, versions[0])
    server.fault(Fault("PATCH", status=403))
    with pytest.raises(ClusterError, match="refused with 403"):
        run_set_alias(runs[1], versions[1], CHAMPION)
    assert context.tracker.aliases(POLICY_MODEL)[CHAMPION] == versions[1]
    assert served(server) == source_of(context, versions[0])
    assert run_set_alias(runs[1], versions[1], CHAMPION) == CHAMPION
    assert served(server) == source_of(context, versions[1])
    asked = len(server.requests)
    assert run_set_alias(runs[2], versions[2], CHAMPION) == CHALLENGER
    assert len(server.requests) == asked


@pytest.mark.fault
def test_of_two_promotions_that_deploy_at_once_the_last_champion_is_served(
    context: RunContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: KubernetesServer,
    cluster: Cluster,
) -> None:
    """The second one is through before the first one's service reaches the cluster."""
    api = KubernetesApi(cluster, Backoff(attempts=1))
    good, better = (registered(context, tmp_path, h) for h in (0.5, 0.7))
    promote(context, good)
    apply, applied = deployment.apply_service, []

    def overtaken(api: KubernetesApi, service: dict[str, Any]) -> dict[str, Any]:
        if not applied:
            applied.append("overtaken")
            promote(context, better)
            deploy_champion(context.store, api)
        applied.append(service["metadata"]["annotations"]["saferlhf/version"])
        return apply(api, service)

    monkeypatch.setattr(deployment, "apply_service", overtaken)
    deploy_champion(context.store, api)
    assert applied == ["overtaken", better, good, better]
    assert served(server) == source_of(context, better)


@pytest.mark.fault
def test_a_champion_that_was_not_handed_over_yet_is_left_to_whoever_promoted_it(
    context: RunContext, tmp_path: Path, server: KubernetesServer, cluster: Cluster
) -> None:
    good, better = (registered(context, tmp_path, h) for h in (0.5, 0.7))
    promote(context, good)
    ChampionLog(context.store, POLICY_MODEL).append(ChampionEntry(2, better, good, "promote", [], "run", "now"))
    deploy_champion(context.store, KubernetesApi(cluster, Backoff(attempts=1)))
    assert server.services == {}


@pytest.mark.fault
def test_row_15_who_loses_the_race_is_measured_against_the_winner(
    context: RunContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other promotion runs from its first step to its last between our decision and our write."""
    first, worse, better = (registered(context, tmp_path, h) for h in (0.4, 0.5, 0.7))
    promote(context, first)
    decided: list[tuple[str, str]] = []
    decide = promotion.decide_on_version

    def interrupted(context: RunContext, version: str, champion: str, raced: bool) -> tuple[str, list[str]]:
        decision = decide(context, version, champion, raced)
        decided.append((version, champion))
        if decided == [(worse, first)]:
            assert decision[0] == "promote"
            assert promote(context, better).alias == CHAMPION
        return decision

    monkeypatch.setattr(promotion, "decide_on_version", interrupted)
    assert promote(context, worse).alias == CHALLENGER
    assert decided == [(worse, first), (better, first), (worse, better)]
    assert context.tracker.aliases(POLICY_MODEL)[CHAMPION] == better


@pytest.mark.fault
@pytest.mark.parametrize(("racers", "share"), [(2, 1.0), (4, 0.25)])
def test_row_15_of_processes_that_race_the_best_policy_is_champion_each_time(
    context: RunContext, services: Endpoints, tmp_path: Path, racers: int, share: float
) -> None:
    times = round(share * RACES)
    assert race(context, services.tracking_uri, tmp_path, racers=racers, times=times, seed=RACES_SEED) == times


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


def test_a_second_rollback_goes_further_back_and_not_to_what_was_rolled_back_from(
    context: RunContext, tmp_path: Path
) -> None:
    first, second, third = (registered(context, tmp_path, h) for h in (0.5, 0.7, 0.9))
    for version in (first, second, third):
        promote(context, version)
    assert [rollback(context, "", "complaints").version for _ in range(2)] == [second, first]
    with pytest.raises(GateError, match="no champion before"):
        rollback(context, "", "complaints")
    assert context.tracker.aliases(POLICY_MODEL) == {CHAMPION: first, PREVIOUS_CHAMPION: second}
    promote(context, third)
    assert rollback(context, "", "complaints").version == first  # over which it was promoted this time


def test_rollbacks_do_not_go_back_and_forth(context: RunContext, tmp_path: Path) -> None:
    """The second champion was promoted over the first, and the first, asked for, over the second."""
    first, second = registered(context, tmp_path, 0.5), registered(context, tmp_path, 0.5)
    entries = [(first, "", "promote"), (second, first, "promote"), (first, second, "promote")]
    for number, (version, previous, action) in enumerate(entries, start=1):
        entry = ChampionEntry(number, version, previous, action, [], context.run_id, "2026-11-29T00:00:00+00:00")
        ChampionLog(context.store, POLICY_MODEL).append(entry)
    assert rollback(context, "", "complaints").version == second
    with pytest.raises(GateError, match="no champion before"):
        rollback(context, "", "complaints")


@pytest.mark.fault
def test_a_run_that_is_repeated_does_not_undo_a_rollback(context: RunContext, tmp_path: Path) -> None:
    """Its report failed and somebody resumes it, or a step is tried again; who wants the policy back says so."""
    good, better = (registered(context, tmp_path, h) for h in (0.5, 0.7))
    promote(context, good)
    assert promote(context, better, against=good).decision == "promote"
    assert promote(context, better, against=good).decision == "promote"  # a repetition, and it is champion still
    rollback(context, "", "complaints")
    again = promote(context, better, against=good)
    assert (again.decision, again.alias) == ("challenger", "challenger")
    assert f"`saferlhf promote {better}`" in again.reasons[0]
    assert context.tracker.aliases(POLICY_MODEL)[CHAMPION] == good
    assert promote(context, better).decision == "promote"  # asked for
    assert promote(context, better, against=good).decision == "promote"


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
