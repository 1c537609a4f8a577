"""Metrics of a stage as Prometheus reads them, over HTTP."""

from __future__ import annotations

import logging
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from components.foundation import distributed
from components.foundation.errors import SettingsError
from components.foundation.metrics import gauge_name, served_gauges

LABELS = {"run": "r1", "round": "2", "stage": "ppo_lagrangian", "rank": "0"}


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def scrape(port: int) -> dict[str, tuple[dict[str, str], float]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    assert {family.type for family in families} <= {"gauge"}
    return {sample.name: (sample.labels, sample.value) for family in families for sample in family.samples}


def served(port: int, **more: str) -> dict[str, str]:
    return {"SAFERLHF_METRICS_PORT": str(port), **more}


def test_a_scrape_has_the_newest_values_with_their_labels(port: int) -> None:
    with served_gauges("r1", "ppo_lagrangian", 2, served(port)) as gauges:
        gauges.set({"lagrangian/lambda": 1.0, "step": 1})
        gauges.set({"lagrangian/lambda": 1.5, "step": 2, "kl/mean": float("nan")})
        found = scrape(port)
    assert found["saferlhf_lagrangian_lambda"] == (LABELS, 1.5)
    assert found["saferlhf_step"] == (LABELS, 2.0)
    assert str(found["saferlhf_kl_mean"][1]) == "nan"
    assert len(found) == 3


def test_the_port_is_closed_at_the_end_and_can_be_had_again(port: int) -> None:
    for stage in ("reward_model", "cost_model"):
        with served_gauges("r1", stage, 1, served(port)) as gauges:
            gauges.set({f"{stage}/loss": 0.5})
            assert scrape(port)[f"saferlhf_{stage}_loss"][0]["stage"] == stage
        with pytest.raises(urllib.error.URLError):
            scrape(port)


def test_without_a_port_nothing_listens(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "bind", lambda *_: pytest.fail("a port was opened"))
    for environment in ({}, {"SAFERLHF_METRICS_PORT": ""}):
        with served_gauges("r1", "sft", 0, environment) as gauges:
            gauges.set({"sft/loss": 1.0})


def test_of_several_ranks_the_first_serves(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_world", distributed.World(rank=1, size=2))
    with served_gauges("r1", "sft", 0, served(port)) as gauges:
        gauges.set({"sft/loss": 1.0})
        with pytest.raises(urllib.error.URLError):
            scrape(port)


@pytest.mark.fault
def test_a_port_in_use_is_a_warning_and_costs_no_training(taken: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "saferlhf"), served_gauges("r1", "sft", 0, served(taken)) as gauges:
        gauges.set({"sft/loss": 1.0})
    (warning,) = [record.getMessage() for record in caplog.records]
    assert f"SAFERLHF_METRICS_PORT={taken} at 127.0.0.1 cannot be had" in warning
    assert "Address already in use" in warning


@pytest.mark.fault
def test_an_address_that_is_none_is_a_warning(port: int, caplog: pytest.LogCaptureFixture) -> None:
    environment = served(port, SAFERLHF_METRICS_ADDRESS="203.0.113.1")  # of no machine: for documentation
    with caplog.at_level(logging.WARNING, "saferlhf"), served_gauges("r1", "sft", 0, environment):
        pass
    assert "at 203.0.113.1 cannot be had" in caplog.text


@pytest.mark.fault
@pytest.mark.parametrize("told", ["http", "0", "65536", "-1", "９４６４", "9464 "])
def test_what_is_no_port_is_refused(told: str) -> None:
    with (
        pytest.raises(SettingsError, match="is no port: set it to a number from 1 to 65535"),
        served_gauges("r1", "sft", 0, {"SAFERLHF_METRICS_PORT": told}),
    ):
        pass


@pytest.mark.golden
def test_names_by_hand() -> None:
    assert gauge_name("lagrangian/cost_moving_average") == "saferlhf_lagrangian_cost_moving_average"
    assert gauge_name("checkpoint_timestamp_seconds") == "saferlhf_checkpoint_timestamp_seconds"
    assert gauge_name("a.b-c d") == "saferlhf_a_b_c_d"
