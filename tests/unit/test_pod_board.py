"""What is known of pods that are gone before their job's end was seen, or of which old news comes late."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from components.foundation.train_job.pods import PodBoard

_UNLIKELY_SECONDS = 600.0


RUNNING = {"running": {}}


def terminated(exit_code: int) -> dict[str, Any]:
    return {"terminated": {"exitCode": exit_code}}


def pod(uid: str, state: dict[str, Any], restarts: int = 0, **before: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": f"pod-{uid}", "uid": uid, "creationTimestamp": "2026-11-24T10:00:00Z"},
        "status": {"containerStatuses": [{"name": "node", "restartCount": restarts, "state": state, **before}]},
    }


def start_to_wait(board: PodBoard, *present: str) -> threading.Thread:
    """A thread that waits for the end of all pods but those present; a test that fails does not wait for it."""
    waiter = threading.Thread(target=board.wait_for_ends_except, args=(present, _UNLIKELY_SECONDS), daemon=True)
    waiter.start()
    return waiter


def has_ended(waiter: threading.Thread) -> bool:
    waiter.join(30)
    return not waiter.is_alive()


def test_the_board_waits_for_the_end_of_a_pod_that_is_gone() -> None:
    board = PodBoard()
    board.update([pod("a", RUNNING)])
    waiter = start_to_wait(board)
    waiter.join(0.05)
    assert waiter.is_alive()
    board.update([pod("a", terminated(139))])
    assert has_ended(waiter)
    assert [state.exit_code for state in board.all()] == [139]


def test_the_board_does_not_wait_for_pods_that_are_there_nor_once_it_is_closed() -> None:
    board = PodBoard()
    board.update([pod("a", RUNNING)])
    assert has_ended(start_to_wait(board, "a"))
    waiter = start_to_wait(board)
    waiter.join(0.05)
    assert waiter.is_alive()
    board.close()
    assert has_ended(waiter)
    assert has_ended(start_to_wait(board))


@pytest.mark.parametrize(
    ("newer", "older"),
    [
        pytest.param(pod("a", terminated(1)), pod("a", RUNNING), id="ended, then said to run"),
        pytest.param(pod("a", terminated(1)), pod("a", {"waiting": {}}), id="ended, then said to wait"),
        pytest.param(
            pod("a", RUNNING, restarts=1, lastState=terminated(1)), pod("a", terminated(1)), id="restarted, then ended"
        ),
    ],
)
def test_old_news_of_a_pod_does_not_undo_what_is_known(newer: dict[str, Any], older: dict[str, Any]) -> None:
    """A list tells the newest at once, and the watch beside it may still be on its way there."""
    board = PodBoard()
    board.update([newer])
    known = board.all()
    board.update([older])
    assert board.all() == known
    board.update([pod("a", terminated(2), restarts=1)])
    assert [state.exit_code for state in board.all()] == [2]
