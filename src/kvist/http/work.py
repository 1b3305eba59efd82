"""Runs long work on threads, off the event loop, and limits how much of it may wait.

`WorkPool` has a few threads. A request body of more than `INLINE_BYTES` becomes a job there: decoding, the chat
template, tokenising, checks of lists. Such jobs are refused when too many wait. Work for an admitted request (the JSON
of a long answer) is never refused: admission has bounded it.

`BodyBudget` bounds the bytes of all bodies together, from the first byte of a body until its job is built.

The event loop stays responsive under two conditions: a job releases the interpreter lock now and then (Python code
does, a decoder in C does not), and the input of a decoder in C is small enough (api/shape.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from kvist.errors import Overloaded
from kvist.fairness import CallerCounts, CallerPath, FairQueue

T = TypeVar("T")

INLINE_BYTES = 4096  # handling a body up to this size costs less than a switch to a thread and back


@dataclass(slots=True, eq=False)
class _Job:
    number: int
    caller: CallerPath
    call: Callable[[], Any]
    result: asyncio.Future[Any]
    is_waiting: bool = True


class WorkPool:
    """Mutable; owned by one event loop. Callers are served in turn: long prompts of one caller do not delay others."""

    def __init__(self, *, num_threads: int, max_waiting: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="kvist-work")
        self._num_idle = num_threads
        self._max_waiting = max_waiting
        self._waiting: FairQueue[_Job] = FairQueue(lambda job: job.number)
        self._waiting_by_caller = CallerCounts()  # waiting jobs of each caller
        self._num_jobs = 0  # so far
        self.num_waiting = 0

    async def run(self, caller: CallerPath, call: Callable[[], T]) -> T:
        """Return what `call` returns, or raise what it raises. Raises `Overloaded` when too many jobs wait: at once
        when the caller has its share of the places, otherwise the newest job of a caller with more gets the error.
        Cancelling removes a job that has not started; a running job continues and its result is dropped."""
        if self.num_waiting >= self._max_waiting:
            self._refuse_one(caller)
        return await self.run_admitted(caller, call)

    async def run_admitted(self, caller: CallerPath, call: Callable[[], T]) -> T:
        """Run work that an admitted request needs in order to finish. Unlike `run`, never refuses."""
        self._num_jobs += 1
        job = _Job(self._num_jobs, caller, call, asyncio.get_running_loop().create_future())
        self._waiting.add(caller, job)
        self._waiting_by_caller.add(caller)
        self.num_waiting += 1
        self._start()
        try:
            result: T = await job.result
        finally:
            if job.is_waiting:
                self._drop(job)
        return result

    def _refuse_one(self, newcomer: CallerPath) -> None:
        loser = self._waiting_by_caller.displaced_by(newcomer)
        refused = Overloaded(
            f"{self.num_waiting} long requests wait to be tokenised, which is the limit: retry later, or start the "
            "server with more --tokenizer-threads"
        )
        if loser is None:
            raise refused
        last = max((job for job in self._waiting if job.caller == loser), key=lambda job: job.number)
        self._drop(last)
        if not last.result.done():
            last.result.set_exception(refused)

    def _drop(self, job: _Job) -> None:
        """Remove a job that will not run; its caller keeps its turn."""
        self._waiting.remove(job.caller, job)
        self._count_out(job)

    def _count_out(self, job: _Job) -> None:
        job.is_waiting = False
        self._waiting_by_caller.remove(job.caller)
        self.num_waiting -= 1

    def _start(self) -> None:
        while self._num_idle and (job := self._waiting.head()) is not None:
            self._waiting.take(job.caller, job)
            self._count_out(job)
            self._num_idle -= 1
            self._threads.submit(job.call).add_done_callback(partial(self._post_result, job.result.get_loop(), job))

    def _post_result(self, loop: asyncio.AbstractEventLoop, job: _Job, done: Future[Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: no task waits for the result
            loop.call_soon_threadsafe(self._ended, job, done)

    def _ended(self, job: _Job, done: Future[Any]) -> None:
        self._num_idle += 1
        self._start()
        if job.result.done():  # cancelled
            return
        error = done.exception()
        if error is None:
            job.result.set_result(done.result())
        else:
            job.result.set_exception(error)


class BodyBudget:
    """Limits the bytes of all request bodies in memory. Mutable; changed by the event loop only.

    The first `free_bytes` of each body are not counted: the number of connections bounds them, and requests of the
    usual size must be accepted even while large bodies fill the budget.
    """

    def __init__(self, *, limit_bytes: int, free_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._free_bytes = free_bytes
        self.num_bytes = 0

    @contextlib.contextmanager
    def open(self) -> Iterator[BodyShare]:
        """Yield the share of one body, and return its bytes to the budget at the end."""
        share = BodyShare(self)
        try:
            yield share
        finally:
            self.num_bytes -= share.num_bytes

    def counted(self, num_bytes: int) -> int:
        return max(0, num_bytes - self._free_bytes)

    def take(self, num_bytes: int) -> None:
        if self.num_bytes + num_bytes > self._limit_bytes:
            raise Overloaded(
                f"large request bodies already take {self.num_bytes} bytes of the limit of {self._limit_bytes} "
                "(--max-total-body-bytes): retry later"
            )
        self.num_bytes += num_bytes


class BodyShare:
    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self.num_bytes = 0  # taken from the budget

    def reserve_up_to(self, num_bytes: int) -> None:
        """Reserve room for a body that has, or declares, `num_bytes` bytes. Raises `Overloaded` when the budget is
        exhausted."""
        more = self._budget.counted(num_bytes) - self.num_bytes
        if more > 0:
            self._budget.take(more)
            self.num_bytes += more
