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
from kvist.execution.sampling import DEFAULT_MAX_TOKENS, Sampling
from kvist.lang.endpoint import Endpoint
from kvist.lang.live_program import LiveProgram
from kvist.lang.program import seed_of
from kvist.lang.program_state import ProgramState
from kvist.planning.graph import Position

_MAX_THREADS = 256  # programs that run at once
_OPEN_TIMEOUT_S = 60.0
_CLOSE_TIMEOUT_S = 60.0
_SEED_BITS = 62
_RUN_BITS, _ID_BITS = 40, 32  # of operation ids: of the run, and of an operation in it
_WAITS = 10  # a result may wait for others; each of them is bounded, and this is the bound of the chain


@contextlib.contextmanager
def _to_its_end(state: ProgramState, *, is_counted: bool = False) -> Iterator[None]:
    """Run a program in the body, and end it. The state keeps the program's error; other exceptions are raised, too."""
    program = state.live
    try:
        with program.running(is_counted=is_counted):
            yield
    except BaseException as error:
        state.fail(error)
        if not isinstance(error, Exception):
            raise
    finally:
        program.end()


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
        indices = iter(range(len(self._calls)))
        lock = threading.Lock()
        num_threads = min(len(self._calls), self._config.width or _MAX_THREADS, _MAX_THREADS)

        def work() -> None:
            is_counted = True
            while True:
                with lock:
                    index = next(indices, None)
                if index is None:
                    return
                self._run_one(index, is_counted=is_counted)
                is_counted = False
                advance()

        threads = [threading.Thread(target=work, name=f"kvist-program-{n}", daemon=True) for n in range(num_threads)]
        for _ in threads:
            self._executor.starts()  # a plan waits until each thread has added its first requests
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _run_one(self, index: int, *, is_counted: bool = False) -> None:
        """Run one program in this thread and wait for its results. The state keeps its error. `is_counted`: the
        executor counts the program as running already."""
        state, call = self.states[index], self._calls[index]
        with _to_its_end(state, is_counted=is_counted):
            found = call.body(state, *call.args, **call.kwargs)
            if inspect.iscoroutine(found):
                found = asyncio.run(found)
            self._complete(state, found)

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
