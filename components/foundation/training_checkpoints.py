"""Checkpoints within a training stage: killed at any step and started again, it ends with the same bits.

A checkpoint is a commit under `<stage>/checkpoints/step-<n>` with the trained adapters and heads, what their training
keeps (AdamW's moments), and a small record of the stage's own. Batches, learning rates and samples are functions of
seed and step (see `Stage.seed`), so the step is all there is to say of data position and random state. What is stored
does not depend on the number of ranks or on what ZeRO partitions: a stage may go on with more ranks, or fewer. Rank 0
writes.
Only the newest checkpoint is kept, and none once the stage has finished.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from components.foundation import distributed
from components.foundation.backbone import Backbone
from components.foundation.errors import (
    DivergenceError,
    IntegrityError,
    StoreError,
    StoreUnavailableError,
    TrainingError,
)
from components.foundation.exit_codes import PREEMPTED_EXIT_CODE
from components.foundation.results import read_record, to_json
from components.foundation.role_optimizer import TrainedRole
from components.foundation.run_context import Stage
from components.foundation.tensor_file import read_tensors
from components.foundation.untrusted import one_line

_TENSORS, _STATE = "state.safetensors", "state.json"

log = logging.getLogger("saferlhf")


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint holds besides tensors: optimiser steps that are done, and the stage's own record as JSON."""

    step: int = 0
    record: str = ""


