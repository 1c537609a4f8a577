"""What is known of pods that are gone before their job's end was seen."""

from __future__ import annotations

import threading
from typing import Any

from components.foundation.train_job.pods import PodBoard

_UNLIKELY_SECONDS = 600


def pod(uid: str, state: dict[str, Any]) -> dict[str, Any]:
    return {
        "metadata": {"name": f"pod-{uid}", "uid": uid, "creationTimestamp": "2026-11-24T10:00:00Z"},
        "status": {"containerStatuses": [{"name": "node", "state": state}]},
    }


def test_the_board_waits_for_the_end_of_a_pod_that_is_gone() -> None:
    board = PodBoard()
    board.update([pod("a", {"running": {}})])
    waiter = threading.Thread(target=board.wait_for_ends_except, args=(set(), _UNLIKELY_SECONDS))
    waiter.start()
    waiter.join(0.05)
    assert waiter.is_alive()
    board.update([pod("a", {"terminated": {"exitCode": 139}})])
    waiter.join(_UNLIKELY_SECONDS)
    assert [state.exit_code for state in board.all()] == [139]


def test_the_board_does_not_wait_for_pods_that_are_there_nor_once_it_is_closed() -> None:
    board = PodBoard()
    board.update([pod("a", {"running": {}})])
    board.wait_for_ends_except({"a"}, _UNLIKELY_SECONDS)
    board.close()
    board.wait_for_ends_except(set(), _UNLIKELY_SECONDS)
