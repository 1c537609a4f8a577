"""Who has been champion: a log in the store. MLflow's aliases are a copy of its last entry.

    <store>/registry/<model>/000001.json   ChampionEntry, written once, with If-None-Match
    <store>/registry/<model>/000002.json

Two promotions that have read the same last entry race for the number after it. One wins; the other reads again and
decides again, against the new champion. There is no lock, so none can expire while its holder sleeps.
"""

from __future__ import annotations

from dataclasses import dataclass

from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import ConflictError, IntegrityError
from components.foundation.results import from_json, to_json
from components.foundation.tracking import Tracker

POLICY_MODEL = "saferlhf-policy"
CHAMPION = "champion"


@dataclass(frozen=True)
class ChampionEntry:
    """A version became champion.

    Attributes:
        number: 1 for the first entry.
        version: of the registered policy.
        previous: version that was champion until then; empty where there was none.
        action: promote or rollback.
        reasons: the gate's checks, or why somebody rolled back.
        run_id: pipeline run that trained the version.
        time: ISO 8601, UTC.
    """

    number: int
    version: str
    previous: str
    action: str
    reasons: list[str]
    run_id: str
    time: str


class ChampionLog:
    """The log of one registered model below a store's root."""

    def __init__(self, store: CheckpointStore, model: str) -> None:
        self._store = store
        self._folder = f"{store.root_uri}/registry/{model}"

    def entries(self) -> list[ChampionEntry]:
        """All entries, oldest first.

        Raises:
            IntegrityError: an entry is malformed, or one is missing between two others.
        """
        uris = self._store.list(f"{self._folder}/")
        if uris != [self._uri(number) for number in range(1, len(uris) + 1)]:
            raise IntegrityError(f"{self._folder} does not hold entries 1 to {len(uris)}: it was changed by hand")
        return [from_json(ChampionEntry, self._store.read_text(uri)) for uri in uris]

    def latest(self) -> ChampionEntry | None:
        """The champion's entry; None before the first promotion."""
        uris = self._store.list(f"{self._folder}/")
        return from_json(ChampionEntry, self._store.read_text(uris[-1])) if uris else None

    def append(self, entry: ChampionEntry) -> None:
        """Add the entry that follows the last one.

        Raises:
            ConflictError: there is an entry of that number already, another one.
        """
        uri = self._uri(entry.number)
        try:
            self._store.write_text(uri, to_json(entry))
        except ConflictError:  # or our own write had arrived, its answer was lost, and the client wrote again
            if from_json(ChampionEntry, self._store.read_text(uri)) != entry:
                raise

    def _uri(self, number: int) -> str:
        return f"{self._folder}/{number:06d}.json"


def champion_version(tracker: Tracker, last: ChampionEntry | None) -> str:
    """The champion's version: of the log, or of the alias where the log is empty; '' where there is none."""
    return last.version if last is not None else tracker.aliases(POLICY_MODEL).get(CHAMPION, "")
