"""Where a round's batch, its labels and their result lie in the store.

    <round>/annotate/human/LATEST                  names the batch
    <round>/annotate/human/batch-<digest>/         commit: items.jsonl (the key) and what annotators see
    <round>/annotate/human/labels/000001.jsonl     labels of one import, written once, with If-None-Match
    <round>/annotate/human/result.json, result.md  agreement, annotators and counts as of the last import

A batch is written once and stands, as people may be at work on it. Two imports that have read the same labels race for
the next number; the loser reads again and is checked again.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from components.annotate.human.batch import Item
from components.annotate.human.formats import write_formats
from components.annotate.human.label_parsing import Label
from components.annotate.human.results import LabelResult, result_table
from components.foundation.errors import ConflictError, IntegrityError
from components.foundation.results import from_json, read_records, to_json, write_records
from components.foundation.run_context import RunContext

_STAGE = "annotate"
_KEY = "items.jsonl"


class BatchStore:
    """The batch of one round of a run."""

    def __init__(self, context: RunContext, round_number: int) -> None:
        self._context = context
        self._store = context.store
        self._uri = f"{context.stage_uri(_STAGE, round_number)}/human"
        self.round = round_number

    def batch_uri(self) -> str | None:
        """Where the batch is; None before the stage has made it."""
        return self._store.latest(self._uri)

    def publish(self, items: Sequence[Item], parents: Sequence[str]) -> str:
        """Commit a batch under its own digest, and return its URI; the same items again change nothing.

        Raises:
            ConflictError: another attempt published other items at the same moment.
        """
        with tempfile.TemporaryDirectory(prefix="saferlhf-batch-") as name:
            folder = Path(name)
            write_records(folder / _KEY, items)
            write_formats(folder, items)
            uri = f"{self._uri}/batch-{_digest(folder)}"
            labels = {"stage": _STAGE, "round": str(self.round), "run_id": self._context.run_id}
            settings_digest = self._context.settings.digest()
            self._store.commit(uri, folder, parents=parents, labels=labels, settings_digest=settings_digest)
        self._store.set_latest(self._uri, uri)
        return uri

    def folder(self) -> Path:
        """The batch's files, here.

        Raises:
            IntegrityError: there is no batch.
        """
        uri = self.batch_uri()
        if uri is None:
            raise IntegrityError(f"{self._uri} holds no batch: the run has not come to it")
        return self._store.fetch(uri)

    def items(self) -> list[Item]:
        """All that is known of the batch's items, in the order in which they are shown."""
        return read_records(Item, self.folder() / _KEY)

    def imports(self) -> list[list[Label]]:
        """The labels of each import, oldest first.

        Raises:
            IntegrityError: an import is malformed, or one is missing between two others.
        """
        uris = self._store.list(f"{self._uri}/labels/")
        if uris != [self._labels_uri(number) for number in range(1, len(uris) + 1)]:
            raise IntegrityError(f"{self._uri}/labels does not hold imports 1 to {len(uris)}: it was changed by hand")
        return [[from_json(Label, line) for line in self._store.read_text(uri).splitlines()] for uri in uris]

    def labels(self) -> list[Label]:
        """All labels so far."""
        return [label for labels in self.imports() for label in labels]

    def append(self, number: int, labels: Sequence[Label]) -> bool:
        """Write import `number`; False where another import got that number first."""
        lines = "".join(json.dumps(asdict(label)) + "\n" for label in labels)
        try:
            self._store.write_text(self._labels_uri(number), lines)
        except ConflictError:
            return False
        return True

    def has_preferences(self) -> bool:
        """Whether the stage has taken the labels over already: more would have no effect."""
        return self._store.latest(self._context.stage_uri(_STAGE, self.round)) is not None

    def write_result(self, result: LabelResult) -> None:
        """Keep the figures beside the batch."""
        self._store.write_text(f"{self._uri}/result.json", to_json(result), overwrite=True)
        self._store.write_text(f"{self._uri}/result.md", result_table(result), overwrite=True)

    def _labels_uri(self, number: int) -> str:
        return f"{self._uri}/labels/{number:06d}.jsonl"


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]
