"""Runs what takes long beside the event loop, and keeps count of what it may cost.

`WorkPool` has a few threads. A request's body, once read, becomes a job there when it is more than a little: decoding,
the chat template, tokenising, checks of lists. Such work is refused when too much of it waits. What a request needs
that was admitted long ago (the JSON of a long answer) is never refused: admission has bounded it.

`BodyBudget` bounds the bytes of all bodies together, from their first byte until their job is made.

Two things must hold for the loop to stay quick: a call here lets go of the interpreter lock now and then (Python code
does; a decoder in C does not), and what a decoder in C is given is small enough (shape.py).
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

INLINE_BYTES = 4096  # a body of this size costs less than the way to a thread and back


@dataclass(slots=True, eq=False)
class _Job:
    number: int
    caller: CallerPath
    call: Callable[[], Any]
    result: asyncio.Future[Any]
    is_waiting: bool = True


class WorkPool:
    """Owned by one event loop. Callers take turns, so that a flood of one's long prompts does not delay another's."""

    def __init__(self, *, num_threads: int, max_waiting: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="kvist-work")
        self._num_idle = num_threads
        self._max_waiting = max_waiting
        self._waiting: FairQueue[_Job] = FairQueue(lambda job: job.number)
        self._waiting_by_caller = CallerCounts()  # of those that wait
        self._num_jobs = 0  # so far
        self.num_waiting = 0

    async def run(self, caller: CallerPath, call: Callable[[], T]) -> T:
        """What `call` returns or raises. Raises `Overloaded` when too many jobs wait: at once for a caller that has its
        share of the places, else later for the last one of a caller that has more. Cancelling takes a job that has not
        begun out of the line; one that has goes on to its end, unheard."""
        if self.num_waiting >= self._max_waiting:
            self._refuse_one(caller)
        return await self.run_admitted(caller, call)

    async def run_admitted(self, caller: CallerPath, call: Callable[[], T]) -> T:
        """As `run`, for what a request that was admitted needs in order to end: never refused."""
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
            f"{self.num_waiting} long requests wait to be tokenised, the most this server allows: retry later, or "
            "start the server with more --tokenizer-threads"
        )
        if loser is None:
            raise refused
        last = max((job for job in self._waiting if job.caller == loser), key=lambda job: job.number)
        self._drop(last)
        if not last.result.done():
            last.result.set_exception(refused)

    def _drop(self, job: _Job) -> None:
        job.is_waiting = False
        self._waiting.remove(job.caller, job)
        self._waiting_by_caller.remove(job.caller)
        self.num_waiting -= 1

    def _start(self) -> None:
        while self._num_idle and (job := self._waiting.head()) is not None:
            self._waiting.take(job.caller, job)
            self._waiting_by_caller.remove(job.caller)
            job.is_waiting = False
            self.num_waiting -= 1
            self._num_idle -= 1
            self._threads.submit(job.call).add_done_callback(partial(self._post_result, job.result.get_loop(), job))

    def _post_result(self, loop: asyncio.AbstractEventLoop, job: _Job, done: Future[Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
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
    """Bytes that the bodies of all requests may hold together. Changed by the event loop only.

    The first `free_bytes` of each body are not counted: the server bounds how many connections there are, and requests
    of the usual size must get in while somebody fills the budget with large ones.
    """

    def __init__(self, *, limit_bytes: int, free_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._free_bytes = free_bytes
        self.num_bytes = 0

    @contextlib.contextmanager
    def open(self) -> Iterator[BodyShare]:
        """The share of one body, given back at the end."""
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
                f"the bodies of large requests hold {self.num_bytes} bytes already and may hold {self._limit_bytes} "
                "together (--max-total-body-bytes): retry later"
            )
        self.num_bytes += num_bytes


class BodyShare:
    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self.num_bytes = 0  # taken from the budget

    def reserve_up_to(self, num_bytes: int) -> None:
        """The body has, or says that it will have, so many bytes. Raises `Overloaded` when there is no room."""
        more = self._budget.counted(num_bytes) - self.num_bytes
        if more > 0:
            self._budget.take(more)
            self.num_bytes += more
