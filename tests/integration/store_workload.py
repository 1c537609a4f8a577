"""Mixed operations on a store, and a record of what must lie there afterwards.

A write that ended in an error may have happened or not, but nothing else: so the record holds, for each name, the set
of values that are possible, None standing for nothing. A read must find one of them, and then it is the only one.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import ConflictError, IntegrityError, MissingError, StoreError

Value = str | tuple[tuple[str, str], ...] | None
"""A text, or the (path, SHA-256) of a commit's files."""

_BIG_BYTES = 11 << 20
_BIG_SHARE = 0.02


class Record:
    """What may lie in a store."""

    def __init__(self) -> None:
        self.values: dict[str, set[Value]] = {}
        self.outcomes: Counter[str] = Counter()

    def possible(self, name: str) -> set[Value]:
        return self.values.get(name, {None})

    def write(self, name: str, value: Value, write: Callable[[], object], *, once: bool = False) -> None:
        """With `once`, a conflict is right where something stands there, and nothing else is."""
        before = self.possible(name)
        self.values[name] = before | {value}
        with self.counted():
            try:
                write()
            except ConflictError:
                assert once and before != {None}, f"a conflict with nobody about {name}"
                self.values[name] = before
                raise
            assert not once or None in before, f"{name} was overwritten"
            self.values[name] = {value}

    def read(self, name: str, read: Callable[[], Value]) -> None:
        with self.counted():
            value = read()
            assert value in self.possible(name), f"{name} is {value}, which nobody has written"
            self.values[name] = {value}

    def delete(self, names: list[str], delete: Callable[[], object]) -> None:
        self.values |= {name: self.possible(name) | {None} for name in names}
        with self.counted():
            delete()
            self.values |= {name: {None} for name in names}

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """The block may end in an error of ours, but not in one that says that something is lost or damaged."""
        try:
            yield
        except ConflictError:
            self.outcomes["conflict"] += 1
        except StoreError as error:
            assert not isinstance(error, IntegrityError), error
            self.outcomes["error"] += 1
        else:
            self.outcomes["success"] += 1


def text_at(store: CheckpointStore, uri: str) -> Value:
    try:
        return store.read_text(uri)
    except MissingError:
        return None


def files_at(store: CheckpointStore, uri: str) -> Value:
    """Digests of a commit's files, as they arrive here."""
    return digests(store.fetch(uri)) if store.exists(uri) else None


