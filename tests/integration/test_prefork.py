"""A step that is forked from a process which has made its imports is like one with an interpreter of its own."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipelines.local.prefork import as_sys_executable, preforked_python

pytestmark = pytest.mark.xdist_group("prefork")

_SECONDS = 60

TELLS = """
    import json, os, sys
    print(json.dumps({
        "arguments": sys.argv[1:], "name": __name__, "folder": os.getcwd(), "path": sys.path[0],
        "environment": dict(os.environ), "input": sys.stdin.read(), "interpreter": sys.executable,
        "warm": "torch" in sys.modules,
    }))
    print("to errors", file=sys.stderr)
"""
STOPS = """
    import os, signal, sys, time
    def stop(number, frame):
        print("saved", flush=True)
        raise SystemExit(75)
    signal.signal(signal.SIGTERM, stop)
    print(os.getpid(), flush=True)
    while True:
        signal.pause()
"""
ENDINGS = {
    "returns": ("pass", 0),
    "exits": ("raise SystemExit(71)", 71),
    "exits with words": ("import sys; sys.exit('no labels')", 1),
    "fails": ("raise ValueError('too few rows')", 1),
    "is killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL),
}


@pytest.fixture(scope="module")
def python() -> Iterator[str]:
    with preforked_python() as command:
        yield command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where `step.py` lies, and the step runs."""
    return tmp_path.resolve()


def start(python: str, folder: Path, program: str, *arguments: str) -> subprocess.Popen[str]:
    """Run a program by `sh`, as KFP does."""
    (folder / "step.py").write_text(textwrap.dedent(program))
    return subprocess.Popen(
        ["sh", "-ec", f'exec {python} -m step "$@"', "sh", *arguments],
        cwd=folder,
        env={**os.environ, "MARK": "é\udcff"},  # no UTF-8, as an environment may be
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_is_started_with_the_same_arguments_folder_and_environment(python: str, folder: Path) -> None:
    arguments = ["--input", 'a "b" $c', ""]
    told = []
    for command in (shlex.quote(sys.executable), python):
        output, errors = start(command, folder, TELLS, *arguments).communicate(timeout=_SECONDS)
        assert errors == "to errors\n"
        told.append(json.loads(output))
    cold, warm = told
    assert warm.pop("warm") and not cold.pop("warm")
    assert warm == cold
    assert warm["arguments"] == arguments and warm["folder"] == str(folder) and warm["name"] == "__main__"


@pytest.mark.parametrize(("program", "status"), ENDINGS.values(), ids=ENDINGS)
def test_it_ends_with_the_same_status_and_words(python: str, folder: Path, program: str, status: int) -> None:
    last = []
    for command in (shlex.quote(sys.executable), python):
        step = start(command, folder, program)
        _, errors = step.communicate(timeout=_SECONDS)
        code = step.returncode
        assert (code if code >= 0 else 128 - code) == status  # a shell says 128 + the signal
        last.append(errors.splitlines()[-1:])
    assert last[0] == last[1]


def test_what_is_registered_for_its_end_is_done(python: str, folder: Path) -> None:
    output, _ = start(python, folder, "import atexit; atexit.register(print, 'the end')").communicate(timeout=_SECONDS)
    assert output == "the end\n"


def test_steps_run_beside_each_other(python: str, folder: Path) -> None:
    first, second = (start(python, folder, STOPS) for _ in range(2))
    assert first.stdout is not None and second.stdout is not None
    pids = [int(step.stdout.readline()) for step in (first, second)]
    for step, pid in zip((second, first), reversed(pids), strict=True):
        os.kill(pid, signal.SIGTERM)
        assert step.wait(_SECONDS) == 75
        step.communicate()


@pytest.mark.fault
def test_one_that_is_asked_to_stop_saves_its_state_first(python: str, folder: Path) -> None:
    step = start(python, folder, STOPS)
    assert step.stdout is not None
    step.stdout.readline()
    for number in (signal.SIGINT, signal.SIGHUP):  # what a terminal sends to it is for the run
        step.send_signal(number)
    step.terminate()
    output, _ = step.communicate(timeout=_SECONDS)
    assert (output, step.returncode) == ("saved\n", 75)


@pytest.mark.fault
def test_one_whose_client_is_killed_is_killed(python: str, folder: Path) -> None:
    step = start(python, folder, STOPS)
    assert step.stdout is not None
    process = psutil.Process(int(step.stdout.readline()))
    step.kill()
    output, _ = step.communicate(timeout=_SECONDS)  # which waits for all that could still write
    assert output == ""
    psutil.wait_procs([process], timeout=_SECONDS)
    assert not process.is_running()


@pytest.mark.fault
def test_when_the_run_is_killed_its_steps_are_asked_to_stop(folder: Path) -> None:
    owner = """
        import subprocess, sys
        from pipelines.local.prefork import preforked_python
        with preforked_python() as python:
            subprocess.run(["sh", "-ec", f"exec {python} -m step"])
    """
    (folder / "owner.py").write_text(textwrap.dedent(owner))
    (folder / "step.py").write_text(textwrap.dedent(STOPS))
    with subprocess.Popen([sys.executable, "owner.py"], cwd=folder, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        int(run.stdout.readline())
        started = psutil.Process(run.pid).children(recursive=True)
        assert [process for process in started if "pipelines.local.prefork.server" in process.cmdline()]
        run.kill()
        assert run.stdout.read() == "saved\n"
        _, alive = psutil.wait_procs(started, timeout=_SECONDS)
    assert not alive


@pytest.mark.fault
def test_without_a_server_it_has_an_interpreter_of_its_own(python: str, folder: Path) -> None:
    nowhere = shlex.join([*shlex.split(python)[:-1], str(folder / "socket")])
    output, _ = start(nowhere, folder, TELLS, "argument").communicate(timeout=_SECONDS)
    told = json.loads(output)
    assert told["arguments"] == ["argument"] and not told["warm"]


def test_the_server_goes_with_the_block_and_leaves_nothing() -> None:
    before = psutil.Process().children(recursive=True)
    with preforked_python() as command:
        socket = Path(shlex.split(command)[-1])
    assert not socket.parent.exists()
    assert psutil.Process().children(recursive=True) == before


def test_the_interpreter_of_steps_is_sys_executable_for_a_block() -> None:
    before = sys.executable
    with pytest.raises(ZeroDivisionError), as_sys_executable("another"):
        assert sys.executable == "another"
        raise ZeroDivisionError
    assert sys.executable == before
