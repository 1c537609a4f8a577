"""The first step of a run: everything that can be refused is refused here, before anything long starts."""

from __future__ import annotations

import json
import logging

from components.foundation.errors import SettingsError
from components.foundation.progress import configure_logging
from components.foundation.run_context import create_run
from components.foundation.settings import resolve_settings

log = logging.getLogger("saferlhf")


def run_start_run(run_uri: str, run_id: str, profile: str, seed: int, overrides: str, rounds: int) -> str:
    """Stage: settings -> the run's URI; the run's description is stored there.

    Args:
        overrides: JSON list of `key=value` strings.
        rounds: how many the pipeline was built with.

    Raises:
        SettingsError: a setting is refused, or asks for another number of rounds than the pipeline has.
    """
    configure_logging()
    settings = resolve_settings(profile, seed, [f"rounds={rounds}", *json.loads(overrides)])
    if settings.rounds != rounds:
        raise SettingsError(
            f"rounds={settings.rounds} is asked of a pipeline that was compiled with {rounds}: compile it anew"
        )
    create_run(run_uri, run_id, settings)
    log.info("run %s, settings %s", run_id, settings.digest()[:12])
    return run_uri
