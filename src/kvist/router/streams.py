"""The dispatcher's decisions. PURE: events and times in; messages to workers, and streams with something to read, out.

Life of a stream: route (route.py) → Submit to one worker, or to a prefill and a decode worker → chunks merged in order
(open_stream.py) → exactly one end: the chunk with the finish reason, or an error. If a worker fails before that, the
stream waits for a route and goes on after its last token, in a new attempt (failover.py has the limits). After any end,
every worker that has not sent Ended gets an Abort, so that no worker computes tokens without a reader.

The owner (dispatch.py, or a simulation) calls one method for each event, sends what is in `sends`, reports a Submit
that could not be sent, lets the readers of `woken` read, and calls `on_time` when `next_deadline_s` has come.
"""

from __future__ import annotations

import enum
import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import msgspec

from kvist import wire
from kvist.bounded_log import BoundedLog
from kvist.errors import (
    EngineError,
    HandoffFailed,
    KvistError,
    Overloaded,
    PoisonousRequest,
    RequestError,
    Timeout,
    Unavailable,
    WorkerLost,
    error_from_wire,
)
from kvist.fairness import caller_path
from kvist.flight.timeline import SentTo, Timeline
from kvist.metrics import Histogram
from kvist.plan.compat import peer_spec
from kvist.request import EngineRequest, HandoffId, Mode, Outcome, RequestId
from kvist.router.checks import checked_retry_after_s, fault_of_chunk, fault_of_prompt_logprobs
from kvist.router.config import LinkOptions
from kvist.router.deadlines import Deadlines
from kvist.router.failover import Trouble, error_after_wait, final_error, may_wait
from kvist.router.handoff_ways import Way, WayCause
from kvist.router.merge import ChunkMerger
from kvist.router.open_stream import Attempt, OpenStream
from kvist.router.placement import ANYWHERE, Placement
from kvist.router.policy import Reason
from kvist.router.registry import Worker, WorkerState
from kvist.router.route import Route, Router
from kvist.router.stream import Decision, FailoverCounts

logger = logging.getLogger(__name__)

END_TIMEOUT_S = 30.0  # time limit for Ended after an Abort, which an engine handles between two steps
MAX_WAITING_LOGPROBS = 1 << 16  # limit of one stream: 5 MB waiting for its client
RETRY_S = 0.25  # between two searches for a worker that goes on with a stream
MAX_DECISIONS = 64  # that are remembered
_MOST_TRIED = 16  # streams that look for a worker in one call of `on_time`: about 5 ms

Send = tuple[Worker, wire.Submit | wire.Abort]


class _Due(enum.Enum):
    TIMEOUT = enum.auto()  # the stream's time is over
    TRY = enum.auto()  # the stream looks for a worker, first
    RETRY = enum.auto()  # ... and again
    RELEASE = enum.auto()  # the workers of an attempt should have sent Ended


@dataclass(slots=True, kw_only=True)
class StreamCounts:
    """Counts of the streams of a gateway. Mutable; owned by `Streams`."""

    num_routes: Counter[Reason]
    num_handoffs: Counter[tuple[Way, WayCause]]
    failovers: FailoverCounts
    release_s: Histogram  # from the reader's disconnect to the end at every worker
    num_cancelled_held: int = 0


