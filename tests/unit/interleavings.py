"""A small model checker: every order in which processes can take their steps on something that they share.

A program is a plain function that asks its `World` for each access to what is shared. It runs again from its start for
each step, with the answers that it had so far; at the first access without an answer it is left. So the code under
test needs no hooks and no threads, and must be deterministic apart from the answers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

Shared = TypeVar("Shared")


@dataclass(frozen=True)
class Access(Generic[Shared]):
    """One step: the shared state before -> the state after, and the answer. An answer that is an exception is raised.

    Attributes:
        name: for the trace of a counterexample.
        outcomes: all that may happen: more than one where the network has a say.
        late: whether it may still arrive after its process died.
    """

    name: str
    outcomes: Callable[[Shared], list[tuple[Shared, Hashable]]]
    late: bool = False


class _Left(BaseException):
    """A program reached an access that it has no answer for."""


@dataclass
class World(Generic[Shared]):
    """What a program sees of the others: the answers to its accesses."""

    answers: tuple[Hashable, ...]
    asked: int = 0
    next: Access[Shared] | None = None

    def do(self, access: Access[Shared]) -> Any:
        if self.asked == len(self.answers):
            self.next = access
            raise _Left
        answer = self.answers[self.asked]
        self.asked += 1
        if isinstance(answer, Exception):
            raise answer
        return answer


Program = Callable[[World[Shared]], Any]


@dataclass(frozen=True)
class State(Generic[Shared]):
    """A point in a history: what is shared, what each process has been told, who died, which writes are under way.

    Attributes:
        trace: the steps that led here; one of the ways there.
    """

    shared: Shared
    answers: tuple[tuple[Hashable, ...], ...]
    dead: frozenset[int] = frozenset()
    under_way: tuple[Access[Shared], ...] = ()
    trace: tuple[str, ...] = ()

    @property
    def key(self) -> Hashable:
        """Equal for states from which the same can happen."""
        return (self.shared, self.answers, self.dead, tuple(access.name for access in self.under_way))


def final_states(shared: Shared, programs: Sequence[Program[Shared]], deaths: int = 0) -> Iterator[State[Shared]]:
    """All states in which every process has ended, in whatever order they took their steps.

    Args:
        deaths: so many processes may die, each before any of its steps.
    """
    start = State(shared, ((),) * len(programs))
    waiting, seen = [start], {start.key}
    next_access = functools.cache(lambda i, answers: _run(programs[i], answers)[0])
    while waiting:
        state = waiting.pop()
        following = list(_steps(state, next_access, deaths))
        if not following:
            yield state
        for new in following:
            if new.key not in seen:
                seen.add(new.key)
                waiting.append(new)


def result_of(program: Program[Shared], answers: tuple[Hashable, ...]) -> Any:
    """What a process returned or raised that has had all these answers."""
    access, result = _run(program, answers)
    assert access is None, f"it still waits at {access}"
    return result


def _steps(
    state: State[Shared], next_access: Callable[[int, tuple[Hashable, ...]], Access[Shared] | None], deaths: int
) -> Iterator[State[Shared]]:
    for number, access in enumerate(state.under_way):
        left = state.under_way[:number] + state.under_way[number + 1 :]
        for shared, _ in access.outcomes(state.shared):
            yield replace(state, shared=shared, under_way=left, trace=(*state.trace, f"late: {access.name}"))
    for i, answers in enumerate(state.answers):
        access = None if i in state.dead else next_access(i, answers)
        if access is None:
            continue
        if len(state.dead) < deaths:
            died = replace(state, dead=state.dead | {i}, trace=(*state.trace, f"{i} dies before: {access.name}"))
            yield died
            if access.late:
                yield replace(died, under_way=(*state.under_way, access))
        for shared, answer in access.outcomes(state.shared):
            told = (*state.answers[:i], (*answers, answer), *state.answers[i + 1 :])
            yield replace(state, shared=shared, answers=told, trace=(*state.trace, f"{i}: {access.name}"))


def _run(program: Program[Shared], answers: tuple[Hashable, ...]) -> tuple[Access[Shared] | None, Any]:
    """(the access that the program waits at, None), or (None, what it returned or raised)."""
    world: World[Shared] = World(answers)
    try:
        return None, program(world)
    except _Left:
        return world.next, None
    except Exception as error:
        return None, error
