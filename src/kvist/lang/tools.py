"""Functions that programs call between generations."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, overload

from kvist.lang.live_program import CURRENT, LiveProgram
from kvist.lang.tracing import TracedProgram

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT_TIMEOUT_S = 60.0


@overload
def tool(function: F) -> F: ...


@overload
def tool(*, timeout_s: float = DEFAULT_TIMEOUT_S) -> Callable[[F], F]: ...


def tool(function: F | None = None, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> F | Callable[[F], F]:
    """Make a function a tool: a program's calls of it are operations of its plan. Outside of programs nothing changes.

    While a tool runs, the known part of the turn that comes after it is computed ahead. A call that takes longer than
    `timeout_s` raises `ProgramTimeout`, which names the program's line; Python cannot end a plain function, whose
    thread goes on alone. Traces do not call tools.
    """
    if function is None:
        return lambda given: _tool(given, timeout_s)
    return _tool(function, timeout_s)


def _tool(function: F, timeout_s: float) -> F:
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            program = CURRENT.get()
            if isinstance(program, TracedProgram):
                return program.tool_result(function)
            if isinstance(program, LiveProgram):
                return await program.call_tool_async(function, args, kwargs, timeout_s)
            return await function(*args, **kwargs)

        return awaited  # type: ignore[return-value]  # has the function's signature

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        program = CURRENT.get()
        if isinstance(program, TracedProgram):
            return program.tool_result(function)
        if isinstance(program, LiveProgram):
            return program.call_tool(function, args, kwargs, timeout_s)
        return function(*args, **kwargs)

    return called  # type: ignore[return-value]
