"""Which run waits for people, so that the next run of a schedule goes on with it instead of asking them anew.

    <store>/waiting/<settings digest>    names the round that waits: runs/<run>/round-<k>/<stage>
    <store>/runs/<run>/GOES_ON_WITH      lies where a run.json would: names the run that this one has gone on with

The first name counts while its run is there and that round has not committed. So nobody has to take it away in time:
what no longer counts is replaced, with If-Match. Where several runs wait with the same settings, the first is named.
"""

from __future__ import annotations

import contextlib
import logging
import re

from components.foundation.checkpoint_store import CheckpointStore
from components.foundation.errors import ConflictError, IntegrityError, MissingError
from components.foundation.run_context import RUN_ID, RunContext, open_run, store_root, usual_uri
from components.foundation.settings import Settings
from components.foundation.untrusted import shown

_RUN = re.compile(rf"runs/{RUN_ID.pattern}\n")
_ROUND = re.compile(rf"runs/{RUN_ID.pattern}/round-[0-9]{{1,2}}/[a-z_]+\n")

log = logging.getLogger("saferlhf")


def remember_waiting(context: RunContext, stage: str, round_number: int) -> None:
    """Let the next run of the same settings go on with this one, unless it would with another that waits already.

    A run whose place was chosen by hand is left to whoever chose it.

    Raises:
        IntegrityError: what is stored is no name of ours.
    """
    if context.run_uri != usual_uri(context.settings, context.run_id):
        return
    store = CheckpointStore(context.settings.store.uri)
    uri = _waiting_uri(store, context.settings)
    name = context.stage_uri(stage, round_number).removeprefix(f"{store.root_uri}/")
    standing = _read(store, uri, _ROUND)
    with contextlib.suppress(ConflictError):  # another run was faster, and waits as well
        if standing is None:
            store.write_text(uri, f"{name}\n")
        elif not _counts(store, standing):
            store.replace_text(uri, f"{standing}\n", f"{name}\n")


def run_to_go_on_with(settings: Settings, own_uri: str) -> RunContext | None:
    """The run of these very settings that waits for people, or with which the run that asks has gone on before.

    Args:
        own_uri: where the run that asks lies, if it is one of its own.

    Returns:
        None where it is to be one of its own.

    Raises:
        IntegrityError: what is stored is no name of ours, or names a run of other settings.
    """
    if settings.annotate.annotator != "human":
        return None
    store = CheckpointStore(settings.store.uri)
    store.ensure_bucket()
    if _has_run(store, own_uri):
        return None
    before = _read(store, _note_uri(own_uri), _RUN)
    if before is not None and _has_run(store, f"{store.root_uri}/{before}"):
        run = open_run(f"{store.root_uri}/{before}")
        log.info("goes on with run %s, as before", run.run_id)
        return run
    uri = _waiting_uri(store, settings)
    waiting = _read(store, uri, _ROUND)
    if waiting is None or not _counts(store, waiting):
        return None
    run = open_run(_run_uri(store, waiting))
    if run.settings.digest() != settings.digest():
        raise IntegrityError(f"{uri} names run {run.run_id}, which has other settings: delete {uri}")
    log.info("goes on with run %s, which waits for people's labels", run.run_id)
    return run


def note_going_on(own_uri: str, run: RunContext) -> None:
    """Leave word where a run would lie that it has gone on with another."""
    run.store.write_text(_note_uri(own_uri), f"runs/{run.run_id}\n", overwrite=True)


def gone_on_with(run_uri: str) -> str:
    """URI of the run that the one at `run_uri` has gone on with: usually its own.

    Raises:
        IntegrityError: what is stored is no name of ours.
    """
    store = CheckpointStore(store_root(run_uri) or run_uri)
    if _has_run(store, run_uri):
        return run_uri
    other = _read(store, _note_uri(run_uri), _RUN)
    return f"{store.root_uri}/{other}" if other else run_uri


def _waiting_uri(store: CheckpointStore, settings: Settings) -> str:
    return f"{store.root_uri}/waiting/{settings.digest()}"


def _note_uri(run_uri: str) -> str:
    return f"{run_uri}/GOES_ON_WITH"


def _read(store: CheckpointStore, uri: str, form: re.Pattern[str]) -> str | None:
    """What a small object names below the store's root; None where there is none."""
    try:
        text = store.read_text(uri)
    except MissingError:
        return None
    if not form.fullmatch(text):
        raise IntegrityError(f"{uri} names {shown(text)}, which no run of ours has: refused; delete {uri}")
    return text.removesuffix("\n")


def _run_uri(store: CheckpointStore, waiting: str) -> str:
    return f"{store.root_uri}/{waiting.partition('/round-')[0]}"


def _has_run(store: CheckpointStore, run_uri: str) -> bool:
    return store.has_text(f"{run_uri}/run.json")


def _counts(store: CheckpointStore, waiting: str) -> bool:
    """Whether the run is there and its round still waits."""
    return _has_run(store, _run_uri(store, waiting)) and store.latest(f"{store.root_uri}/{waiting}") is None
