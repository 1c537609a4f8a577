"""One log format for every stage: plain lines for people, or one JSON object an event for a log store.

`SAFERLHF_LOG_FORMAT=json` chooses the latter; `plain` is the default.

    12:03:41 step 3: cost +0.41 reward +1.20 lambda 1.105 kl 0.031
    {"time": "2026-11-24T12:03:41.512Z", "level": "INFO", "message": "step 3: ...", "run": "r1", "round": 1, ...}

In JSON an event is one line, whatever is in its message; a traceback is a field of it. Values of environment variables
that are named as secrets, and passwords in URIs, are in neither format.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import TracebackType

from components.foundation import distributed
from components.foundation.errors import SettingsError
from components.foundation.redaction import secret_values, without_password

_VARIABLE = "SAFERLHF_LOG_FORMAT"
_JSON_START = '{"time": "'


@dataclass(frozen=True)
class Place:
    """Where in a run this process is; None where it is nowhere in particular."""

    run: str | None = None
    round: int | None = None
    stage: str | None = None
    step: int | None = None


_place = Place()


def set_place(place: Place) -> None:
    """From now on, events of this process happen there."""
    global _place
    _place = place


def set_step(step: int) -> None:
    """From now on, events happen at this step of the stage."""
    set_place(replace(_place, step=step))


def is_json(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the log is to be JSON.

    Raises:
        SettingsError: SAFERLHF_LOG_FORMAT names no format.
    """
    told = environment.get(_VARIABLE) or "plain"
    if told not in ("plain", "json"):
        raise SettingsError(f"{_VARIABLE}={told!r} is no log format: set it to plain or json, or unset it")
    return told == "json"


def is_json_event(line: str) -> bool:
    """Whether a line of a stage's output is an event of its log in JSON."""
    return line.startswith(_JSON_START)


def configure_logging() -> None:
    """INFO of ours, on rank 0; warnings of nobody else's: third parties may log errors only.

    What ends the process is told without secrets too: below our own message are those of libraries, with addresses.
    """
    warnings.filterwarnings("ignore")
    sys.excepthook = _tell_error
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter() if is_json() else PlainFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.ERROR, handlers=[handler], force=True)
    logging.getLogger("saferlhf").setLevel(logging.INFO if distributed.world().is_main else logging.ERROR)


class PlainFormatter(logging.Formatter):
    """The standard library's format, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return _redacted(super().format(record))


class JsonFormatter(logging.Formatter):
    """Time in UTC, level, logger, message, run, round, stage, step, rank, and the exception's traceback if there is
    one. Fields that are not known are left out."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        event: dict[str, str | int] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": _redacted(record.getMessage()),
        }
        event |= {name: value for name, value in asdict(_place).items() if value is not None}
        event["rank"] = distributed.world().rank
        if record.exc_info:
            event["exception"] = _redacted(self.formatException(record.exc_info))
        return json.dumps(event)  # ASCII: no character can be taken for the end of a line


def _tell_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python's own hook, without secrets."""
    sys.stderr.write(_redacted("".join(traceback.format_exception(kind, error, trace))))


def _redacted(text: str) -> str:
    text = without_password(text)
    for value in secret_values(os.environ):
        text = text.replace(value, "(secret)")
    return text
