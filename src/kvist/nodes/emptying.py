"""A store is emptied: every page moves to the other stores of the pool, or has a copy there already.

    1. a drain job of the master: the store gets no new pages from now on
    2. pages with a copy in this store's memory are moved by the store itself, in batches; the master's job, which would
       move 16 a second, moves one at a time, and ends when none is left
    3. pages that are on this store's SSD only are moved in the same way

A moved page is read, removed with all its copies, and put again with as many: workers that ask in between miss it.
Emptying has no limit of time of its own: `kvist store drain` has one, and a stop of the store cancels it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Protocol, TypeVar

from kvist.clock import Clock
from kvist.errors import Conflict, KvistError, Unavailable
from kvist.mooncake.master_admin import QUERY_KEYS, DrainJob, HeldPage, MasterAdmin, Segment

POLL_S = 0.25
MAX_SILENCE_S = 30.0  # of the master
BATCH_BYTES = 32 << 20  # moved in one call
MAX_PASSES = 5  # over the pages on the SSD: some may not find room at once
T = TypeVar("T")

logger = logging.getLogger(__name__)


class OnEnd(Protocol):
    def __call__(self, *, succeeded: bool) -> None: ...


class Emptying:
    """One attempt. Owned by the event loop; begins at once."""

    def __init__(
        self,
        admin: MasterAdmin,
        segment: Segment,
        *,
        session: str,
        move: Callable[[Sequence[HeldPage]], Awaitable[int]],
        on_end: OnEnd,
        clock: Clock,
    ) -> None:
        """`session`: of the store's engine. `move` moves pages to other stores, and returns how many have arrived."""
        self._admin, self._segment, self._session = admin, segment, session
        self._move, self._on_end, self._clock = move, on_end, clock
        self._job = DrainJob(success=True, status_name="CREATED")
        self._num_moved = self._num_moved_from_ssd = 0
        self._num_moved_bytes = 0
        self._num_left_on_ssd: int | None = None  # None: not counted yet
        self._error = ""
        self._task = asyncio.create_task(self._run(), name="emptying")

    @property
    def has_failed(self) -> bool:
        return self._task.done() and bool(self._error)

    def progress(self) -> dict[str, object]:
        return {
            "done": self._task.done() and not self._error,
            "error": self._error,
            "num_moved": self._num_moved + self._job.succeeded_units,
            "num_waiting": self._job.blocked_units,
            "num_moving": self._job.active_units,
            "moved_bytes": self._num_moved_bytes + self._job.migrated_bytes,
            "num_moved_from_ssd": self._num_moved_from_ssd,
            "num_left_on_ssd": self._num_left_on_ssd,
        }

    async def cancel(self) -> None:
        """End the attempt. A store that is not empty yet takes pages again."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        logger.info("emptying %s", self._segment.segment_name)
        try:
            await self._move_memory()
            await self._move_ssd()
        except asyncio.CancelledError:
            self._error = "the attempt was ended"
            await self._give_up()
            raise
        except KvistError as error:
            self._error = error.message
            logger.warning("emptying %s failed: %s", self._segment.segment_name, error.message)
            await self._give_up()
        else:
            logger.info(
                "emptied: %d pages moved from memory, %d from the SSD; this store can be stopped",
                self._num_moved + self._job.succeeded_units,
                self._num_moved_from_ssd,
            )
            self._on_end(succeeded=True)

    async def _give_up(self) -> None:
        """Let the store take pages again; a job that is done stays done."""
        with contextlib.suppress(KvistError):
            if self._job.job_id and not self._job.is_done:
                await asyncio.to_thread(self._admin.cancel_drain, self._job.job_id)
        self._on_end(succeeded=False)

    async def _move_memory(self) -> None:
        job = self._job = await asyncio.to_thread(self._admin.start_drain, [self._segment.segment_name])
        answered_s = self._clock.now_s()
        while not job.is_done:
            self._job = job
            if job.has_failed:
                reason = job.error_message or job.status_name
                raise Unavailable(f"the master cannot move the pages ({reason}): are there other stores with room?")
            try:
                await self._move_pages_in_memory()
                await asyncio.sleep(POLL_S)
                job = await asyncio.to_thread(self._admin.drain_job, job.job_id)
                answered_s = self._clock.now_s()
            except KvistError:
                if self._clock.now_s() - answered_s > MAX_SILENCE_S:
                    raise
                await asyncio.sleep(POLL_S)
        self._job = job

    async def _move_pages_in_memory(self) -> None:
        """Go once over all pages of the pool."""
        async for held in self._batches(partial(self._admin.in_memory_of, self._session)):
            num_moved = await self._move(held)
            self._num_moved += num_moved
            self._num_moved_bytes += sum(page.num_bytes for page in held) * num_moved // len(held)

    async def _batches(self, find: Callable[[Sequence[str]], list[HeldPage]]) -> AsyncIterator[list[HeldPage]]:
        """Yield the pages that `find` finds among the keys of the pool, in batches of about `BATCH_BYTES`."""
        keys = self._admin.keys()
        while some := await asyncio.to_thread(_take, keys, QUERY_KEYS):
            held = await asyncio.to_thread(find, some)
            while held:
                ends = itertools.accumulate(page.num_bytes for page in held)
                num = max(1, sum(1 for end in ends if end <= BATCH_BYTES))
                yield held[:num]
                held = held[num:]

    async def _move_ssd(self) -> None:
        for _ in range(MAX_PASSES):
            num_left = 0
            async for held in self._batches(partial(self._admin.only_on_disk_of, self._segment.client_id)):
                num_moved = await self._move(held)
                self._num_moved_from_ssd += num_moved
                num_left += len(held) - num_moved
            self._num_left_on_ssd = num_left
            if not num_left:
                return
        raise Unavailable(f"{num_left} pages on the SSD of this store found no room in other stores: add a store first")


def check_room(store: Segment, segments: Sequence[Segment]) -> None:
    """Raise `Conflict` unless the pages in the memory of `store` fit into the free memory of the other stores."""
    others = [one for one in segments if one.segment_name != store.segment_name and one.status == "OK"]
    free_bytes = sum(one.size_bytes - one.allocator_used_bytes for one in others)
    if not others or free_bytes < store.allocator_used_bytes:
        raise Conflict(
            f"the {store.allocator_used_bytes / 1e9:.3g} GB of {store.segment_name} do not fit into the other stores "
            f"({len(others)}, with {free_bytes / 1e9:.3g} GB free): add a store first"
        )


def _take(keys: Iterator[str], num: int) -> list[str]:
    return list(islice(keys, num))
