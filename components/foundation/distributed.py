"""The ranks of a stage: who am I, how many are we, and what do all of us say.

A stage that `torchrun` starts runs once on every device; each of these processes is a rank. Alone, a process is rank 0
of 1, and every function here returns at once what it was given, without a network, DeepSpeed or even torch: steps that
run no model know of ranks only that they are the main one.
"""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from components.foundation.errors import TrainingError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

_TIMEOUT = datetime.timedelta(minutes=60)
"""A rank may wait so long for another: as long as the slowest upload of a checkpoint may take."""


@dataclass(frozen=True)
class World:
    """This process among the ranks of its stage.

    Attributes:
        zero_stage: what ZeRO (arXiv 1910.02054) partitions over the ranks: 0 nothing, 1 optimiser states, 2 gradients
            too, 3 weights too.
    """

    rank: int = 0
    size: int = 1
    zero_stage: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this rank writes, prints and logs for all."""
        return self.rank == 0


@dataclass(frozen=True)
class Part(Generic[T]):
    """A rank's part of a batch.

    Attributes:
        items: never empty: a rank that has no part is given an item of another, so that it takes part in every step.
        share: of the batch, in [0, 1]; the weight of a mean over the items. 0 where the rank has no part.
        counts: 1, or 0 where the rank has no part; the weight of a sum over the items.
    """

    items: list[T]
    share: float
    counts: float


_world = World()


def world() -> World:
    """This process among the ranks; rank 0 of 1 unless `started` is in force."""
    return _world


def device() -> torch.device:
    """Where this rank computes: its own GPU, or the CPU."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def loading_device() -> torch.device:
    """Where weights are loaded to: with ZeRO-3 no device need hold a whole model, so they come by main memory."""
    import torch

    return torch.device("cpu") if _world.zero_stage == 3 else device()


@contextmanager
def started(zero_stage: int | None) -> Iterator[World]:
    """Join the other ranks that `torchrun` started (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).

    Args:
        zero_stage: None chooses 2.
    """
    global _world
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=_TIMEOUT)
        _world = World(torch.distributed.get_rank(), size, 2 if zero_stage is None else zero_stage)
    try:
        yield _world
        if size > 1:  # after an error a rank ends at once: others may wait for it, and it must not wait for them
            torch.distributed.destroy_process_group()
    finally:
        _world = World()


def barrier() -> None:
    """Wait until every rank is here."""
    if _world.size > 1:
        import torch

        torch.distributed.barrier()


def total(values: Tensor) -> Tensor:
    """The sum of a tensor of one shape over all ranks."""
    if _world.size == 1:
        return values
    import torch

    summed = values.detach().clone()
    torch.distributed.all_reduce(summed)
    return summed


def total_of(values: Mapping[str, float]) -> dict[str, float]:
    """The sum of each number over all ranks, in double precision."""
    if _world.size == 1:
        return dict(values)
    import torch

    sums = total(torch.tensor(list(values.values()), dtype=torch.float64)).tolist()
    return dict(zip(values, sums, strict=True))


def maximum(value: int) -> int:
    """The largest number that a rank gives."""
    if _world.size == 1:
        return value
    import torch

    largest = torch.tensor([value])
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest.item())


def anywhere(*flags: bool) -> tuple[bool, ...]:
    """Of each flag, whether it is true on any rank."""
    if _world.size == 1:
        return flags
    import torch

    found = torch.tensor(flags, dtype=torch.int32)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return tuple(bool(flag) for flag in found.tolist())


def every_row(own: Tensor, rows: Tensor, count: int) -> Tensor:
    """[b] numbers of this rank's rows -> [count] numbers of all ranks' rows, each in its place.

    Args:
        rows: [b] the places of this rank's numbers; every place belongs to one rank.
    """
    import torch

    placed = torch.zeros(count, dtype=own.dtype, device=own.device)
    placed[rows.to(own.device)] = own.detach()
    return total(placed)


def every_number(own: Sequence[float], rows: Tensor, count: int) -> list[float]:
    """`every_row` of plain numbers; alone, they are all there are, however many."""
    if _world.size == 1:
        return list(own)
    import torch

    numbers: list[float] = every_row(torch.tensor(own, dtype=torch.float64), rows, count).tolist()
    return numbers


def gathered(value: T) -> list[T]:
    """What every rank gives, in the order of ranks."""
    if _world.size == 1:
        return [value]
    import torch

    values: list[T | None] = [None] * _world.size
    torch.distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def from_main(compute: Callable[[], T]) -> T:
    """What rank 0 computes, on every rank: they agree, and it is computed once."""
    if _world.size == 1:
        return compute()
    import torch

    box = [compute() if _world.is_main else None]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def copy_from_main(values: Tensor) -> None:
    """Overwrite a tensor of one shape with rank 0's values of it."""
    if _world.size > 1:
        import torch

        torch.distributed.broadcast(values.detach(), src=0)


def by_main(act: Callable[[], object]) -> None:
    """Let rank 0 act for all, and the others wait until it has."""
    if _world.is_main:
        act()
    barrier()


def check_same(**facts: str) -> None:
    """Refuse to go on where ranks were started with different facts.

    Raises:
        TrainingError: naming the first fact that differs and what each rank has.
    """
    everyones = gathered({name: hashlib.sha256(fact.encode()).hexdigest()[:12] for name, fact in facts.items()})
    for name in facts:
        digests = [of_rank[name] for of_rank in everyones]
        if len(set(digests)) > 1:
            listed = ", ".join(f"rank {rank}: {digest}" for rank, digest in enumerate(digests))
            raise TrainingError(
                f"the ranks of this stage were started with different {name} (digests: {listed}): "
                "start all of them with the same"
            )


def own_part(items: Sequence[T]) -> Part[T]:
    """This rank's part of a batch that every rank knows."""
    return part_of(items, _world.rank, _world.size)


def part_of(items: Sequence[T], rank: int, size: int) -> Part[T]:
    """A rank's part: neighbours in the batch, as many as for every other rank or one more."""
    start, end = (len(items) * r // size for r in (rank, rank + 1))
    if start == end:
        return Part(list(items[:1]), 0.0, 0.0)
    return Part(list(items[start:end]), (end - start) / len(items), 1.0)


def own_turns(items: Sequence[T]) -> list[T]:
    """Items in turns, as many on every rank: where they do not divide, some fall to two ranks."""
    turns = -(-len(items) // _world.size)
    return [items[(turn * _world.size + _world.rank) % len(items)] for turn in range(turns)]
