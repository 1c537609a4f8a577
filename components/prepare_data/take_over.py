"""Start a run from an earlier one: what lies before a round is taken over, the rest runs anew.

Nothing is copied. The new run's stages get LATEST pointers to the earlier run's commits, so they are finished, and what
is trained on them names them as its parents.
"""

from __future__ import annotations

import logging

from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import SettingsError
from components.foundation.run_context import ROUND_STAGES, RunContext, open_earlier_run, store_root
from components.foundation.settings import Settings

_FIRST_STAGES = ("prepare_data", "sft", "evaluate")
_MUST_AGREE = (
    *("seed", "base_model", "dtype", "finetune", "data.", "lora.", "sft.", "evaluate.", "ppo.max_prompt_tokens"),
    *("annotate.annotator", "annotate.judge_model", "gate.regressions"),
)
"""What made the data (the regression suite is part of it), the SFT model and its evaluation, by which every round is
measured."""
_MAY_DIFFER = ("data.min_new_", "evaluate.scored_prompts")
"""No model scores the SFT model's own evaluation."""

log = logging.getLogger("saferlhf")


def commits_to_take_over(run_uri: str, settings: Settings) -> dict[tuple[str, int], str]:
    """(stage, round) -> URI of the earlier run's commit; empty where the run starts from nothing.

    Raises:
        SettingsError: there is no such run, it has not finished what is to be taken over, or that was made with other
            settings.
    """
    start = settings.start
    if not start.from_run:
        return {}
    store_uri = store_root(run_uri)
    earlier_uri = f"{store_uri}/runs/{start.from_run}"
    if earlier_uri == run_uri:
        raise SettingsError(f"start.from_run={start.from_run} is the run itself: give the new run another id")
    earlier = _open_earlier(store_uri, start.from_run)
    _check_agreement(earlier, settings)
    stages = [(name, 0) for name in _FIRST_STAGES]
    stages += [(name, number) for number in range(1, start.from_round) for name in ROUND_STAGES]
    found = {(name, number): earlier.store.latest(earlier.stage_uri(name, number)) for name, number in stages}
    missing = [f"round-{number}/{name}" for (name, number), uri in found.items() if uri is None]
    if missing:
        raise SettingsError(
            f"start.from_round={start.from_round} needs what run {start.from_run} has not finished: "
            f"{', '.join(missing)}; finish it with --resume, or start from an earlier round"
        )
    return {stage: uri for stage, uri in found.items() if uri is not None}


def take_over(context: RunContext, commits: dict[tuple[str, int], str]) -> None:
    """Let the run's stages be finished by those commits; doing it again changes nothing.

    A stage that has a commit keeps it: where one that was taken over is damaged, the stage runs again in this run.
    """
    for (name, number), uri in commits.items():
        stage_uri = context.stage_uri(name, number)
        if context.store.latest(stage_uri) is None:
            context.store.adopt(stage_uri, uri)
    if commits:
        start = context.settings.start
        log.info("%d finished stages are taken over from run %s", len(commits), start.from_run)


def _open_earlier(store_uri: str, run_id: str) -> RunContext:
    uri = f"{store_uri}/runs/{run_id}"
    if not CheckpointStore(store_uri).has_text(f"{uri}/run.json"):
        raise SettingsError(f"start.from_run={run_id} is refused: there is no run {uri}")
    return open_earlier_run(uri)


def _check_agreement(earlier: RunContext, settings: Settings) -> None:
    """The settings of data, SFT and evaluation agree; those of the rounds may differ from here on."""
    differing = [
        difference
        for key, difference in settings.differences(earlier.settings).items()
        if key.startswith(_MUST_AGREE) and not key.startswith(_MAY_DIFFER)
    ]
    if differing:
        raise SettingsError(
            f"run {earlier.run_id} cannot be taken over from, for it was made with other settings: "
            f"{', '.join(differing)}; give the new run the same, or start one from nothing"
        )
