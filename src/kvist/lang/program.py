"""One run of a program: its operations, its seed, and the way to its results.

`Program` is what a state needs. A live program (live_program.py) submits its requests to an executor; a traced one
(tracing.py) records them and knows no result.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, TypeAlias

from kvist.errors import ProgramError
from kvist.execution.choices import ChoicesMethod
from kvist.execution.job import Job
from kvist.execution.results import Answer, Result
from kvist.execution.sampling import Sampling
from kvist.lang.answer_types import TEXT, AnswerType
from kvist.planning.graph import Generate, Graph, Operation, Place, Position, Request
from kvist.planning.prompt import filled, holes_of, plain_text

if TYPE_CHECKING:
    from kvist.lang.state import Forks, State

_SEED_BITS = 62  # servers accept seeds below 2 ** 63, and count up from them for further answers


def seed_of(seed: int, path: Sequence[int]) -> int:
    """Return the seed of a branch (or of a program of a batch): a function of the seed and the path alone."""
    if not path:
        return seed
    text = f"{seed}:{'.'.join(map(str, path))}".encode()
    return int.from_bytes(blake2b(text, digest_size=8, person=b"kvist fork").digest()) >> (64 - _SEED_BITS)


@dataclass(frozen=True, slots=True)
class Variable:
    """The result of one generation or choice."""

    operation: Request
    result: Result
    answer_type: AnswerType = TEXT


@dataclass(frozen=True, slots=True)
class ScopeText:
    """A variable that is a part of the prompt (`var_scope`)."""

    outline: str


@dataclass(frozen=True, slots=True)
class DecodedValue:
    """A variable that the program has set."""

    value: object


Stored: TypeAlias = "Variable | ScopeText | DecodedValue | tuple[Stored, ...]"


class Program:
    """Mutable; owned by the thread or coroutine that runs the program. Results may be read by any thread."""

    is_traced = False

    def __init__(
        self, *, index: int, seed: int, sampling: Sampling, ids: Iterator[int], timeout_s: float, streams: bool
    ) -> None:
        """`sampling`: of generations that do not say otherwise. `timeout_s`: longest wait for one result."""
        self.index, self.seed, self.sampling, self.timeout_s = index, seed, sampling, timeout_s
        self._streams = streams
        self.current: State | None = None  # the state that was used last
        self.operations: list[Operation] = []
        self.variables: dict[int, Variable] = {}  # by operation
        self._ids = ids
        self._forks: list[Forks] = []
        self._lock = threading.Lock()

    # -- recording

    def place(self, path: tuple[int, ...], position: Position, after: int | None) -> Place:
        return Place(operation_id=next(self._ids), position=position, program=self.index, path=path, after=after)

    def record(self, operation: Operation) -> int:
        with self._lock:
            self.operations.append(operation)
        return operation.operation_id

    def check_open(self, position: Position) -> None:
        """Raise `ProgramError` if the program cannot add operations any more."""

    def knows(self, operation_ids: Iterable[int]) -> bool:
        """Return whether all results are those of operations of this program: so no operation waits for a later one."""
        return all(each in self.variables for each in operation_ids)

    def forked(self, forks: Forks) -> None:
        self._forks.append(forks)

    def submit(self, variable: Variable, *, sampling: Sampling, method: ChoicesMethod) -> None:
        """`sampling`: as the program's code gives it; the rest is the run's."""
        operation = variable.operation
        self.variables[operation.operation_id] = variable
        defaults = self.sampling if isinstance(operation, Generate) else Sampling(seed=self.sampling.seed)
        whole = sampling.over(defaults).over(Sampling(seed=seed_of(self.seed, operation.place.path)))
        self._send(
            Job(
                operation=operation,
                result=variable.result,
                sampling=whole,
                defaults=whole.given() - sampling.given(),
                form=variable.answer_type.kind,
                form_source=variable.answer_type.source,
                form_argument=variable.answer_type.argument,
                method=method,
                streams=self._streams,
            )
        )

    def _send(self, job: Job) -> None:
        """Give the job to the executor, if there is one."""

    def graph(self) -> Graph:
        """Return the operations so far."""
        with self._lock:
            return Graph(operations=tuple(self.operations))

    def check_forks(self, returned: object) -> None:
        """Raise `ProgramError` for a fork with results that no code can read any more."""
        kept = returned if isinstance(returned, list | tuple) else [returned]
        for forks in self._forks:
            is_returned = any(one is forks or any(one is branch for branch in forks) for one in kept)
            if not forks.is_used and not is_returned:
                raise ProgramError(
                    f"{forks.position}: the fork is never joined, and a result of its branches is never read: call "
                    "join() or read a variable of each branch"
                )

    # -- reading

    def waiting(self) -> AbstractContextManager[None]:
        """Mark the program as waiting while a result is awaited."""
        return nullcontext()

    def answer(self, variable: Variable) -> Answer:
        if variable.result.is_done:
            return variable.result.wait(0)
        with self.waiting():
            return variable.result.wait(self.timeout_s)

    async def answer_async(self, variable: Variable) -> Answer:
        if variable.result.is_done:
            return variable.result.wait(0)
        with self.waiting():
            return await variable.result.wait_async(self.timeout_s)

    def value(self, stored: Stored) -> object:
        """Wait for a variable and return its value. Raises `ProgramError`."""
        match stored:
            case tuple():
                return [self.value(each) for each in stored]
            case ScopeText():
                return plain_text(self.text(stored.outline))
            case DecodedValue():
                return stored.value
            case Variable():
                return value_of(stored, self.answer(stored))

    async def value_async(self, stored: Stored) -> object:
        """The twin of `value` for coroutines."""
        match stored:
            case tuple():
                return [await self.value_async(each) for each in stored]
            case ScopeText():
                for operation_id in holes_of(stored.outline):
                    await self.answer_async(self.variables[operation_id])
                return self.value(stored)
            case DecodedValue():
                return stored.value
            case Variable():
                return value_of(stored, await self.answer_async(stored))

    def known_text(self, outline: str) -> str:
        """Fill in the results that are there, without waiting."""
        results = {}
        for operation_id in holes_of(outline):
            variable = self.variables.get(operation_id)
            if variable is not None and variable.result.is_done and variable.result.error is None:
                results[operation_id] = variable.result.wait(0).texts[0]
        return filled(outline, results)

    def text(self, outline: str) -> str:
        """Wait for the results in a part of a prompt and fill them in."""
        results: Mapping[int, str] = {
            operation_id: self.answer(self.variables[operation_id]).texts[0] for operation_id in holes_of(outline)
        }
        return filled(outline, results)


def value_of(variable: Variable, answer: Answer) -> object:
    """Return the answer as the program wants it. Raises `ProgramError` where it has not the asked form."""
    try:
        values = [variable.answer_type.value_of(text) for text in answer.texts]
    except (ValueError, KeyError, IndexError) as error:
        reason = answer.meta.get("finish_reason")
        cut = "max_tokens cut it off: ask for more" if reason == "length" else str(error)
        raise ProgramError(
            f"{variable.operation.position}: the answer {answer.texts[0][:80]!r} does not have the form that was asked "
            f"for ({cut})"
        ) from error
    several = isinstance(variable.operation, Generate) and variable.operation.num_answers > 1
    return values if several else values[0]
