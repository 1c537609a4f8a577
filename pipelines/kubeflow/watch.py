"""Follows a run on a cluster: a line for each change of a step's state, until the run has ended."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

from components.foundation.errors import ClusterError, ClusterUnavailableError
from pipelines.kubeflow.client import KubeflowClient, equals, pages

SUCCEEDED = "SUCCEEDED"
ENDED = (SUCCEEDED, "SKIPPED", "FAILED", "CANCELED")
PATIENCE = 30
"""Polls in a row without an answer, after which a run is given up."""


def watch(client: KubeflowClient, run_id: str, say: Callable[[str], None], pause: Callable[[], None]) -> str:
    """Follow a run to its end and return its state, such as SUCCEEDED.

    Args:
        say: gets one line for each change.
        pause: waits between two looks.

    Raises:
        ClusterError: the run is not there, the token is refused, or the server was silent for `PATIENCE` looks; the
            run itself goes on.
    """
    steps = _Steps()
    silent = 0
    while True:
        run = None
        try:
            with client.explained(f"look at run {run_id}"):
                run = client.get_run(run_id)
        except ClusterUnavailableError as error:
            silent += 1
            if silent == 1:
                say(f"no news, asking again: {error}")
            if silent == PATIENCE:
                raise ClusterError(f"run {run_id} goes on, and cannot be watched: {error}") from None
        if run is not None:
            silent = 0
            for line in steps.changes(run):
                say(line)
            if run.state in ENDED:
                return str(run.state)
        pause()


def runs_in_flight(client: KubeflowClient, recurring_run_id: str) -> list[str]:
    """Runs of a recurring run that have not ended, each as `id (STATE)`."""
    with client.explained("list the runs of a schedule"):
        runs = pages(
            client.list_runs, "runs", namespace=client.namespace, filter=equals(recurring_run_id=recurring_run_id)
        )
        return [f"{run.run_id} ({run.state})" for run in runs if run.state not in ENDED]


class _Steps:
    """What was said of each step. KFP lists Argo's nodes, of which the steps are some."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._used: Counter[str] = Counter()
        self._states: dict[str, str] = {}

    def changes(self, run: Any) -> list[str]:
        """Lines for what is new in this look."""
        tasks = [task for task in (run.run_details.task_details if run.run_details else None) or () if _is_step(task)]
        lines = []
        for task in sorted(tasks, key=lambda task: (str(task.start_time), task.display_name)):
            lines += self._change(self._name(task), task.state, task.error)
        return lines + self._change("run", run.state, run.error)

    def _change(self, name: str, state: str | None, error: Any) -> list[str]:
        if state in (None, self._states.get(name)):
            return []
        self._states[name] = str(state)
        reason = ""
        with contextlib.suppress(AttributeError):
            reason = f": {' '.join(error.message.split())}"
        return [f"{name} {state}{reason}"]

    def _name(self, task: Any) -> str:
        """`collect`, and in later rounds `collect #2`: KFP does not say which round a node belongs to."""
        if task.pod_name not in self._names:
            self._used[task.display_name] += 1
            number = self._used[task.display_name]
            self._names[task.pod_name] = f"{task.display_name} #{number}" if number > 1 else task.display_name
        return self._names[task.pod_name]


def _is_step(task: Any) -> bool:
    """Not the workflow itself, nor KFP's drivers and the containers below a step, nor a branch of the pipeline."""
    name = task.display_name or ""
    return (
        name not in ("", "root", task.pod_name)
        and not name.endswith("-driver")
        and not name.startswith(("executor", "condition-"))
    )