class TrainingCheckpoints:
    """Saves and restores the roles that a stage trains.

    Used as a context: within it, SIGTERM (a spot node that is taken away) no longer ends the process at once; the step
    in progress ends, its state is saved, and the process exits with PREEMPTED_EXIT_CODE. A SIGTERM to one of several
    ranks stops all of them after the same step. To a DivergenceError it adds where the last checkpoint is, which stays
    as it is.

    Args:
        parents: the commits that the stage reads; a checkpoint made from others is refused.
        clock: seconds, for `checkpoint.every_minutes`.
    """

    def __init__(
        self,
        stage: Stage,
        backbone: Backbone,
        parents: Sequence[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stage = stage
        self._backbone = backbone
        self._parents = list(parents)
        self._clock = clock
        self._settings = stage.context.settings.checkpoint
        self._uri = stage.checkpoints_uri
        self._trained: Mapping[str, TrainedRole] = {}
        self._saved_at = clock()
        self._preempted = False
        self._outer_handler: Any = None

    def __enter__(self) -> Self:
        self._outer_handler = signal.signal(signal.SIGTERM, self._preempt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._outer_handler)
        if isinstance(error, DivergenceError):
            raise DivergenceError(f"{error}; {self._what_is_kept()}") from error

    def _what_is_kept(self) -> str:
        try:
            latest = self._stage.context.store.latest(self._uri)
        except StoreError as error:  # must not hide why training ended
            return f"the last checkpoint could not be looked up: {error}"
        return f"the last checkpoint is kept: {latest}" if latest else "no checkpoint had been saved yet"

    def restore(self, trained: Mapping[str, TrainedRole]) -> TrainingState:
        """Bring back the newest checkpoint, if there is one; `trained` are the stage's trained roles, by name.

        Raises:
            TrainingError: the checkpoint was made from other inputs or settings, or for other roles.
            IntegrityError: it is damaged.
        """
        self._trained = trained
        self._stage.gauges.set({"training_start_timestamp_seconds": time.time()})
        store = self._stage.context.store
        latest = distributed.from_main(self._latest)
        if latest is None:
            log.info("%s: there is no checkpoint; starts at its first step", self._stage.name)
            return TrainingState()
        self._check_origin(latest)
        folder = store.fetch(latest)
        state = read_record(TrainingState, folder / _STATE)
        self._load_tensors(folder / _TENSORS)
        log.info("%s: goes on after step %d", self._stage.name, state.step)
        return state

    def _latest(self) -> str | None:
        store = self._stage.context.store
        latest = store.latest(self._uri)
        store.prune(self._uri, keep=latest)  # what a killed attempt left half written
        return latest

    def after_step(self, step: int, total: int, record: Callable[[], str] = str) -> None:
        """To be called when `step` of `total` steps are done: saves when it is time.

        A store that is away for a while costs no training: the next checkpoint is tried when it is due.

        Raises:
            SystemExit: SIGTERM has come; the state is saved.
        """
        preempted, due = distributed.anywhere(self._preempted, step < total and self._is_due(step))
        if preempted or due:
            self._save(TrainingState(step, record()), may_fail=not preempted)
        if preempted:
            log.warning("%s: asked to stop; saved after step %d of %d", self._stage.name, step, total)
            raise SystemExit(PREEMPTED_EXIT_CODE)

    def _preempt(self, number: int, frame: FrameType | None) -> None:
        self._preempted = True

    def _is_due(self, step: int) -> bool:
        every_steps, every_minutes = self._settings.every_steps, self._settings.every_minutes
        by_steps = every_steps > 0 and step % every_steps == 0
        by_time = every_minutes > 0 and self._clock() - self._saved_at >= 60 * every_minutes
        return by_steps or by_time

    def _save(self, state: TrainingState, *, may_fail: bool) -> None:
        tensors = self._tensors()

        def commit() -> None:
            try:
                self._commit(state, tensors)
            except StoreUnavailableError as error:
                if not may_fail:
                    raise
                log.warning("%s: not saved after step %d, goes on: %s", self._stage.name, state.step, error)

        distributed.by_main(commit)
        self._saved_at = self._clock()

    def _commit(self, state: TrainingState, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        context = self._stage.context
        folder = self._stage.folder / "checkpoint"
        folder.mkdir(exist_ok=True)
        save_file(dict(tensors), folder / _TENSORS)
        (folder / _STATE).write_text(to_json(state), encoding="utf-8")
        uri = f"{self._uri}/step-{state.step}"
        context.store.commit(uri, folder, parents=self._parents, settings_digest=context.settings.digest())
        context.store.set_latest(self._uri, uri)
        self._stage.gauges.set({"checkpoint_timestamp_seconds": time.time()})
        context.store.prune(self._uri, keep=uri)

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and moments, whole; on ranks other than 0 without the parameters."""
        tensors = {}
        for role, training in self._trained.items():
            for name, parameter in self._backbone.role_state(role).items():
                tensors[f"{role}/parameters/{name}"] = parameter
            for key, moment in training.moments().items():
                tensors[f"{role}/optimizer/{key}"] = moment.detach().cpu().contiguous()
        return tensors

    def _load_tensors(self, path: Path) -> None:
        stored = read_tensors(path, torch.device("cpu"))  # what a device holds already leaves no room for it again
        for role, training in self._trained.items():
            self._load_role(role, training, stored)

    def _load_role(self, role: str, training: TrainedRole, stored: Mapping[str, Tensor]) -> None:
        own = self._backbone.role_shapes(role)
        saved = _below(stored, f"{role}/parameters/")
        if {name: t.shape for name, t in saved.items()} != own:
            raise TrainingError(
                f"the checkpoint under {self._uri} holds no {role!r} of this model's shape: it was made by another "
                "version or for another model; delete it, or start a new run"
            )
        try:
            training.load([saved[name] for name in own], _below(stored, f"{role}/optimizer/"))
        except (LookupError, ValueError, RuntimeError) as error:
            raise IntegrityError(
                f"the checkpoint under {self._uri} holds moments of {role!r} that do not fit its parameters "
                f"({one_line(error)}): delete it, or start a new run"
            ) from error

    def _check_origin(self, uri: str) -> None:
        context = self._stage.context
        manifest = context.store.manifest(uri)
        for what, then, now in (
            ("inputs", manifest.parents, self._parents),
            ("settings", manifest.settings_digest, context.settings.digest()),
        ):
            if then != now:
                raise TrainingError(
                    f"checkpoint {uri} was made from other {what} ({then}) than this attempt has ({now}): start a new "
                    "run, or delete the checkpoint to begin the stage anew"
                )


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
