"""The log of a stage: plain lines, or one JSON object an event. In processes of their own: logging is global."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from components.foundation.errors import SettingsError
from components.foundation.logs import is_json, is_json_event
from components.foundation.redaction import secret_values, without_password

SECRET = "not-for-the-log-1234"
HEAD = (
    "import logging, warnings\n"
    "from components.foundation.logs import Place, configure_logging, set_place, set_step\n"
    "from components.foundation.progress import Progress\n"
    "log = logging.getLogger('saferlhf')\n"
    "configure_logging()\n"
)


def printed(program: str, **variables: str) -> list[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(
        [sys.executable, "-c", HEAD + program], capture_output=True, text=True, check=True, env=inherited | variables
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def events(program: str, **variables: str) -> list[dict[str, Any]]:
    lines = printed(program, SAFERLHF_LOG_FORMAT="json", **variables)
    assert all(is_json_event(line) for line in lines)
    return [json.loads(line) for line in lines]


def test_the_log_holds_our_lines_and_nobody_elses_advice() -> None:
    lines = printed(
        "configure_logging()\n"
        "log.info('ours'); log.debug('detail')\n"
        "logging.getLogger('other').warning('advice'); logging.getLogger('other').error('trouble')\n"
        "warnings.warn('deprecated')\n"
    )
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in lines] == ["ours", "trouble"]


def test_an_event_says_when_where_and_what() -> None:
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    started, stepped, foreign = events(
        "set_place(Place('run-7', 2, 'ppo_lagrangian')); log.info('%s: started', 'ppo')\n"
        "set_step(3); log.warning('step 3')\n"
        "logging.getLogger('other').error('trouble')\n"
    )
    time = started.pop("time")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time)
    assert before <= datetime.datetime.fromisoformat(time) <= datetime.datetime.now(datetime.UTC)
    place = {"run": "run-7", "round": 2, "stage": "ppo_lagrangian", "rank": 0}
    assert started == {"level": "INFO", "logger": "saferlhf", "message": "ppo: started", **place}
    assert (stepped["level"], stepped["step"], stepped["message"]) == ("WARNING", 3, "step 3")
    assert (foreign["logger"], foreign["level"]) == ("other", "ERROR")


def test_outside_a_run_an_event_has_no_empty_fields() -> None:
    (event,) = events("log.info('hello')\n")
    assert event.keys() == {"time", "level", "logger", "message", "rank"}


@pytest.mark.fault
def test_an_event_of_many_lines_is_one_line() -> None:
    """Also line ends that only some readers take for one: U+2028, NEL, form feed."""
    text = "one\ntwo\r\nthree\u2028four\x85five\x0csix"
    said, failed = events(
        f"log.info({text!r})\n"
        "try:\n    raise ValueError('first line\\nsecond line')\nexcept ValueError:\n    log.exception('failed')\n"
    )
    assert said["message"] == text
    assert failed["message"] == "failed"
    assert "Traceback" in failed["exception"]
    assert "first line\nsecond line" in failed["exception"]


def test_progress_is_an_event_too() -> None:
    (event,) = events("Progress('sft', 4, 'steps').update(4)\n")
    assert event["message"].startswith("progress sft 4/4 steps ")


@pytest.mark.fault
@pytest.mark.parametrize("form", ["json", "plain"])
def test_row_33_no_secret_is_in_the_log(form: str) -> None:
    """Neither in a message nor in an exception: keys of the environment, passwords in URIs."""
    variables = {"AWS_SECRET_ACCESS_KEY": SECRET, "SAFERLHF_JUDGE_KEY": f"{SECRET}-longer", "X_TOKEN": "short"}
    text = "\n".join(
        printed(
            "import os\n"
            "log.info('%s at https://me:hunter2@host/x, short', os.environ['SAFERLHF_JUDGE_KEY'])\n"
            "try:\n    raise ValueError(os.environ['AWS_SECRET_ACCESS_KEY'])\n"
            "except ValueError:\n    log.exception('failed')\n",
            SAFERLHF_LOG_FORMAT=form,
            **variables,
        )
    )
    assert SECRET not in text
    assert "longer" not in text
    assert "hunter2" not in text
    assert "(secret) at https://host/x, short" in text
    assert "ValueError: (secret)" in text


def test_row_33_no_secret_is_in_what_ends_a_step() -> None:
    """The errors that it was raised from hold addresses and keys that ours leaves out."""
    program = """
try:
    raise ValueError('no answer from http://me:hunter2@host/, key ' + os.environ['S3_SECRET'])
except ValueError as error:
    raise RuntimeError('cannot reach it') from error
"""
    done = subprocess.run(
        [sys.executable, "-c", HEAD + "import os\n" + program],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"S3_SECRET": SECRET},
    )
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: cannot reach it\n")
    assert "no answer from http://host/, key (secret)" in done.stderr
    assert "hunter2" not in done.stderr and SECRET not in done.stderr


@pytest.mark.fault
def test_another_format_is_refused() -> None:
    assert not is_json({})
    assert not is_json({"SAFERLHF_LOG_FORMAT": ""})
    with pytest.raises(SettingsError, match="SAFERLHF_LOG_FORMAT='xml' is no log format: set it to plain or json"):
        is_json({"SAFERLHF_LOG_FORMAT": "xml"})


@pytest.mark.golden
def test_passwords_are_taken_out_of_uris_wherever_they_stand() -> None:
    assert without_password("a http://u:p@h:1/x?q=1, b s3://k@bucket") == "a http://h:1/x?q=1, b s3://bucket"
    assert without_password("http://h/x@y and mail@example.org") == "http://h/x@y and mail@example.org"
    assert without_password("http://u:p@ss@h/?to=a@b") == "http://h/?to=a@b"


def test_a_secret_from_a_file_is_found_without_its_newline() -> None:
    assert secret_values({"S3_SECRET": "12345678\n", "A_TOKEN": "  short ", "NAME": "not a secret"}) == ["12345678"]
