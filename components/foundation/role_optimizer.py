"""One optimiser step of one role, the same to a trainer on one rank and on many.

Every rank calls `backward` with its part of the batch's loss, then `step`; the parts of all ranks add up to the loss of
the whole batch. What is partitioned over the ranks, and how, is the optimiser's own matter.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from components.foundation import distributed
from components.foundation.backbone import Backbone
from components.foundation.errors import DivergenceError
from components.foundation.optimization import adamw
from components.foundation.results import from_json, to_json

MAX_SKIPPED_UPDATES = 3
"""So many updates in a row may be skipped because they are not finite; one more stops training."""

_MOMENTS = ("exp_avg", "exp_avg_sq")

log = logging.getLogger("saferlhf")


class TrainedRole(Protocol):
    """How a role learns: what a checkpoint keeps of it, besides the role's parameters."""

    def moments(self) -> dict[str, Tensor]:
        """What was learned about the way so far, whole; empty before the first step.

        All ranks call; what others than rank 0 get need not be complete.
        """

    def load(self, parameters: Sequence[Tensor], moments: Mapping[str, Tensor]) -> None:
        """Bring back the role's parameters, in their order, and what `moments` returned. All ranks call.

        Raises:
            LookupError, ValueError, RuntimeError: the moments are other ones.
        """


class RoleOptimizer(TrainedRole, Protocol):
    """AdamW on the parameters of one role; its moments are AdamW's state as `<number of the parameter>/<name>`."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's part of the loss; any number of times before `step`."""

    def step(self, max_gradient_norm: float, loss: float) -> float:
        """Sum gradients over ranks, clip, step, clear; returns the norm of the whole gradient before clipping.

        Where the loss of the whole batch or the norm is not finite, parameters and moments stay as they are.

        Raises:
            DivergenceError: they could not be left as they are.
        """

    def set_learning_rate(self, learning_rate: float) -> None: ...


def make_optimizers(backbone: Backbone, learning_rates: Mapping[str, float]) -> dict[str, RoleOptimizer]:
    """Role -> its optimiser, for all roles that a stage trains. All roles are in place; the others stay frozen."""
    stage = distributed.world().zero_stage
    optimizers: dict[str, RoleOptimizer] = {}
    if stage == 0:
        for role, rate in learning_rates.items():
            optimizers[role] = WholeOptimizer(backbone.trainable_parameters(role), rate)
        return optimizers
    from components.foundation.zero import ZeroOptimizer

    frozen = backbone.partition_frozen(learning_rates) if stage == 3 else []
    for role, rate in learning_rates.items():
        parameters = backbone.trainable_parameters(role)
        if stage == 3 and backbone.is_full_copy(role):
            module: nn.Module = backbone.trained_module(role)
            optimizers[role] = ZeroOptimizer(module, adamw(parameters, rate), 3, frozen)
        else:
            module = nn.ParameterList(parameters)
            optimizers[role] = ZeroOptimizer(module, adamw(parameters, rate), min(stage, 2), frozen)
    return optimizers


class WholeOptimizer:
    """AdamW that every rank holds whole; see `RoleOptimizer`."""

    def __init__(self, parameters: Sequence[nn.Parameter], learning_rate: float) -> None:
        self._parameters = list(parameters)
        self._adamw = adamw(self._parameters, learning_rate)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, max_gradient_norm: float, loss: float) -> float:
        for parameter in self._parameters if distributed.world().size > 1 else ():
            assert parameter.grad is not None
            parameter.grad.copy_(distributed.total(parameter.grad))
        norm = float(nn.utils.clip_grad_norm_(self._parameters, max_gradient_norm))
        if math.isfinite(loss) and math.isfinite(norm):
            self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        return norm

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate

    def moments(self) -> dict[str, Tensor]:
        state = self._adamw.state_dict()["state"]
        return {f"{index}/{name}": moment for index, of in state.items() for name, moment in of.items()}

    def load(self, parameters: Sequence[Tensor], moments: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for own, stored in zip(self._parameters, parameters, strict=True):
                own.copy_(stored)
        state: dict[int, dict[str, Tensor]] = {}
        for key, moment in moments.items():
            index, _, name = key.partition("/")
            state.setdefault(int(index), {})[name] = moment
        for number, of in state.items():
            shape = self._parameters[number].shape
            if {name: moment.shape for name, moment in of.items()} != dict.fromkeys(_MOMENTS, shape) | {"step": ()}:
                raise ValueError(f"AdamW has other moments of parameter {number}, of shape {list(shape)}")
        self._adamw.load_state_dict({"state": state, "param_groups": self._adamw.state_dict()["param_groups"]})


@dataclass(frozen=True)
class SkippedUpdates:
    """What an `UpdateGuard` has counted; see there."""

    skipped: int
    in_a_row: dict[str, int]


class UpdateGuard:
    """Makes the updates of a training loop, and counts those that a `RoleOptimizer` skips.

    One bad batch costs its update and no more. A role that is beyond mending skips all of its updates: more than
    `limit` in a row, counted for each role alone, end the training.

    Attributes:
        skipped: updates of all roles so far.
        in_a_row: of each role, those skipped since the last one that was made.
    """

    def __init__(self, limit: int = MAX_SKIPPED_UPDATES) -> None:
        self._limit = limit
        self.in_a_row: dict[str, int] = {}
        self.skipped = 0

    def record(self) -> str:
        """What a checkpoint keeps: a stage that is interrupted often must not begin to count anew each time."""
        return to_json(SkippedUpdates(self.skipped, dict(self.in_a_row)))

    def resume(self, record: str) -> None:
        """Go on from what `record` gave; '' where there was no checkpoint.

        Raises:
            IntegrityError: it is something else.
        """
        if record:
            kept = from_json(SkippedUpdates, record)
            self.skipped, self.in_a_row = kept.skipped, kept.in_a_row

    def update(self, role: str, optimizer: RoleOptimizer, *, loss: float, max_gradient_norm: float, step: int) -> float:
        """`optimizer.step`; `loss` is this rank's part of it, and `step` counts from 1, for messages.

        Raises:
            DivergenceError: this update is one too many.
        """
        loss = distributed.total_of({role: loss})[role]  # all ranks skip or none
        norm = optimizer.step(max_gradient_norm, loss)
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_a_row[role] = 0
            return norm
        self.skipped += 1
        self.in_a_row[role] = self.in_a_row.get(role, 0) + 1
        what = f"{role}, step {step}: loss {loss:.4g}, gradient norm {norm:.4g}"
        if self.in_a_row[role] > self._limit:
            raise DivergenceError(
                f"{what}: not finite, and neither were the {self._limit} updates before; all of them were skipped. "
                "Look at the batch, or lower the learning rate"
            )
        log.warning("%s: not finite, update skipped (%d in a row)", what, self.in_a_row[role])
        return norm
