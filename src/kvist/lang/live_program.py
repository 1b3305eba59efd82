"""A program that runs: its requests go to an executor, its tools are called."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from typing import Any

from kvist.errors import ProgramError, ProgramTimeout
from kvist.execution.executor import Executor
from kvist.execution.job import Job
from kvist.execution.sampling import Sampling
from kvist.lang.positions import here
from kvist.lang.program import Program
from kvist.lang.program_threads import Activity
from kvist.planning.graph import Position, Tool
from kvist.planning.prompt import Prompt

CURRENT: contextvars.ContextVar[Program | None] = contextvars.ContextVar("kvist_program", default=None)


class LiveProgram(Program):
    """Mutable; owned by the thread or coroutine of the program."""

    def __init__(
        self,
        executor: Executor,
        *,
        index: int,
        seed: int,
        sampling: Sampling,
        ids: Iterator[int],
        timeout_s: float,
        streams: bool,
    ) -> None:
        super().__init__(index=index, seed=seed, sampling=sampling, ids=ids, timeout_s=timeout_s, streams=streams)
        self._executor = executor
        self._activity: Activity = executor
        self._active = False
        self._ended = False
        self._changed = threading.Condition()

    def _send(self, job: Job) -> None:
        self._executor.submit(job)
        with self._changed:
            self._changed.notify_all()

    def check_open(self, position: Position) -> None:
        if self._ended:
            raise ProgramError(f"{position}: the program has ended: nothing can be added to its states")

    @contextmanager
    def running(self, activity: Activity | None = None) -> Iterator[None]:
        """The program's function runs inside of this block. `activity`: learns when it waits, in place of the
        executor."""
        self._active = True
        self._activity = activity or self._executor
        self._activity.starts()
        token = CURRENT.set(self)
        try:
            yield
        except BaseException:
            self._executor.cancel(self.index)
            raise
        finally:
            CURRENT.reset(token)
            if self._active:
                self._active = False
                self._activity.ends()

    def end(self) -> None:
        """Refuse further operations; readers of streams learn that no more will come."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        if not self._active:  # somebody else reads
            yield
            return
        self._active = False
        self._activity.waits()
        try:
            yield
        finally:
            self._active = True
            self._activity.resumes()

    @property
    def has_ended(self) -> bool:
        return self._ended

    def wait_for_more(self, timeout_s: float) -> None:
        """Wait until an operation is added or the program ends. Raises `ProgramTimeout`."""
        num_known = len(self.variables)
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended or len(self.variables) > num_known, timeout_s):
                raise ProgramTimeout(f"the program added nothing for {timeout_s:g} s")

    # -- tools

    def call_tool(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], timeout_s: float) -> Any:
        """Call the function in a thread of its own. Raises what it raises, or `ProgramTimeout`."""
        operation = self._tool(function, here())
        future: Future[Any] = Future()
        context = contextvars.copy_context()

        def call() -> None:
            try:
                found = context.run(function, *args, **kwargs)
                future.set_result(asyncio.run(found) if inspect.iscoroutine(found) else found)
            except BaseException as error:
                future.set_exception(error)

        with self._tool_running(operation):
            threading.Thread(target=call, name=f"kvist-tool-{operation.name}", daemon=True).start()
            try:
                return future.result(timeout_s)
            except FutureTimeout:
                if not future.done():
                    raise _too_slow(operation, timeout_s) from None
                raise  # the tool's own

    async def call_tool_async(
        self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], timeout_s: float
    ) -> Any:
        operation = self._tool(function, here())
        with self._tool_running(operation):
            task = asyncio.ensure_future(function(*args, **kwargs))
            done, _ = await asyncio.wait([task], timeout=timeout_s)
            if not done:
                task.cancel()
                raise _too_slow(operation, timeout_s)
            return task.result()

    def _tool(self, function: Any, position: Position) -> Tool:
        state = self.current
        outline = "" if state is None else self.known_text(state.prompt.outline)
        place = self.place(() if state is None else state.path, position, None if state is None else state.last)
        operation = Tool(place=place, name=function.__name__, prompt=Prompt(outline))
        self.record(operation)
        return operation

    @contextmanager
    def _tool_running(self, operation: Tool) -> Iterator[None]:
        self._executor.tool_starts(operation)
        try:
            with self.waiting():
                yield
        except ProgramError:
            raise
        except Exception as error:
            error.add_note(f"in the tool {operation.name}, called at {operation.position}")
            raise
        finally:
            self._executor.tool_ends(operation.operation_id)


def _too_slow(operation: Tool, timeout_s: float) -> ProgramTimeout:
    return ProgramTimeout(
        f"{operation.position}: the tool {operation.name} has not returned after {timeout_s:g} s: give it more time "
        "with @tool(timeout_s=...)"
    )
