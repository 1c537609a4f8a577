"""Servers that are away at the moment when the work of hours is handed over to them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from components.foundation.errors import StoreUnavailableError, TrackingUnavailableError

_PATIENCE_SECONDS = 300.0
"""Other ranks, and what they cost, wait meanwhile; who runs the pipeline tries a stage that failed again."""

_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 1.0, 30.0

log = logging.getLogger("saferlhf")


def wait_out(act: Callable[[], None]) -> None:
    """Do what may be done twice; while S3 or MLflow does not answer, wait and do it again, for five minutes.

    Raises:
        StoreUnavailableError, TrackingUnavailableError: the server did not come back.
    """
    gives_up_at = time.monotonic() + _PATIENCE_SECONDS
    wait = _FIRST_WAIT_SECONDS
    while True:
        try:
            return act()
        except (StoreUnavailableError, TrackingUnavailableError) as error:
            if time.monotonic() + wait > gives_up_at:
                raise
            log.warning("%s; asks again in %.0f s", error, wait)
        time.sleep(wait)
        wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
