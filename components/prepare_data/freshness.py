"""Is there new preference data since the champion's? Scheduled runs that have too little of it end here."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from components.foundation.champion_log import POLICY_MODEL, ChampionLog, champion_version
from components.foundation.errors import IntegrityError, NothingNew
from components.foundation.exit_codes import NOTHING_NEW, NOTHING_NEW_LINE
from components.foundation.lineage import ancestors
from components.foundation.preference import TRAINING_FILE, VALIDATION_FILE, DualPreference, read_jsonl
from components.foundation.run_context import RunContext, Stage

log = logging.getLogger("saferlhf")


@dataclass(frozen=True)
class Freshness:
    """Distinct preference pairs of a run, and how many of them are not among another run's."""

    pairs: int
    new: int


def count_new(ours: Iterable[DualPreference], theirs: Iterable[DualPreference]) -> Freshness:
    """Count by content: prompt, answers and labels. The same pair with another label is new."""
    own = {_content(pair) for pair in ours}
    return Freshness(pairs=len(own), new=len(own - {_content(pair) for pair in theirs}))


def needed(min_new_pairs: int, min_new_share: float, pairs: int) -> int:
    """How many of so many pairs have to be new for both limits to hold."""
    return max(min_new_pairs, math.ceil(min_new_share * pairs - 1e-9))  # 0.1 * 30 is a little more than 3


def check_freshness(stage: Stage) -> None:
    """The gate: compare the pairs in the stage's folder with those that the champion was made from.

    Without a limit, or without a champion, every run goes on.

    Raises:
        NothingNew: too few pairs are new. The run is closed in MLflow, as finished.
        IntegrityError: the champion cannot be traced to its data.
    """
    context, settings = stage.context, stage.context.settings.data
    if not settings.min_new_pairs and not settings.min_new_share:
        return
    champion = champion_version(context.tracker, ChampionLog(context.store, POLICY_MODEL).latest())
    if not champion:
        log.info("there is no champion: all preference pairs are new")
        return
    found = count_new(_pairs(stage.folder), _pairs(context.store.fetch(_data_of(context, champion))))
    stage.mlflow.log_metrics({"data/pairs": float(found.pairs), "data/new_pairs": float(found.new)}, step=0)
    least = needed(settings.min_new_pairs, settings.min_new_share, found.pairs)
    words = f"{found.new} new preference pairs since champion v{champion} (needs {least})"
    if found.new < least:
        context.tracker.finish_pipeline_run(context.mlflow_run_id, "FINISHED", ended=NOTHING_NEW)
        raise NothingNew(f"{NOTHING_NEW_LINE}{words}: the run ends here")
    log.info("%s", words)


def _data_of(context: RunContext, version: str) -> str:
    """URI of the prepared data that a registered policy was made from."""
    source = context.tracker.version_tags(POLICY_MODEL, version)["source"]
    for ancestor in ancestors(context.store, source.removesuffix("/model")):
        if ancestor.manifest.labels.get("stage") == "prepare_data":
            return ancestor.manifest.uri
    raise IntegrityError(
        f"{POLICY_MODEL} version {version} is champion, but {source} was made from no prepared data: set "
        "data.min_new_pairs=0 and data.min_new_share=0 to run without comparing"
    )


def _pairs(folder: Path) -> Iterator[DualPreference]:
    for name in (TRAINING_FILE, VALIDATION_FILE):
        yield from read_jsonl(folder / name, DualPreference)


def _content(pair: DualPreference) -> str:
    return hashlib.sha256(json.dumps(asdict(pair), sort_keys=True).encode()).hexdigest()
