"""One attempt to serve one request: its engines, their output, and its reader.

Life: launched (Submit sent) → chunks arrive → complete, failed, or closed by its reader → every engine sent Ended (or
is lost) → removed. Engines push chunks and one reader waits for them; chunks that arrive together wake the reader once.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from kvist.errors import KvistError
from kvist.request import EngineRequest, RequestId
from kvist.router.handoff_ways import HandoffWay, Way
from kvist.router.merge import ChunkMerger
from kvist.router.policy import Reason
from kvist.router.registry import Worker
from kvist.router.stream import StreamPart
from kvist.wire import StoredPages, TokenChunk

MAX_CONTINUED = 2  # decode workers that may get the request one after the other


@dataclass(slots=True, kw_only=True, eq=False)
class Attempt:
    """State of one attempt. Mutable; owned by the dispatcher. In mode FULL prefill and decode are the same worker."""

    request_id: RequestId  # id of this attempt at the engines
    prefill: Worker
    decode: Worker
    merger: ChunkMerger
    request: EngineRequest  # with the client's id
    reason: Reason  # of the choice of these workers
    cost_ms: float | None = None  # of the route, if the policy measures it
    open: set[Worker] = field(default_factory=set)  # engines that have the request and have not sent Ended
    decode_began: bool = False  # decode has the pages: a later failure of prefill has no effect
    handoff: HandoffWay | None = None  # of a pair
    first_token_ids: tuple[int, ...] = ()  # that prefill sent, if the handoff is through the store
    stored: StoredPages | None = None  # what prefill has stored
    num_continued: int = 0  # submits to decode, if the handoff is through the store
    aborted: bool = False
    cancelled: bool = False  # closed by its reader before the end
    error: KvistError | None = None
    failed_worker: Worker | None = None  # the worker that failed with `error`
    closed_at_s: float | None = None  # when the reader ended or closed the stream
    _waiter: asyncio.Future[None] | None = None

    @property
    def through_store(self) -> bool:
        return self.handoff is not None and self.handoff.way is Way.STORE

    @property
    def may_continue(self) -> bool:
        """Whether decode can get the request now: the handoff is through the store, and the first token is known."""
        waits = not self.decode_began and self.num_continued < MAX_CONTINUED
        return self.through_store and waits and bool(self.first_token_ids) and not self.settled

    @property
    def settled(self) -> bool:
        """Whether the reader's outcome is final."""
        return self.merger.complete or self.error is not None or self.closed_at_s is not None

    def push(self, worker: Worker, chunk: TokenChunk) -> None:
        if self.settled:
            return
        if worker is self.decode:
            self.decode_began = True
        elif self.through_store:
            self.first_token_ids += chunk.token_ids
        if self.merger.push(chunk):
            self._wake()

    def fail(self, error: KvistError, failed_worker: Worker | None) -> None:
        if not self.settled:
            self.error, self.failed_worker = error, failed_worker
            self._wake()

    async def next_part(self) -> StreamPart | None:
        """Return the next output; None after the last. Raises the attempt's error after all earlier output."""
        while not self.merger.has_ready:
            if self.error is not None:
                raise self.error
            if self.merger.complete:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        chunk = self.merger.take()
        assert chunk is not None
        return StreamPart(
            chunk=chunk,
            prefill_worker=self.prefill.worker_id,
            decode_worker=self.decode.worker_id,
            handoff=self.handoff,
            stored=self.stored,
            reason=self.reason,
            cost_ms=self.cost_ms,
        )

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
