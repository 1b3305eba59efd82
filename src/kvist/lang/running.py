"""Runs the programs of one call of `run` or `run_batch`: their threads, their executor, their end."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from kvist.errors import KvistError, ProgramError, ProgramTimeout, Unavailable
from kvist.execution.job import ExecutionConfig
from kvist.execution.results import Result
from kvist.execution.sampling import DEFAULT_MAX_TOKENS, Sampling
from kvist.lang.endpoint import Endpoint
from kvist.lang.live_program import LiveProgram
from kvist.lang.program import seed_of
from kvist.lang.program_state import ProgramState
from kvist.lang.program_threads import ProgramThreads
from kvist.planning.graph import Position

_MAX_PROGRAMS = 256  # that run at once
_OPEN_TIMEOUT_S = 60.0
_CLOSE_TIMEOUT_S = 60.0
_SEED_BITS = 62
_RUN_BITS, _ID_BITS = 40, 32  # of operation ids: of the run, and of an operation in it
_WAITS = 10  # a result may wait for others; each of them is bounded, and this is the bound of the chain


@contextlib.contextmanager
def _to_its_end(state: ProgramState) -> Iterator[None]:
    """Run a program in the body, and end it. The state keeps the program's error; other exceptions are raised, too."""
    program = state.live
    try:
        with program.running():
            yield
    except BaseException as error:
        state.fail(error)
        if not isinstance(error, Exception):
            raise
    finally:
        program.end()


class _LastResult:
    """Ends a program whose function has returned, once all its results are there. The first one that fails ends it, and
    cancels the rest. Mutable; the thread that brings a result calls it."""

    def __init__(self, state: ProgramState, cancel: Callable[[int], None], ended: Callable[[], None]) -> None:
        self._state, self._cancel, self._ended = state, cancel, ended
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        results = [each.result for each in state.live.variables.values()]
        self._num_left = len(results)
        for result in results:
            result.on_done(self._take)
        if not results:
            self._end()

    def _take(self, result: Result) -> None:
        with self._lock:
            failed = self._error is None and result.error is not None
            self._error = self._error or result.error
            self._num_left -= 1
            is_last = not self._num_left
        if is_last:
            self._end()
        elif failed:
            self._cancel(self._state.live.index)

    def _end(self) -> None:
        error = self._error
        if error is None:
            try:
                self._state.live.check_forks(self._state.ret_value)
            except ProgramError as found:
                error = found
        if error is not None:
            self._state.fail(error)
        self._state.live.end()
        self._ended()


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    body: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    position: Position  # of the call of run()