def digests(folder: Path) -> tuple[tuple[str, str], ...]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple((path.relative_to(folder).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files)


class Worker:
    """One client, with a stage and texts of its own, and with the others a log that each may append to.

    Args:
        folder: of its own, for what it commits and fetches.

    Attributes:
        record: of its stage, whose value is LATEST, of its steps and its texts.
        claimed: entries of the log that this worker was told are there.
        denied: entries of which it was told that they are not.
    """

    def __init__(self, number: int, seed: int, root: str, environment: Mapping[str, str], folder: Path) -> None:
        self._chance = random.Random(f"{seed} {number}")
        self._number, self._folder = number, folder
        self._store = CheckpointStore(root, cache_dir=folder / "cache", environment=environment)
        self._stage, self._texts, self._log = f"{root}/stage-{number}", f"{root}/texts-{number}/", f"{root}/log/"
        self._steps: dict[str, Path] = {}
        """The folders of the steps that were not pruned."""
        self._step_numbers = itertools.count()
        self.record = Record()
        self.claimed: set[str] = set()
        self.denied: set[str] = set()

    def work(self, operations: int) -> None:
        weights = {
            self._commit: 16,
            self._commit_again: 4,
            self._fetch: 16,
            self._move_latest: 10,
            self._read_latest: 12,
            self._write_once: 10,
            self._overwrite: 10,
            self._read_text: 10,
            self._list: 4,
            self._append: 7,
            self._prune: 1,
        }
        for operation in self._chance.choices(list(weights), list(weights.values()), k=operations):
            operation()

    def check(self, store: CheckpointStore) -> None:
        """Compare all that may be there with what a store without faults gives."""
        errors = self.record.outcomes["error"]
        for name in sorted({*self.record.values, self._stage}):
            self.record.read(name, lambda name=name: self._value(store, name))  # type: ignore[misc]
        assert self.record.outcomes["error"] == errors

    def _value(self, store: CheckpointStore, name: str) -> Value:
        if name == self._stage:
            return store.latest(name)
        return text_at(store, name) if name.startswith(self._texts) else files_at(store, name)

    def _commit(self) -> None:
        number = next(self._step_numbers)
        uri, folder = f"{self._stage}/step-{number}", self._folder / f"step-{number}"
        (folder / "tokenizer").mkdir(parents=True)
        size = _BIG_BYTES if self._chance.random() < _BIG_SHARE else self._chance.randrange(5000)
        (folder / "weights").write_bytes(self._chance.randbytes(size))
        (folder / "tokenizer" / "vocab.json").write_bytes(self._chance.randbytes(self._chance.choice((0, 10, 300))))
        self._steps[uri] = folder
        self.record.write(uri, digests(folder), lambda: self._store.commit(uri, folder))

    def _commit_again(self) -> None:
        if uri := self._some_step():
            folder = self._steps[uri]
            self.record.write(uri, digests(folder), lambda: self._store.commit(uri, folder))

    def _fetch(self) -> None:
        if uri := self._some_step():
            self.record.read(uri, lambda: files_at(self._store, uri))

    def _move_latest(self) -> None:
        uri = self._some_step()
        if uri and None not in self.record.possible(uri):
            self.record.write(self._stage, uri, lambda: self._store.set_latest(self._stage, uri))

    def _read_latest(self) -> None:
        self.record.read(self._stage, lambda: self._store.latest(self._stage))

    def _write_once(self) -> None:
        uri = f"{self._texts}once-{self._chance.randrange(200)}"
        text = f"é {self._chance.random()}"
        self.record.write(uri, text, lambda: self._store.write_text(uri, text), once=True)

    def _overwrite(self) -> None:
        uri, text = f"{self._texts}over-{self._chance.randrange(10)}", f"{self._chance.random()}" * 50
        self.record.write(uri, text, lambda: self._store.write_text(uri, text, overwrite=True))

    def _read_text(self) -> None:
        uri = self._chance.choice([*self._known_texts(), f"{self._texts}never"])
        self.record.read(uri, lambda: text_at(self._store, uri))

    def _list(self) -> None:
        certain = {uri for uri in self._known_texts() if None not in self.record.possible(uri)}
        possible = {uri for uri in self._known_texts() if self.record.possible(uri) != {None}}
        with self.record.counted():
            assert certain <= set(self._store.list(self._texts)) <= possible

    def _append(self) -> None:
        """As a promotion does: the number after the last entry, if nobody is faster."""
        entry = f"{self._number} {self._chance.random()}"
        with self.record.counted():
            uri = f"{self._log}{len(self._store.list(self._log)) + 1:06d}"
            try:
                self._store.write_text(uri, entry)
            except ConflictError:
                self.denied.add(entry)
                raise
            self.claimed.add(entry)

    def _prune(self) -> None:
        kept = self.record.possible(self._stage)
        if len(kept) > 1:  # a move of LATEST ended in an error, and nobody has looked since
            return
        (keep,) = kept
        assert keep is None or isinstance(keep, str)
        doomed = [uri for uri in self._steps if uri != keep]
        self.record.delete(doomed, lambda: self._store.prune(self._stage, keep=keep))
        for uri in doomed:
            if self.record.possible(uri) == {None}:
                shutil.rmtree(self._steps.pop(uri))

    def _known_texts(self) -> list[str]:
        return [name for name in self.record.values if name.startswith(self._texts)]

    def _some_step(self) -> str | None:
        return self._chance.choice(list(self._steps)) if self._steps else None
