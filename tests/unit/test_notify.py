"""The webhook that is told how a run ended, by real HTTP; and the exit handler that a platform with one has."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from kfp import dsl

from components.notify import notify as stage
from components.notify.component import notify as exit_handler
from components.notify.notify import Notification, notify, uri_of_run
from pipelines.cluster.compiling import compile_to
from pipelines.cluster.executors import read_steps, table
from pipelines.cluster.platform_file import read_platform
from pipelines.stages import STAGES
from tests.unit.webhook_server import webhook

KNOWN = Notification("r1", "succeeded", "promote", 3, 0.27, 0.5, {"store": "s3://b/runs/r1"})


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "gather", lambda *_: KNOWN)


def told(url: str, pauses: list[float]) -> bool:
    return notify("s3://b/runs/r1", "r1", "succeeded", {"SAFERLHF_WEBHOOK_URL": url}, pauses.append)


@pytest.mark.golden
def test_the_body_by_hand() -> None:
    with webhook([200]) as (url, bodies):
        assert told(url, [])
    assert bodies == [
        {
            "run_id": "r1",
            "status": "succeeded",
            "decision": "promote",
            "round": 3,
            "unsafe_rate": 0.27,
            "win_rate": 0.5,
            "links": {"store": "s3://b/runs/r1"},
        }
    ]


@pytest.mark.fault
def test_bad_hours_are_outlived_with_growing_pauses() -> None:
    """A broken connection, a full server, a broken one; then it takes it."""
    pauses: list[float] = []
    with webhook([0, 429, 503, 204]) as (url, bodies):
        assert told(url, pauses)
    assert pauses == [1, 2, 4]
    assert bodies == [bodies[0]] * 4


@pytest.mark.fault
@pytest.mark.parametrize(("status", "attempts"), [(500, 5), (404, 1), (302, 1)])
def test_a_webhook_that_refuses_is_a_warning_without_its_url(
    caplog: pytest.LogCaptureFixture, status: int, attempts: int
) -> None:
    with caplog.at_level(logging.WARNING, "saferlhf"), webhook([status]) as (url, bodies):
        assert not told(url, [])
    assert len(bodies) == attempts
    assert f"the webhook of SAFERLHF_WEBHOOK_URL was not told that the run ended (status {status})" in caplog.text
    assert "hidden" not in caplog.text


@pytest.mark.fault
@pytest.mark.parametrize("url", ["no url, hidden", "ftp://host/hidden", "http://[hidden", "http://127.0.0.1:9/hidden"])
def test_an_address_that_nobody_answers_at_costs_no_run(caplog: pytest.LogCaptureFixture, url: str) -> None:
    with caplog.at_level(logging.DEBUG):
        assert not told(url, [])
    assert "was not told" in caplog.text
    assert "hidden" not in "".join(record.getMessage() for record in caplog.records if record.name == "saferlhf")


@pytest.mark.fault
def test_an_error_of_any_kind_costs_no_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(stage, "gather", lambda *_: 1 / 0)
    assert not told("http://127.0.0.1:9/", [])
    assert "nobody was told that run r1 ended: ZeroDivisionError" in caplog.text


def test_without_a_url_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "gather", lambda *_: pytest.fail("gathered"))
    assert not notify("s3://b/runs/r1", "r1", "failed", {})
    assert not told(" ", [])


def test_a_run_without_a_uri_lies_where_start_run_puts_it() -> None:
    assert uri_of_run("", "r1", {"SAFERLHF_STORE_URI": "s3://b/p/"}) == "s3://b/p/runs/r1"
    assert uri_of_run("s3://c/runs/x", "r1", {}) == "s3://c/runs/x"


@pytest.mark.parametrize(
    ("given", "name"), [({"run_uri": "", "run_id": ""}, "kfp-7"), ({"run_uri": "s3://c/r/x", "run_id": "x"}, "x")]
)
def test_the_exit_handler_tells_what_kubeflow_says_of_the_run(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], name: str
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(stage, "gather", lambda *arguments: asked.append(arguments) or KNOWN)
    monkeypatch.setenv("SAFERLHF_STORE_URI", "s3://b")
    with webhook([200]) as (url, bodies):
        monkeypatch.setenv("SAFERLHF_WEBHOOK_URL", url)
        final = dsl.PipelineTaskFinalStatus("FAILED", "job", "task", 1, "why")
        exit_handler.python_func(kfp_run_id="kfp-7", status=final, **given)
    assert asked == [(given["run_uri"] or "s3://b/runs/kfp-7", name, "failed")]
    assert len(bodies) == 1


def test_a_platform_with_a_webhook_compiles_to_an_exit_handler(tmp_path: Path) -> None:
    platform = read_platform("gke")
    secrets = platform.secrets.model_copy(update={"webhook": "team-webhook"})
    compile_to(tmp_path / "p.yaml", 1, platform.model_copy(update={"secrets": secrets}))
    text = (tmp_path / "p.yaml").read_text()
    steps = read_steps(text)
    assert {step.stage for step in steps} == {*STAGES, "notify"}
    (end,) = [step for step in steps if step.stage == "notify"]
    (first,) = [step for step in steps if step.stage == "start_run"]
    assert end.task.trigger_policy.strategy == 2  # ALL_UPSTREAM_TASKS_COMPLETED: also after a failure
    assert end.container.image == first.container.image
    assert not end.task.caching_options.enable_cache
    assert len(end.path) == 1 and len(first.path) == 2  # the others are within its body
    own = [secret for secret in end.pod.secret_as_env if secret.secret_name == "team-webhook"]
    assert [key.env_var for secret in own for key in secret.key_to_env] == ["SAFERLHF_WEBHOOK_URL"]
    assert [step.stage for step in steps if "team-webhook" in str(step.pod)] == ["notify"]
    assert table(steps).splitlines()[-1].startswith("notify")