class Streams:
    """All open streams of a gateway. Mutable, with one owner."""

    def __init__(self, links: LinkOptions, router: Router, new_id: Callable[[], str]) -> None:
        """`new_id` returns another text each time, which no other gateway uses."""
        self._links = links
        self._router = router
        self._new_id = new_id
        self._log = BoundedLog(logger)
        self._attempts: dict[RequestId, Attempt] = {}  # that some worker has not ended
        self._waiting: set[OpenStream] = set()  # for a worker that goes on with them
        self._deadlines: Deadlines[_Due, OpenStream | Attempt] = Deadlines(
            {_Due.TIMEOUT: links.request_timeout_s, _Due.TRY: 0.0, _Due.RETRY: RETRY_S, _Due.RELEASE: END_TIMEOUT_S}
        )
        self.sends: list[Send] = []
        self.woken: list[OpenStream] = []
        self.decisions: deque[Decision] = deque(maxlen=MAX_DECISIONS)
        self.counts = StreamCounts(
            num_routes=Counter(dict.fromkeys(Reason, 0)),
            num_handoffs=Counter(),
            failovers=FailoverCounts(),
            release_s=Histogram(),
        )

    @property
    def num_open(self) -> int:
        """Number of attempts that some worker has not ended, and of streams that wait for a worker."""
        return len(self._attempts) + len(self._waiting)

    @property
    def next_deadline_s(self) -> float | None:
        return self._deadlines.next_s()

    # ---------------------------------------------------------------- events of readers

    def begin(
        self,
        request: EngineRequest,
        now_s: float,
        placement: Placement = ANYWHERE,
        timeline: Timeline | None = None,
    ) -> OpenStream:
        """Open a stream, and note its stages in `timeline`. Raises `PromptTooLong`, `Unavailable`, `Overloaded`."""
        route = self._router.choose(request, placement=placement)
        merger = ChunkMerger(request.request_id, len(request.output_token_ids))
        stream = OpenStream(request=request, merger=merger, placement=placement, timeline=timeline)
        self._deadlines.set(_Due.TIMEOUT, stream, now_s)
        self._launch(stream, request, route, now_s)
        return stream

    def on_reader_gone(self, stream: OpenStream, now_s: float) -> None:
        """Handle the end of the reader: after the last part, on an error, or by a disconnect."""
        attempt = stream.attempt
        assert attempt is not None
        if not stream.settled:
            if attempt.request_id in self._attempts:
                attempt.cancelled_at_s = now_s
                self.counts.num_cancelled_held += 1
            self._give_up(attempt, now_s)
        stream.closed = True
        self._deadlines.cancel(_Due.TIMEOUT, stream)
        self._stop_waiting(stream)
        if attempt.open:
            self._deadlines.set(_Due.RELEASE, attempt, now_s)
        self._forget_if_ended(attempt, now_s)

    def end_all(self, error: KvistError, now_s: float) -> None:
        """End every open stream with this error."""
        for stream in {attempt.stream for attempt in self._attempts.values()} | self._waiting:
            self._end(stream, error, now_s)

    # ---------------------------------------------------------------- events of workers

    def on_outputs(self, worker: Worker, outputs: wire.StepOutputs, now_s: float) -> None:
        attempts = self._attempts
        assert worker.spec is not None
        vocab_size = worker.spec.vocab_size
        for chunk in outputs.chunks:
            attempt = attempts.get(chunk.request_id)
            if attempt is None or attempt.over or worker not in attempt.open:
                continue
            stream = attempt.stream
            fault = fault_of_chunk(chunk, stream.request.sampling, vocab_size=vocab_size)
            if chunk.prompt_logprobs and fault is None:
                num_known = stream.merger.num_prompt_logprobs
                fault = fault_of_prompt_logprobs(chunk, stream.request, num_known=num_known, vocab_size=vocab_size)
            if fault is not None:
                self._reject(worker, fault)
                message = f"worker {worker.worker_id} sent {fault}; this is a bug in the worker"
                self._end(stream, EngineError(message), now_s)
                continue
            self._push(attempt, worker, chunk, now_s)
        for ended in outputs.ended:
            attempt = attempts.get(ended.request_id)
            if attempt is not None and worker in attempt.open:
                self._on_ended(attempt, worker, ended, now_s)

    def on_lost(self, worker: Worker, reason: str, now_s: float) -> None:
        """Handle the death of a worker, or of the connection to it: its streams go on elsewhere."""
        for request_id in list(worker.in_flight):
            attempt = self._attempts.get(request_id)
            worker.release(request_id)
            if attempt is not None:
                attempt.open.discard(worker)
                lost = WorkerLost(f"worker {worker.worker_id} was lost while it had the request: {reason}")
                self._on_failure(attempt, worker, lost, now_s)

    def on_unsent(self, worker: Worker, submit: wire.Submit, now_s: float) -> None:
        """Handle a Submit that could not be sent."""
        attempt = self._attempts.get(submit.request.request_id)
        if attempt is not None and worker in attempt.open:
            self._release(attempt, worker)
            unsent = WorkerLost(f"worker {worker.worker_id} cannot be reached")
            self._on_failure(attempt, worker, unsent, now_s, avoided=(frozenset({worker}),), has_run=False)

    def on_time(self, now_s: float) -> None:
        """Handle the deadlines that have come: all, or as many as take a few milliseconds."""
        for stream in self._deadlines.take_due(_Due.TIMEOUT, now_s):
            assert isinstance(stream, OpenStream)
            self._end(stream, Timeout("the request took longer than --request-timeout-s allows"), now_s)
        for attempt in self._deadlines.take_due(_Due.RELEASE, now_s):
            assert isinstance(attempt, Attempt)
            self._on_never_ended(attempt, now_s)
        for due in (_Due.TRY, _Due.RETRY):
            for stream in self._deadlines.take_due(due, now_s, most=_MOST_TRIED):
                assert isinstance(stream, OpenStream)
                self._look_for_worker(stream, now_s, again=due is _Due.RETRY)

    def _push(self, attempt: Attempt, worker: Worker, chunk: wire.TokenChunk, now_s: float) -> None:
        stream, merger = attempt.stream, attempt.stream.merger
        if chunk.token_ids and not (attempt.decode_began and worker is attempt.route.decode):
            worker.prompt_done(chunk.request_id)
            attempt.decode_began |= worker is attempt.route.decode
        if chunk.handoff is not None and worker is attempt.route.decode:
            worker.meter.on_handoff(chunk.handoff)
        timeline = stream.timeline
        if timeline is not None:
            if chunk.stages:
                timeline.lay(chunk.stages, now_s, worker.worker_id)
            if chunk.token_ids:
                timeline.token_s = now_s
        if not merger.push(chunk):
            return
        self.woken.append(stream)
        if stream.trouble.num_failovers:
            self._on_progress(attempt, now_s)
        if merger.num_logprobs > MAX_WAITING_LOGPROBS:
            slow = f"the client reads its stream too slowly: more than {MAX_WAITING_LOGPROBS} logprobs are waiting"
            self._end(
                stream, RequestError(f"{slow}. Read faster, or request fewer top logprobs", param="logprobs"), now_s
            )

    def _on_progress(self, attempt: Attempt, now_s: float) -> None:
        trouble, failovers = attempt.stream.trouble, self.counts.failovers
        if trouble.since_s is not None:
            failovers.pause_s.observe(now_s - trouble.since_s)
            failovers.num_resumed += 1
            trouble.since_s = None
        trouble.on_progress(attempt.num_new_tokens)

    def _on_ended(self, attempt: Attempt, worker: Worker, ended: wire.Ended, now_s: float) -> None:
        self._release(attempt, worker)
        stream = attempt.stream
        stream.stored = ended.stored or stream.stored
        is_over = attempt.over or stream.settled
        if is_over or (ended.outcome is not Outcome.FINISHED and not attempt.needs(worker)):
            pass
        elif ended.outcome is Outcome.FAILED:
            if ended.stages and stream.timeline is not None:
                stream.timeline.lay(ended.stages, now_s, worker.worker_id)
            error = error_from_wire(ended.error_code or EngineError.code, ended.message)
            error.retry_after_s = checked_retry_after_s(ended.retry_after_s)
            has_run, avoided = not isinstance(error, Overloaded), _avoided(attempt, worker, error)
            self._on_failure(attempt, worker, error, now_s, avoided=avoided, has_run=has_run)
        elif ended.outcome is Outcome.ABORTED:
            aborted = Unavailable(f"worker {worker.worker_id} aborted the request: {ended.message}")
            self._on_failure(attempt, worker, aborted, now_s, avoided=(frozenset({worker}),))
        elif attempt.through_store and not attempt.at_decode and stream.merger.token_ids:
            self._send_to_decode(attempt, now_s)
        elif not attempt.open:
            self._end(stream, EngineError("every engine ended the request before its last token arrived"), now_s)
        self._forget_if_ended(attempt, now_s)

    def _reject(self, worker: Worker, fault: str) -> None:
        worker.num_rejected_messages += 1
        self._log.warning("rejected a message of worker %s: %s", worker.worker_id, fault)

    # ---------------------------------------------------------------- attempts

    def _launch(self, stream: OpenStream, request: EngineRequest, route: Route, now_s: float) -> None:
        """Start an attempt. `request`: the part of the answer that is missing."""
        request_id = RequestId(f"{request.request_id}.{self._new_id()}")
        attempt = stream.attempt = Attempt(
            request_id=request_id, stream=stream, route=route, num_before=len(stream.merger.token_ids)
        )
        counts, self._attempts[request_id] = self.counts, attempt
        counts.num_routes[route.reason] += 1
        self.decisions.append(
            Decision(
                request_id=request.request_id,
                decided_s=now_s,
                reason=route.reason,
                cost_ms=route.cost_ms,
                way=None if route.handoff is None else route.handoff.way,
                prefill=route.prefill.worker_id,
                decode=route.decode.worker_id,
                num_prompt_tokens=len(route.token_ids),
                num_failovers=stream.trouble.num_failovers,
                considered=route.considered,
            )
        )
        self._router.remember(stream.placement, route)
        sent = msgspec.structs.replace(request, request_id=request_id)
        if stream.timeline is not None:
            error = stream.trouble.error
            problem = None if error is None else error.message
            stream.timeline.on_submit(now_s, _sent_to(route, request_id), problem)
        if route.handoff is not None and route.handoff.way is not None:
            counts.num_handoffs[route.handoff.way, route.handoff.cause] += 1
        if route.mode is Mode.FULL or attempt.through_store:
            way: wire.HandoffWay = "store" if attempt.through_store or stream.stored is not None else "direct"
            self._submit(attempt, route.prefill, wire.Submit(request=sent, mode=route.mode, handoff=way))
            return
        spec, target = route.prefill.spec, route.decode.spec
        assert spec is not None
        assert target is not None
        handoff_id = HandoffId(self._new_id())
        peer = wire.PrefillPeer(
            worker_id=spec.worker_id, endpoint=route.prefill.endpoint, epoch=spec.epoch, spec=peer_spec(spec)
        )
        submit = wire.Submit(request=sent, mode=Mode.PREFILL, handoff_id=handoff_id, target_epoch=target.epoch)
        self._submit(attempt, route.prefill, submit)
        submit = wire.Submit(request=sent, mode=Mode.DECODE, handoff_id=handoff_id, prefill=peer)
        self._submit(attempt, route.decode, submit)

    def _send_to_decode(self, attempt: Attempt, now_s: float) -> None:
        """Send decode a request whose pages prefill has stored."""
        decode, stream = attempt.decode, attempt.stream
        if decode.state is not WorkerState.READY:
            gone = WorkerLost(f"worker {decode.worker_id} was lost before it got the request")
            self._on_failure(attempt, decode, gone, now_s, has_run=False)
            return
        attempt.at_decode = True
        if stream.timeline is not None:
            stream.timeline.on_stored(now_s, attempt.prefill.worker_id)
        request = msgspec.structs.replace(stream.rest(), request_id=attempt.request_id)
        self._submit(attempt, decode, wire.Submit(request=request, mode=Mode.FULL, handoff="store"))

    def _submit(self, attempt: Attempt, worker: Worker, submit: wire.Submit) -> None:
        request, route = submit.request, attempt.route
        num_left = 0 if submit.mode is Mode.DECODE else route.num_prompt_tokens_left
        if attempt.at_decode:
            assert worker.spec is not None
            stored = attempt.stream.stored
            num_stored = 0 if stored is None else stored.num_stored * worker.spec.page_size
            num_left = max(1, request.num_prompt_tokens + len(request.output_token_ids) - num_stored)
        attempt.open.add(worker)
        worker.take(attempt.request_id, num_left, caller_path(request.client))
        if submit.mode is not Mode.DECODE:
            worker.coming.add(attempt.request_id, route.token_ids, request.cache_salt)
        self.sends.append((worker, msgspec.structs.replace(submit, num_uncomputed_tokens=num_left)))

    def _on_failure(
        self,
        attempt: Attempt,
        worker: Worker,
        error: KvistError,
        now_s: float,
        *,
        avoided: tuple[frozenset[Worker], ...] = (),
        has_run: bool = True,
    ) -> None:
        """Let the stream of an attempt go on elsewhere, if it needs to and may. `avoided`: see `Trouble`; `has_run`:
        see `final_error`."""
        stream, trouble = attempt.stream, attempt.stream.trouble
        if attempt.over or stream.settled or not attempt.needs(worker):
            self._forget_if_ended(attempt, now_s)
            return
        self._give_up(attempt, now_s)
        has_begun, limit = bool(stream.merger.token_ids), self._links.migration_limit
        ending = final_error(trouble, error, has_begun=has_begun, has_run=has_run, limit=limit)
        is_first = trouble.since_s is None  # in this pause
        if ending is None and not has_run and not is_first and now_s >= trouble.wait_until_s:
            ending = self._error_after_wait(trouble, error.message)
        if ending is not None:
            if ending.retryable and ending.retry_after_s is None:
                ending.retry_after_s = self._links.retry_after_s
            self._end_unresumed(stream, ending, now_s)
            return
        logger.info("request %s goes on elsewhere: %s", stream.request.request_id, error.message)
        if stream.timeline is not None:
            stream.timeline.on_failure()
        if is_first:
            trouble.since_s = now_s
        if is_first or has_run:
            trouble.wait_until_s = now_s + self._links.migration_timeout_s
        trouble.avoided = list(avoided)
        stream.merger.restart()
        self._waiting.add(stream)
        self._deadlines.set(_Due.TRY if is_first else _Due.RETRY, stream, now_s)

    def _look_for_worker(self, stream: OpenStream, now_s: float, *, again: bool) -> None:
        trouble, request, is_stored = stream.trouble, stream.rest(), stream.stored is not None
        assert trouble.error is not None
        reason = trouble.error
        excluded = trouble.avoided or [frozenset()]
        for each in [*excluded, frozenset[Worker]()] if again and trouble.avoided else excluded:
            try:
                route = self._router.choose(request, each, placement=stream.placement, is_stored=is_stored)
            except KvistError as problem:
                reason = problem
                continue
            self._stop_waiting(stream)
            self.counts.failovers.by_cause[trouble.error.code] += 1
            trouble.num_failovers += 1
            self._launch(stream, request, route, now_s)
            return
        if not may_wait(trouble.error, has_begun=bool(stream.merger.token_ids)):
            self._end_unresumed(stream, trouble.error, now_s)
        elif now_s + RETRY_S > trouble.wait_until_s:
            self._end_unresumed(stream, self._error_after_wait(trouble, reason.message), now_s)
        else:
            self._deadlines.set(_Due.RETRY, stream, now_s)

    def _error_after_wait(self, trouble: Trouble, reason: str) -> KvistError:
        links = self._links
        return error_after_wait(trouble, reason, waited_s=links.migration_timeout_s, retry_after_s=links.retry_after_s)

    def _end_unresumed(self, stream: OpenStream, error: KvistError, now_s: float) -> None:
        if self._links.migration_limit and (error.retryable or isinstance(error, PoisonousRequest)):
            self.counts.failovers.num_failed += 1
        self._end(stream, error, now_s)

    # ---------------------------------------------------------------- ends

    def _end(self, stream: OpenStream, error: KvistError, now_s: float) -> None:
        if not stream.settled:
            stream.error = error
            if stream.timeline is not None:
                stream.timeline.ends_early(now_s)
            self._stop_waiting(stream)
            assert stream.attempt is not None
            self._give_up(stream.attempt, now_s)
            self.woken.append(stream)

    def _stop_waiting(self, stream: OpenStream) -> None:
        self._waiting.discard(stream)
        self._deadlines.cancel(_Due.TRY, stream)
        self._deadlines.cancel(_Due.RETRY, stream)

    def _give_up(self, attempt: Attempt, now_s: float) -> None:
        """Send Abort to every worker that still has the request; each answers with Ended, or is lost."""
        if attempt.over:
            return
        attempt.over = True
        self.sends += [(worker, wire.Abort(request_id=attempt.request_id)) for worker in attempt.open]
        if attempt.open:
            self._deadlines.set(_Due.RELEASE, attempt, now_s)
        self._forget_if_ended(attempt, now_s)

    def _release(self, attempt: Attempt, worker: Worker) -> None:
        attempt.open.discard(worker)
        worker.release(attempt.request_id)

    def _on_never_ended(self, attempt: Attempt, now_s: float) -> None:
        """Forget a request whose worker has not sent Ended for `END_TIMEOUT_S`: the message was lost."""
        for worker in list(attempt.open):
            logger.warning(
                "given up: worker %s did not confirm the end of request %s", worker.worker_id, attempt.request_id
            )
            self.sends.append((worker, wire.Abort(request_id=attempt.request_id)))
            self._release(attempt, worker)
        self._forget_if_ended(attempt, now_s)

    def _forget_if_ended(self, attempt: Attempt, now_s: float) -> None:
        if attempt.open or self._attempts.pop(attempt.request_id, None) is None:
            return
        self._deadlines.cancel(_Due.RELEASE, attempt)
        if attempt.cancelled_at_s is not None:
            self.counts.num_cancelled_held -= 1
            self.counts.release_s.observe(now_s - attempt.cancelled_at_s)


def _sent_to(route: Route, request_id: RequestId) -> SentTo:
    prefill, decode = route.prefill, route.decode
    is_queued = partial(prefill.is_queued, request_id)
    return SentTo(prefill=prefill.worker_id, decode=decode.worker_id, is_queued=is_queued)


def _avoided(attempt: Attempt, worker: Worker, error: KvistError) -> tuple[frozenset[Worker], ...]:
    """Return the workers to avoid after an error that a worker reported. The cause of a failed handoff may be either
    worker, or the link between the two."""
    pair = {attempt.prefill, attempt.decode}
    if len(pair) == 1 or not isinstance(error, WorkerLost | HandoffFailed):
        return (frozenset({worker}),)
    return frozenset(pair), frozenset(pair - {worker}), frozenset({worker})
