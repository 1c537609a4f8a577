"""Gauges of a stage for Prometheus, served over HTTP while the stage runs.

| environment | meaning |
|---|---|
| `SAFERLHF_METRICS_PORT` | port of `/metrics`; empty: nothing is served |
| `SAFERLHF_METRICS_ADDRESS` | where to listen; default 127.0.0.1, in a cluster 0.0.0.0 (or :: for IPv6) |

What a training step logs to MLflow is a gauge too: `lagrangian/lambda` is `saferlhf_lagrangian_lambda`. Each has the
labels run, round, stage and rank. What depends on all ranks is summed before it is logged, so rank 0 serves for all.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from components.foundation import distributed
from components.foundation.errors import SettingsError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Gauge

_PORT, _ADDRESS = "SAFERLHF_METRICS_PORT", "SAFERLHF_METRICS_ADDRESS"
_LABELS = ("run", "round", "stage", "rank")
_HIGHEST_PORT = 65535

log = logging.getLogger("saferlhf")


class Gauges:
    """Named numbers of one stage; without a registry nobody looks at them.

    Args:
        place: values of the labels run, round and stage.
    """

    def __init__(self, place: Mapping[str, str], registry: CollectorRegistry | None = None) -> None:
        self._labels = {**place, "rank": str(distributed.world().rank)}
        self._registry = registry
        self._gauges: dict[str, Gauge] = {}

    def set(self, values: Mapping[str, float]) -> None:
        """Set gauges; those that are new appear."""
        if self._registry is None:
            return
        for name, value in values.items():
            if name not in self._gauges:
                self._gauges[name] = self._new(name, self._registry)
            self._gauges[name].labels(**self._labels).set(value)

    @staticmethod
    def _new(name: str, registry: CollectorRegistry) -> Gauge:
        from prometheus_client import Gauge

        text = f"{name} of the last step" if "/" in name else name.replace("_", " ")
        return Gauge(gauge_name(name), text, _LABELS, registry=registry)


def gauge_name(metric: str) -> str:
    """The name in Prometheus of what MLflow calls `metric`."""
    return "saferlhf_" + re.sub(r"[^a-zA-Z0-9_]", "_", metric)


@contextmanager
def served_gauges(
    run: str, stage: str, round_number: int, environment: Mapping[str, str] = os.environ
) -> Iterator[Gauges]:
    """Gauges that Prometheus can read within the block. A port that cannot be had is a warning, and costs no training.

    Raises:
        SettingsError: SAFERLHF_METRICS_PORT is no port.
    """
    place = {"run": run, "round": str(round_number), "stage": stage}
    port = _port(environment)
    if port is None or not distributed.world().is_main:
        yield Gauges(place)
        return
    from prometheus_client import CollectorRegistry, start_http_server

    address, registry = environment.get(_ADDRESS) or "127.0.0.1", CollectorRegistry()
    try:
        server, thread = start_http_server(port, address, registry)
    except OSError as error:
        log.warning(
            "no metrics are served: %s=%d at %s cannot be had (%s); set another port, or unset it",
            *(_PORT, port, address, error),
        )
        server = None
    try:
        yield Gauges(place, registry)
    finally:
        if server is not None:
            server.shutdown()
            server.server_close()
            thread.join()


def _port(environment: Mapping[str, str]) -> int | None:
    told = environment.get(_PORT, "")
    if not told:
        return None
    if not told.isascii() or not told.isdigit() or not 1 <= int(told) <= _HIGHEST_PORT:
        raise SettingsError(f"{_PORT}={told!r} is no port: set it to a number from 1 to {_HIGHEST_PORT}, or unset it")
    return int(told)
