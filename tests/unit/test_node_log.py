"""Where a container's log has been read to, as Kubernetes sends it."""

from __future__ import annotations

import pytest

from components.foundation.train_job.node_log import LogPosition


@pytest.mark.fault
def test_a_line_without_a_time_is_told_and_moves_nothing() -> None:
    """The kubelet's own word when it cannot follow a file any more; the next request goes on from a real time."""
    position = LogPosition()
    lines = ["2026-11-29T01:02:03.5Z step 1", "failed to create fsnotify watcher: too many open files"]
    assert list(position.new(lines)) == ["step 1", lines[1]]
    assert position.since == "2026-11-29T01:02:03.5Z"
    again = ["2026-11-29T01:02:03.5Z step 1", "2026-11-29T01:02:04Z step 2"]
    assert list(position.new(again)) == ["step 2"]