class Batch:
    """Mutable; one use: `run`, `run_async` or `start`."""

    def __init__(
        self,
        calls: Sequence[Call],
        *,
        sampling: Sampling,
        endpoint: Endpoint,
        config: ExecutionConfig,
        seed: int | None,
        streams: bool,
    ) -> None:
        self._calls, self._config = calls, config
        self._name = endpoint.name
        self._thread, self._executor = endpoint.executor(config)
        first = secrets.randbits(_SEED_BITS) if seed is None else seed
        ids = itertools.count(secrets.randbits(_RUN_BITS) << _ID_BITS)  # so that a result of another run is noticed
        self.states = [
            ProgramState(
                LiveProgram(
                    self._executor,
                    index=index,
                    seed=first if len(calls) == 1 else seed_of(first, (index,)),
                    sampling=sampling.over(Sampling(max_tokens=DEFAULT_MAX_TOKENS)),
                    ids=ids,
                    timeout_s=_WAITS * config.request_timeout_s,
                    streams=streams,
                ),
                self._executor.report,
            )
            for index in range(len(calls))
        ]

    def _open(self) -> None:
        """Learn about the server's cluster. Raises `ProgramError` with the line of the run."""
        try:
            self._thread.start(self._executor.open()).result(_OPEN_TIMEOUT_S)
        except (KvistError, TimeoutError) as error:
            raise self._no_server(error) from error

    def _no_server(self, error: KvistError | TimeoutError) -> ProgramError:
        position = self._calls[0].position
        if isinstance(error, KvistError):
            return ProgramError(f"{position}: {error.message}")
        return ProgramTimeout(f"{position}: {self._name} has not answered within {_OPEN_TIMEOUT_S:g} s")

    def run(self, *, progress_bar: bool = False) -> None:
        """Run all programs and wait for their results. Raises the first error once all programs have ended."""
        self._open()
        try:
            with _progress(len(self._calls), shown=progress_bar) as advance:
                if len(self._calls) == 1:
                    self._run_one(0)
                    advance()
                else:
                    self._run_threads(advance)
        finally:
            self._close()
        self._raise_first()

    def start(self) -> list[ProgramState]:
        """Run the programs in a thread and return their states at once."""
        self._open()

        def run() -> None:
            try:
                self._run_one(0)
            finally:
                self._close()

        threading.Thread(target=run, name="kvist-program", daemon=True).start()
        return self.states

    async def run_async(self) -> None:
        """Run the one program: a coroutine in the caller's loop, a function in a thread."""
        try:
            await asyncio.wait_for(asyncio.wrap_future(self._thread.start(self._executor.open())), _OPEN_TIMEOUT_S)
        except (KvistError, TimeoutError) as error:
            raise self._no_server(error) from error
        try:
            if inspect.iscoroutinefunction(self._calls[0].body):
                await self._run_coroutine(self._calls[0], self.states[0])
            else:
                await self._run_in_thread()
        finally:
            with contextlib.suppress(Unavailable):
                closed = asyncio.wrap_future(self._thread.start(self._executor.close()))
                await asyncio.wait_for(asyncio.shield(closed), _CLOSE_TIMEOUT_S)
        self._raise_first()

    async def _run_in_thread(self) -> None:
        done: Future[None] = Future()

        done.set_running_or_notify_cancel()  # a thread cannot be cancelled; its requests are

        def run() -> None:
            self._run_one(0)
            done.set_result(None)

        threading.Thread(target=run, name="kvist-program", daemon=True).start()
        try:
            await asyncio.wrap_future(done)
        except asyncio.CancelledError:
            self._executor.cancel(0)
            raise

    def _run_threads(self, advance: Callable[[], None]) -> None:
        most = min(self._config.width or _MAX_PROGRAMS, _MAX_PROGRAMS)

        def run(threads: ProgramThreads, index: int) -> None:
            def ended() -> None:
                advance()
                threads.ended()

            self._run_function(index, threads, ended)

        ProgramThreads(self._executor, num_programs=len(self._calls), most=most, run=run).run_all()

    def _run_function(self, index: int, threads: ProgramThreads, ended: Callable[[], None]) -> None:
        """Run the function of a program in this thread. The state keeps its error."""
        state, call = self.states[index], self._calls[index]
        try:
            with state.live.running(threads):
                state.ret_value = _returned(call, state)
        except BaseException as error:
            state.fail(error)
            state.live.end()
            ended()
            if not isinstance(error, Exception):
                raise
        else:
            _LastResult(state, self._executor.cancel, ended)

    def _run_one(self, index: int) -> None:
        """Run one program in this thread and wait for its results. The state keeps its error."""
        state, call = self.states[index], self._calls[index]
        with _to_its_end(state):
            self._complete(state, _returned(call, state))

    async def _run_coroutine(self, call: Call, state: ProgramState) -> None:
        program = state.live
        with _to_its_end(state):
            found = await call.body(state, *call.args, **call.kwargs)
            for variable in list(program.variables.values()):
                await program.answer_async(variable)
            self._complete(state, found)

    def _complete(self, state: ProgramState, returned: object) -> None:
        """Wait for all results. Raises the first error, and one for a fork that never joins."""
        state.ret_value = returned
        for variable in list(state.live.variables.values()):
            state.live.answer(variable)
        state.live.check_forks(returned)

    def _close(self) -> None:
        with contextlib.suppress(TimeoutError, Unavailable):  # a backend that was closed has closed the executor
            self._thread.start(self._executor.close()).result(_CLOSE_TIMEOUT_S)

    def _raise_first(self) -> None:
        failed = [(state, error) for state in self.states if (error := state.error()) is not None]
        if not failed:
            return
        error = failed[0][1]
        if len(self.states) > 1 and isinstance(error, Exception):
            error.add_note(f"{len(failed)} of {len(self.states)} programs failed; this is the first")
        if not isinstance(error, ProgramError):
            error.add_note(f"in a program that was run at {self._calls[0].position}")
        raise error


def _returned(call: Call, state: ProgramState) -> object:
    found = call.body(state, *call.args, **call.kwargs)
    return asyncio.run(found) if inspect.iscoroutine(found) else found


@contextlib.contextmanager
def _progress(total: int, *, shown: bool) -> Any:
    """Give a function that advances the bar by one program."""
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("programs", total=total)
        yield lambda: bar.advance(task)
