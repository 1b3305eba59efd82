"""One open stream: the request of a client, the answer so far, and the attempt that goes on with it. PURE.

Life of an attempt: launched (Submit sent) → its chunks reach the stream → complete, or over because a worker failed or
the reader left → every worker sent Ended (or is lost) → forgotten. A stream outlives its attempts: the next one, with
another request id, goes on after the tokens that arrived in order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from kvist.errors import KvistError
from kvist.flight.handoff_report import StoredPages
from kvist.flight.timeline import Timeline
from kvist.request import EngineRequest, RequestId
from kvist.router.failover import Trouble
from kvist.router.handoff_ways import Way
from kvist.router.merge import ChunkMerger
from kvist.router.placement import ANYWHERE, Placement
from kvist.router.registry import Worker
from kvist.router.route import Route
from kvist.router.stream import StreamPart


@dataclass(slots=True, kw_only=True, eq=False)
class Attempt:
    """State of one attempt. Mutable; owned by `Streams`. On one worker alone, prefill and decode are the same."""

    request_id: RequestId  # of this attempt at the workers
    stream: OpenStream
    route: Route
    open: set[Worker] = field(default_factory=set)  # have the request and have not sent Ended
    decode_began: bool = False  # decode has the pages: a later failure of prefill has no effect
    num_before: int = 0  # tokens of the stream before this attempt
    at_decode: bool = False  # decode has got the request, if the handoff is through the store
    over: bool = False  # what its workers still send is ignored
    cancelled_at_s: float | None = None  # when its reader left before the end

    @property
    def prefill(self) -> Worker:
        return self.route.prefill

    @property
    def decode(self) -> Worker:
        return self.route.decode

    @property
    def num_new_tokens(self) -> int:
        return len(self.stream.merger.token_ids) - self.num_before

    @property
    def through_store(self) -> bool:
        return self.route.handoff is not None and self.route.handoff.way is Way.STORE

    def needs(self, worker: Worker) -> bool:
        """Return whether the stream cannot go on in this attempt without what the worker has not sent yet."""
        return worker is self.decode or not self.decode_began or self.stream.merger.has_gap


@dataclass(slots=True, kw_only=True, eq=False)
class OpenStream:
    """State of one stream. Mutable; owned by `Streams`."""

    request: EngineRequest  # with the client's id
    merger: ChunkMerger
    placement: Placement = ANYWHERE
    timeline: Timeline | None = None  # None: not recorded
    attempt: Attempt | None = None  # the newest; None only before the first
    trouble: Trouble = field(default_factory=Trouble)
    stored: StoredPages | None = None  # of its prompt, if an attempt handed it over through the store
    error: KvistError | None = None
    closed: bool = False  # the reader ended or closed it

    @property
    def settled(self) -> bool:
        """Whether the reader's outcome is final."""
        return self.merger.complete or self.error is not None or self.closed

    def rest(self) -> EngineRequest:
        """Return the request for the part of the answer that is missing."""
        output = self.merger.token_ids
        if not output:
            return self.request
        return msgspec.structs.replace(self.request, output_token_ids=(*self.request.output_token_ids, *output))

    def take(self) -> StreamPart | None:
        """Remove and return the output that the reader has not taken; None if there is none."""
        chunk = self.merger.take()
        if chunk is None:
            return None
        assert self.attempt is not None
        route = self.attempt.route
        return StreamPart(
            chunk=chunk,
            prefill_worker=route.prefill.worker_id,
            decode_worker=route.decode.worker_id,
            handoff=route.handoff,
            stored=self.stored,
            reason=route.reason,
            cost_ms=route.cost_ms,
            num_failovers=self.trouble.num_failovers,
        )
