"""ZeRO by DeepSpeed, for models whose forward passes are not DeepSpeed's.

- ZeRO-1 and ZeRO-2 need no model: an engine over the parameters of one role partitions their optimiser states and
  gradients. Each role keeps its own gradient norm and its own step.
- ZeRO-3 partitions weights. Frozen ones lie in an engine without an optimiser; adapters are small and stay whole.
  A module's weights are gathered when it is called, and given up afterwards.

DeepSpeed is imported here alone, and only by several ranks: the import takes seconds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from components.foundation import distributed
from components.foundation.errors import DivergenceError

_LARGEST_BUCKET = 50_000_000
"""Elements that are sent at once; DeepSpeed keeps a buffer of this size for each engine."""

_PINNED = -1
"""Stands for a module that is never left: DeepSpeed gives up a parameter when no module uses it any more."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


@cache
def _deepspeed() -> Any:
    import deepspeed
    import deepspeed.ops

    # on a CPU it would compile a C++ kernel for sums at its start; gloo sums without a compiler
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


class ZeroOptimizer:
    """AdamW whose states are partitioned over the ranks; see `RoleOptimizer`.

    Args:
        module: holds the parameters; with stage 3 it is the module that is called.
        adamw: over the parameters of the module that are trained.
        frozen: what `partition_frozen` returned for modules that gradients flow through.
    """

    def __init__(self, module: nn.Module, adamw: torch.optim.AdamW, stage: int, frozen: Sequence[Any]) -> None:
        self._parameters: list[nn.Parameter] = [p for group in adamw.param_groups for p in group["params"]]
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        elements = min(sum(p.numel() for p in self._parameters), _LARGEST_BUCKET)
        elements += elements % 2  # DeepSpeed aligns messages
        zero = {"stage": stage, "reduce_bucket_size": elements, "allgather_bucket_size": elements}
        self._engine, *_ = _deepspeed().initialize(
            model=module, optimizer=adamw, config=_config(zero, adamw.param_groups[0]["params"])
        )
        self._zero: Any = self._engine.optimizer
        self._adamw = adamw
        self._frozen = frozen

    def backward(self, loss: Tensor) -> None:
        self._zero.clear_backward_seen_flag()  # its engine sees no forward pass, which would say that one is to come
        # DeepSpeed averages over ranks, and the ranks' losses are parts of a sum
        self._engine.backward(loss * distributed.world().size)
        for offload in self._frozen:
            offload.release_backward_leftovers()

    def step(self, max_gradient_norm: float, loss: float) -> float:
        self._zero.clip_grad = max_gradient_norm
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        if not (math.isfinite(loss) and math.isfinite(norm)):  # DeepSpeed knows the norm only when it has stepped
            raise DivergenceError(
                f"loss {loss:.4g}, gradient norm {norm:.4g}: not finite, and with ZeRO an update cannot be skipped. "
                "Look at the batch, lower the learning rate, or set distributed.zero_stage=0"
            )
        return norm

    def set_learning_rate(self, learning_rate: float) -> None:
        self._zero.set_lr(learning_rate)

    def moments(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        states = [self._adamw.state[flat] for flat in self._partitions() if flat in self._adamw.state]
        if not states:
            return {}
        found: dict[str, Tensor] = {}
        for index, parameter in enumerate(self._parameters):
            for name in _MOMENTS:
                moment = safe_get_full_optimizer_state(parameter, name)
                if distributed.world().is_main:
                    found[f"{index}/{name}"] = moment.cpu()
            found[f"{index}/step"] = states[0]["step"].detach().cpu().clone()
        return found

    def load(self, parameters: Sequence[Tensor], moments: Mapping[str, Tensor]) -> None:
        for own, stored in zip(self._parameters, parameters, strict=True):
            with whole([own], changed=True), torch.no_grad():
                own.copy_(stored)
        self._zero.refresh_fp32_params()
        if not moments:
            return
        for flat in self._partitions():
            state = self._adamw.state[flat]
            state["step"] = moments["0/step"].clone()
            for name in _MOMENTS:
                state.setdefault(name, torch.zeros_like(flat))
        if hasattr(self._zero, "_lazy_init_hp_params_optimizer_state"):
            self._zero._lazy_init_hp_params_optimizer_state()
        for index, parameter in enumerate(self._parameters):
            for name in _MOMENTS:
                _set_moment(parameter, moments[f"{index}/{name}"].to(parameter.device), name)

    def _partitions(self) -> list[Tensor]:
        """This rank's flat partitions of the parameters, which the AdamW inside steps on."""
        name = "fp32_partitioned_groups_flat" if is_partitioned(self._parameters) else "single_partition_of_fp32_groups"
        partitions: list[Tensor] = getattr(self._zero, name)
        return partitions


def _set_moment(parameter: nn.Parameter, moment: Tensor, name: str) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if not is_partitioned([parameter]):
        safe_set_full_optimizer_state(parameter, moment, name)
        return
    # with ZeRO-3 the other function fails for tensors that do not divide by the number of ranks
    world, elements = distributed.world(), parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    padded = nn.functional.pad(moment.flatten(), (0, elements * world.size - moment.numel()))
    safe_set_local_optimizer_state(parameter, padded[elements * world.rank :][:elements], name)


def partition_frozen(module: nn.Module) -> Any:
    """Partition a module's weights over the ranks; they are gathered, module by module, whenever it is called."""
    engine, *_ = _deepspeed().initialize(model=module, config=_config({"stage": 3}, module.parameters()))
    return engine.optimizer


def is_partitioned(parameters: Iterable[Tensor]) -> bool:
    """Whether these parameters are partitioned over the ranks."""
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


@contextmanager
def whole(parameters: Iterable[Tensor], *, changed: bool = False) -> Iterator[None]:
    """Within the block every rank holds these parameters whole, whatever forward passes run. All ranks enter it.

    Args:
        changed: the block writes them, the same on every rank.
    """
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    with _deepspeed().zero.GatheredParameters(partitioned, modifier_rank=0 if changed else None):
        for parameter in partitioned:
            parameter.ds_active_sub_modules.add(_PINNED)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for parameter in partitioned:
                parameter.ds_active_sub_modules.discard(_PINNED)  # type: ignore[attr-defined]


def _config(zero: dict[str, Any], parameters: Iterable[Tensor]) -> dict[str, Any]:
    vectors = [parameter.numel() for parameter in parameters if parameter.dim() == 1]
    if zero["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = max(vectors, default=0)  # norms and biases are not worth a message
        zero["stage3_prefetch_bucket_size"] = 0
    return {
        "train_micro_batch_size_per_gpu": 1,  # it counts no samples for us, but insists on a number
        "managed_gradient_accumulation": False,  # a step may follow any number of backward passes
        "gradient_clipping": 1.0,  # `step` says how much
        "zero_optimization": zero,
    }
