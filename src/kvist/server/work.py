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
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from kvist.errors import Overloaded

T = TypeVar("T")

INLINE_BYTES = 4096  # a body of this size costs less than the way to a thread and back


class WorkPool:
    """Used by one event loop."""

    def __init__(self, *, num_threads: int, max_jobs: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="kvist-work")
        self._max_jobs = max_jobs
        self._lock = threading.Lock()
        self._num_jobs = 0  # waiting or running; changed by the loop and by the threads

    @property
    def num_jobs(self) -> int:
        return self._num_jobs

    async def run(self, call: Callable[[], T]) -> T:
        """What `call` returns or raises. Raises `Overloaded` at once when too many jobs wait. Cancelling takes a job
        that has not begun out of the line; one that has goes on to its end, unheard."""
        if self._num_jobs >= self._max_jobs:
            raise Overloaded(
                f"{self._num_jobs} requests wait to be tokenised, the most this server lets wait: retry later, or give "
                "it more --tokenizer-threads"
            )
        return await self.finish(call)

    async def finish(self, call: Callable[[], T]) -> T:
        """As `run`, for what a request that was admitted needs in order to end: never refused."""
        with self._lock:
            self._num_jobs += 1
        future = self._threads.submit(call)
        future.add_done_callback(self._ended)
        return await asyncio.wrap_future(future)

    def _ended(self, future: Future[T]) -> None:
        del future
        with self._lock:
            self._num_jobs -= 1


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

    def grow_to(self, num_bytes: int) -> None:
        """The body has, or says that it will have, so many bytes. Raises `Overloaded` when there is no room."""
        more = self._budget.counted(num_bytes) - self.num_bytes
        if more > 0:
            self._budget.take(more)
            self.num_bytes += more
