"""Abstract tracing: run a program without a server, up to the first place where its control flow needs a result.

A variable is then a text with a hole. Texts with holes may be joined, formatted and added to states; a decision about
one (a comparison, its length, a conversion) ends the trace at that line, and the graph so far is what is known ahead.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from kvist.errors import ProgramError
from kvist.execution.results import Answer
from kvist.execution.sampling import DEFAULT_MAX_TOKENS, Sampling
from kvist.lang.live_program import CURRENT
from kvist.lang.positions import here
from kvist.lang.program import DecodedValue, Program, ScopeText, Stored, Variable
from kvist.lang.state import State
from kvist.planning.graph import Graph, Tool
from kvist.planning.prompt import Prompt, hole, plain_text


class TraceStopped(BaseException):
    """The program decides about a result. Not an `Exception`: programs that catch errors must not catch it."""


class Unknown(str):
    """A text with holes. Joining and formatting work as with every text; decisions end the trace."""

    __slots__ = ()

    def _stop(self, *_: object) -> NoReturn:
        raise TraceStopped(f"{here()} decides about a result")

    def _same(self, *_: object) -> Unknown:
        """Stripping and case do not change what is unknown."""
        return self

    def __str__(self) -> Unknown:
        return self

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _stop
    __hash__ = __bool__ = __len__ = __contains__ = __iter__ = __getitem__ = _stop
    __int__ = __float__ = __index__ = _stop
    split = rsplit = splitlines = partition = rpartition = startswith = endswith = find = rfind = index = _stop  # type: ignore[assignment]
    count = isdigit = isalpha = isspace = isnumeric = isupper = islower = replace = encode = _stop  # type: ignore[assignment]
    strip = lstrip = rstrip = lower = upper = title = capitalize = casefold = removeprefix = removesuffix = _same


class TracedProgram(Program):
    """Records operations; knows no result."""

    is_traced = True

    def __init__(self, *, index: int = 0, sampling: Sampling, ids: Any) -> None:
        super().__init__(index=index, seed=0, sampling=sampling, ids=ids, timeout_s=0.0, streams=False)
        self.num_unknown = 0  # results that the program has
        self._tools: set[int] = set()

    def value(self, stored: Stored) -> object:
        match stored:
            case tuple():
                return [self.value(each) for each in stored]
            case DecodedValue():
                return stored.value
            case ScopeText():
                self.num_unknown += 1
                return Unknown(plain_text(stored.outline))
            case Variable():
                self.num_unknown += 1
                return Unknown(hole(stored.operation.operation_id))

    async def value_async(self, stored: Stored) -> object:
        return self.value(stored)

    def knows(self, operation_ids: Iterable[int]) -> bool:
        return super().knows(each for each in operation_ids if each not in self._tools)

    def text(self, outline: str) -> str:
        self.num_unknown += 1
        return Unknown(outline)

    def answer(self, variable: Variable) -> Answer:
        raise TraceStopped(f"{here()} reads the figures of {variable.operation.name!r}")

    def tool_result(self, function: Any) -> Unknown:
        state = self.current
        operation = Tool(
            place=self.place(() if state is None else state.path, here(), None if state is None else state.last),
            name=function.__name__,
            prompt=Prompt() if state is None else state.prompt,
        )
        self.num_unknown += 1
        self._tools.add(self.record(operation))
        return Unknown(hole(operation.operation_id))


def trace_calls(
    body: Callable[..., Any],
    calls: Sequence[tuple[Sequence[Any], Mapping[str, Any]]],
    sampling: Sampling = Sampling(),
) -> Graph:
    """Return the part of the calls' graph that is known without results. Raises what the function raises before it
    has the first result; later errors end the trace, because holes cause errors that results would not."""
    ids = itertools.count()
    operations = []
    stopped = ""
    for index, (args, kwargs) in enumerate(calls):
        program = TracedProgram(index=index, sampling=sampling.over(Sampling(max_tokens=DEFAULT_MAX_TOKENS)), ids=ids)
        token = CURRENT.set(program)
        try:
            found = body(State(program), *args, **kwargs)
            if inspect.iscoroutine(found):
                asyncio.run(found)
        except TraceStopped as stop:
            stopped = stopped or str(stop)
        except Exception as error:
            if not program.num_unknown:
                raise
            name = type(error).__name__
            line = f" ({error.message})" if isinstance(error, ProgramError) else ""
            stopped = stopped or f"{name} with a result that is not known yet{line}"
        finally:
            CURRENT.reset(token)
        operations += program.operations
    return Graph(operations=tuple(operations), stopped=stopped)
