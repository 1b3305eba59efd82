"""Holds every live request of one engine, from `Submit` to `Ended`: queues it, applies sampled tokens, ends it.

This module owns the requests, the closing of their leases and the counters. entry.py decides which requests may enter,
batching.py which run. Of handoffs this module knows only that a peer may hold the pages of a request (`in_handoff`): a
lease is closed when its request has ended, no pending step writes the pages, no load fills them and no handoff holds
them.

A request whose prefix may be in the store waits in FETCHING before its admission, until the prefetch has settled, at
most for the time that the prefetch policy allows, and never longer than half of `queue_timeout_s`. A store that hangs
costs time, but does not fail the request. A request waits in FETCHING also when the engine is idle: with immediate
admission there would be no time to fetch.

With overlap a step may be pending for a request that has ended: an end by a stop token is noticed only after the next
step was planned. The token that the pending step samples is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvist.errors import EngineError
from kvist.fairness import CallerCounts
from kvist.kv.cache import PageCache
from kvist.kv.tiers.prefetch import Prefetch
from kvist.plan.events import SampledTokens
from kvist.request import EngineRequest, FinishReason, HandoffId, Mode, Outcome, RequestId, Role, SampledToken
from kvist.scheduler.active import ActiveRequest, RequestState
from kvist.scheduler.config import SchedulerConfig
from kvist.scheduler.entry import TokenRule, find_refusal, newest_waiting
from kvist.scheduler.load import COUNTERS
from kvist.scheduler.outbox import Outbox
from kvist.scheduler.slots import RequestSlots
from kvist.scheduler.timers import TimerKind, Timers
from kvist.scheduler.waiting import WaitingQueue
from kvist.service_time import ServiceTime, retry_after_s
from kvist.wire import Ended, Submit, TokenChunk

_INVALID_LOGITS = (
    "the model's output for this request is not a number (NaN or infinity). If other requests fail in the same way, "
    "the weights or the device are damaged: check the model's files"
)
_OUTCOME_COUNTERS = {
    Outcome.FINISHED: "requests_finished",
    Outcome.FAILED: "requests_failed",
    Outcome.ABORTED: "requests_aborted",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingStep:
    """The requests whose K/V a planned step computes, until the step is reported."""

    decodes: list[ActiveRequest]  # one token each, which may itself be sampled by the step before; each samples one
    chunks: list[tuple[ActiveRequest, int, bool]]  # request, end position of its chunk, whether it samples a token


class HandoffHooks(Protocol):
    """The calls of `RequestTable` and `Batcher` into a side of this engine's handoffs (source.py, target.py)."""

    def on_arrived(self, request: ActiveRequest) -> None:
        """Open the handoff of an accepted request; may end the request."""

    def on_refused(self, handoff_id: HandoffId, code: str, message: str) -> None:
        """Close the handoff of a request that was refused."""

    def on_allocated(self, request: ActiveRequest) -> None:
        """The lease now covers all tokens. PREFILL: write the cached pages. DECODE: grant the pages to fill."""

    def on_computed(self, request: ActiveRequest) -> None:
        """PREFILL: write the pages that have become full; more K/V of the request, perhaps all, is computed."""

    def on_ended(self, request: ActiveRequest, outcome: Outcome, message: str) -> None:
        """Stop the handoff of a request that ended for a reason outside the handoff."""


class RequestTable:
    """The live requests by state. Mutable; its one owner is the scheduler.

    `now_s` and `step_count` are set at the start of each step."""

    def __init__(
        self, config: SchedulerConfig, cache: PageCache, *, role: Role, needs_known_token: TokenRule | None = None
    ) -> None:
        self.config = config
        self.cache = cache
        self.now_s = 0.0
        self.step_count = 0
        self.last_finished_id = 0  # newest step that was reported, finished or failed
        self.timers = Timers()
        self.out = Outbox()
        self.service_time = ServiceTime()
        self.totals: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self.waiting = WaitingQueue()
        self.unadmitted = CallerCounts()  # live requests that were never admitted, by caller
        self.live: dict[RequestId, ActiveRequest] = {}
        self.slots = RequestSlots(config.max_running_requests)
        self.running: list[ActiveRequest] = []  # by arrival; `compact` drops those that no longer run
        self.awaiting_transfer: dict[RequestId, ActiveRequest] = {}
        self.loading: dict[int, ActiveRequest] = {}  # by job id of the load; some may have ended
        self.fetching: dict[Prefetch, ActiveRequest] = {}
        self.awaiting_load: dict[ActiveRequest, int] = {}  # → job id of another request's load
        self.num_granted = 0
        self.num_suspended = 0
        self.handoff_sides: Mapping[Mode, HandoffHooks]  # set by `Steps`; by the mode of their requests
        self.role = role  # admits modes; read at each Submit, so that it may change
        self._needs_known_token = needs_known_token
        self._num_arrived = 0
        # tokens; the longest sequence whose K/V fits into an otherwise empty pool
        self.context_len = min(config.max_model_len, cache.num_pages * cache.page_size)

    # ---------------------------------------------------------------- arrival

    def on_submit(self, event: Submit) -> None:
        """Queue the request, or refuse it with `Ended`. A second Submit of a live request is ignored: one `Ended`
        answers both."""
        if event.request.request_id in self.live:
            return
        refusal = find_refusal(event, self.cache, context_len=self.context_len, role=self.role)
        if refusal is not None:
            self._refuse(event, *refusal)
            return
        request = self._accept(event)
        no_room = self._make_queue_room(request)
        if no_room is not None:
            self._refuse(event, "overloaded", no_room)
            return
        self.live[request.request_id] = request
        self.unadmitted.add(request.caller)
        self.timers.set(TimerKind.QUEUE, request.request_id, self.now_s + self.config.queue_timeout_s)
        if not self._fetch(request):
            self.waiting.push(request)
        if request.mode is not Mode.FULL:
            self.handoff_sides[request.mode].on_arrived(request)

    def _refuse(self, event: Submit, code: str, message: str) -> None:
        self.totals["requests_refused"] += 1
        self._send_end(event.request.request_id, Outcome.FAILED, code, message)
        if event.mode is not Mode.FULL and event.handoff_id is not None:
            self.handoff_sides[event.mode].on_refused(event.handoff_id, code, message)

    def _make_queue_room(self, request: ActiveRequest) -> str | None:
        """Make room in the queue, perhaps by displacing another request; return the error message if there is none."""
        if self.num_waiting < self.config.max_queued_requests + self._num_free_run_slots():
            return None
        caller = self.unadmitted.displaced_by(request.caller)
        other = None if caller is None else newest_waiting(caller, reversed(self.live.values()))
        if other is None:
            most = self.config.max_queued_requests
            return f"the queue of this worker is full: {self.num_waiting} requests wait, and it holds at most {most}"
        message = "removed from the full queue for a caller with fewer requests: retry later, or send fewer at once"
        self.totals["requests_displaced"] += 1
        self.end(other, Outcome.FAILED, "overloaded", message)
        return None

    def _accept(self, event: Submit) -> ActiveRequest:
        request: EngineRequest = event.request
        sampling = request.sampling
        eos = () if sampling.ignore_eos else self.config.eos_token_ids
        self._num_arrived += 1
        return ActiveRequest(
            number=self._num_arrived,
            request=request,
            mode=event.mode,
            handoff_id=event.handoff_id if event.mode is not Mode.FULL else None,
            prefill=event.prefill,
            target_epoch=event.target_epoch,
            arrived_s=self.now_s,
            token_ids=[*request.prompt_token_ids, *request.output_token_ids],
            num_handoff_tokens=len(request.prompt_token_ids) + len(request.output_token_ids),
            max_len=len(request.prompt_token_ids) + sampling.max_tokens,
            stop_ids=frozenset(eos) | frozenset(sampling.stop_token_ids),
            needs_known_token=self._needs_known_token is not None and self._needs_known_token(sampling),
        )

    # ---------------------------------------------------------------- the storage tier

    def _fetch(self, request: ActiveRequest) -> bool:
        """Query the store for pages missing in the device pool and the host tier; return whether the request waits."""
        prefetch = request.prefetch = self.cache.prefetch(
            request.token_ids, cache_salt=request.request.cache_salt, max_tokens=request.max_cached_tokens
        )
        if prefetch is None:
            return False
        self.totals["prefetches"] += 1
        wait_s = min(prefetch.wait_s, self.config.queue_timeout_s / 2)
        if not wait_s:
            return False
        request.move(RequestState.FETCHING)
        self.fetching[prefetch] = request
        self.timers.set(TimerKind.PREFETCH, request.request_id, self.now_s + wait_s)
        return True

    def requeue_prefetched(self) -> None:
        """Move requests whose prefetch has settled to the waiting queue."""
        storage = self.cache.storage
        if storage is None:
            return
        storage.start_queued()
        for prefetch in storage.take_settled():
            if prefetch in self.fetching:
                self._requeue(self.fetching[prefetch])

    def on_prefetch_timeout(self, request_id: str) -> None:
        request = self.live[RequestId(request_id)]
        assert request.prefetch is not None
        assert self.cache.storage is not None
        self.totals["prefetch_timeouts"] += 1
        self.cache.storage.give_up(request.prefetch)
        self._requeue(request)

    def wait_for_load(self, request: ActiveRequest, load: int) -> None:
        """Take the request out of the queue until another request's load brings its next pages to the device pool."""
        self.waiting.remove(request)
        request.move(RequestState.FETCHING)
        self.awaiting_load[request] = load

    def on_load_finished(self, load: int) -> None:
        for request in [request for request, job_id in self.awaiting_load.items() if job_id == load]:
            self._requeue(request)

    def _requeue(self, request: ActiveRequest) -> None:
        self._stop_fetching(request)
        request.move(RequestState.WAITING)
        self.waiting.push(request)

    def _stop_fetching(self, request: ActiveRequest) -> None:
        if self.awaiting_load.pop(request, None) is not None:
            return
        assert request.prefetch is not None
        del self.fetching[request.prefetch]
        self.timers.cancel(TimerKind.PREFETCH, request.request_id)
        self.totals["prefetch_wait_seconds"] += self.now_s - request.arrived_s

    def close_prefetch(self, request: ActiveRequest) -> None:
        """Close the prefetch of a request that was admitted or has ended."""
        if request.prefetch is not None:
            assert self.cache.storage is not None
            self.cache.storage.close(request.prefetch)
            request.prefetch = None

    # ---------------------------------------------------------------- states

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + len(self.fetching) + len(self.awaiting_load) + self.num_suspended

    def _num_free_run_slots(self) -> int:
        """Count unused run slots: a burst on an idle engine fills these as well as the queue."""
        num_running = sum(request.state is RequestState.RUNNING for request in self.running)
        return self.config.max_running_requests - num_running - self.num_granted - len(self.loading)

    def in_pending_step(self, request: ActiveRequest) -> bool:
        """Return whether a pending step writes the pages of the request."""
        return request.last_step_id > self.last_finished_id

    def start_running(self, request: ActiveRequest) -> None:
        request.move(RequestState.RUNNING)
        self.slots.take(request)
        index = len(self.running)
        while index and self.running[index - 1].number > request.number:
            index -= 1
        self.running.insert(index, request)

    def compact(self) -> list[ActiveRequest]:
        running = RequestState.RUNNING  # hot loop: looking the name up for each request would cost more than the test
        self.running = [request for request in self.running if request.state is running]
        return self.running

    def preempt(self, request: ActiveRequest) -> None:
        """Take the request's pages away. Its full pages stay cached in the tree until they are evicted."""
        assert not self.in_pending_step(request), "a pending step writes its pages"
        assert not request.in_handoff
        assert request.lease is not None
        self.totals["preemptions"] += 1
        if request.state is RequestState.AWAITING_TRANSFER:
            del self.awaiting_transfer[request.request_id]
        else:
            self.running.remove(request)
            self.slots.give_back(request)
        self.cache.close(request.lease)
        request.lease = None
        request.num_computed = request.num_planned = 0
        if request.ungranted:
            request.move(RequestState.SUSPENDED)
            self.num_suspended += 1
        else:
            request.move(RequestState.WAITING)
            self.waiting.push(request)

    def on_grant(self, request: ActiveRequest) -> None:
        """PREFILL: from the Grant on the request may claim pages and is not preempted."""
        request.granted = request.in_handoff = True
        self._send_first_token(request)
        if request.state is RequestState.SUSPENDED:
            request.move(RequestState.WAITING)
            self.num_suspended -= 1
        if request.state is RequestState.WAITING:
            self.waiting.push(request)

    # ---------------------------------------------------------------- tokens

    def apply_sampled(self, step: PendingStep, sampled: SampledTokens) -> None:
        """Apply a finished step, whose K/V is in the pages: append and send its tokens, end finished requests."""
        num_chunks_before = len(self.out.chunks)
        if sampled.invalid_rows:
            self._fail_invalid_rows(step, sampled.invalid_rows)
        assert sampled.num_rows == len(step.decodes) + sum(samples for *_, samples in step.chunks)
        computed, rows = step.chunks, sampled.rows(len(step.decodes))
        if sampled.num_tokens is None:
            self._apply_decodes(step.decodes, sampled)
        else:  # decodes, too, may have rows of several tokens
            computed = [*((request, len(request.token_ids), True) for request in step.decodes), *step.chunks]
            rows = sampled.rows()
        for request, end, samples in computed:
            tokens = next(rows) if samples else ()
            if request.state is RequestState.ENDED:
                self.release(request)
            else:
                self._apply_chunk(request, end, tokens)
        chunks = self.out.chunks[num_chunks_before:]
        num_sent = len(chunks) if sampled.num_tokens is None else sum(len(chunk.token_ids) for chunk in chunks)
        self.totals["generation_tokens"] += num_sent

    def _fail_invalid_rows(self, step: PendingStep, rows: frozenset[int]) -> None:
        """Fail only the requests of these rows: rows of a step are independent. Pages that the step wrote for them are
        not inserted into the tree."""
        sampled_requests = [*step.decodes, *(request for request, _, samples in step.chunks if samples)]
        for row in sorted(rows):
            if sampled_requests[row].state is not RequestState.ENDED:
                self.end(sampled_requests[row], Outcome.FAILED, EngineError.code, _INVALID_LOGITS)

    def _apply_decodes(self, decodes: list[ActiveRequest], sampled: SampledTokens) -> None:
        """Apply rows of one token. Hot loop: it runs for every stream in every step. Rare cases are left to
        `_append`."""
        page_size, ended, chunks = self.cache.page_size, RequestState.ENDED, self.out.chunks
        logprobs = sampled.logprobs
        for row, request, token_id in zip(range(len(decodes)), decodes, sampled.token_ids, strict=False):
            if request.state is ended:
                self.release(request)
                continue
            token_ids = request.token_ids
            request.num_computed = end = len(token_ids)
            if not end % page_size:
                assert request.lease is not None
                self.cache.insert(request.lease, token_ids, end)
            position = end - request.num_prompt
            if (
                position
                and end + 1 < request.max_len
                and token_id not in request.stop_ids
                and request.report is None
                and not (logprobs and row in logprobs)
            ):
                token_ids.append(token_id)
                chunks.append(TokenChunk(request_id=request.request_id, position=position, token_ids=(token_id,)))
            else:
                self._append(request, (sampled[row],))

    def _apply_chunk(self, request: ActiveRequest, end: int, tokens: Sequence[SampledToken]) -> None:
        request.num_computed = end
        assert request.lease is not None
        self.cache.insert(request.lease, request.token_ids, end)
        is_whole = end == len(request.token_ids)
        if request.mode is Mode.PREFILL:
            if is_whole:
                self._complete_prefill(request, tokens)
            else:
                self.handoff_sides[Mode.PREFILL].on_computed(request)
        elif is_whole:
            self._append(request, tokens)

    def _append(self, request: ActiveRequest, tokens: Sequence[SampledToken]) -> None:
        """Append and send the tokens of a row, up to the one that ends the answer."""
        assert len(tokens) == 1 or request.num_planned == request.num_computed, "a pending step continues the row"
        position, finish, num_kept = request.next_position, None, 0
        while finish is None and num_kept < len(tokens):
            request.token_ids.append(tokens[num_kept].token_id)
            finish = request.finish_reason(tokens[num_kept].token_id, len(request.token_ids))
            num_kept += 1
        self.send_chunk(request, position, tokens[:num_kept], finish)
        if finish is not None:
            self.end(request, Outcome.FINISHED)

    def start_decoding(self, request: ActiveRequest, token: SampledToken, finish: FinishReason | None) -> None:
        """DECODE: start the request. K/V of its handoff tokens is in its pages; prefill has sent `token` already."""
        assert request.lease is not None
        request.num_computed = request.num_planned = request.num_handoff_tokens
        self.cache.insert(request.lease, request.token_ids, request.num_handoff_tokens)
        request.token_ids.append(token.token_id)
        if finish is not None:  # prefill has sent the finish reason with the token
            self.end(request, Outcome.FINISHED)
            return
        self.num_granted -= 1
        self.start_running(request)

    def _complete_prefill(self, request: ActiveRequest, tokens: Sequence[SampledToken]) -> None:
        if request.first_token is None:  # else its pages were computed again after a preemption
            request.first_token = token = tokens[0]  # decode samples the tokens after the first one
            request.first_token_finish = request.finish_reason(token.token_id, len(request.token_ids) + 1)
        request.move(RequestState.AWAITING_TRANSFER)
        self.slots.give_back(request)
        self.awaiting_transfer[request.request_id] = request
        self._send_first_token(request)
        self.handoff_sides[Mode.PREFILL].on_computed(request)

    def _send_first_token(self, request: ActiveRequest) -> None:
        """PREFILL: send the first token once it is known and decode has granted pages, so that no stream that has begun
        waits in a queue."""
        if request.granted and request.first_token is not None and not request.first_token_sent:
            request.first_token_sent = True
            self.send_chunk(request, request.next_position, (request.first_token,), request.first_token_finish)

    def send_chunk(
        self, request: ActiveRequest, position: int, tokens: Sequence[SampledToken], finish: FinishReason | None
    ) -> None:
        reports_cached = position == 0 and request.mode is not Mode.DECODE  # decode did not compute the prompt
        by_tier = (request.num_cached_host_tokens, request.num_cached_storage_tokens) if reports_cached else (0, 0)
        chunk = TokenChunk(
            request_id=request.request_id,
            position=position,
            token_ids=tuple(token.token_id for token in tokens),
            logprobs=tuple(token.logprobs for token in tokens if token.logprobs is not None) or None,
            finish_reason=finish,
            num_cached_tokens=request.num_cached_tokens if reports_cached else None,
            num_cached_host_tokens=by_tier[0],
            num_cached_storage_tokens=by_tier[1],
            handoff=request.report,
        )
        request.report = None
        self.out.chunks.append(chunk)

    # ---------------------------------------------------------------- endings

    def end(self, request: ActiveRequest, outcome: Outcome, code: str | None = None, message: str = "") -> None:
        """End the request, once. Its pages are released when no step, load or handoff uses them any more."""
        if request.state is RequestState.WAITING:
            self.waiting.remove(request)
        elif request.state is RequestState.FETCHING:
            self._stop_fetching(request)
        elif request.state is RequestState.AWAITING_TRANSFER:
            del self.awaiting_transfer[request.request_id]
        elif request.state is RequestState.GRANTED:
            self.num_granted -= 1
        elif request.state is RequestState.SUSPENDED:
            self.num_suspended -= 1
        elif request.state is RequestState.RUNNING:
            self.slots.give_back(request)
        request.move(RequestState.ENDED)
        self.close_prefetch(request)
        del self.live[request.request_id]
        self.timers.cancel(TimerKind.QUEUE, request.request_id)
        if request.admitted_s is None:
            self.unadmitted.remove(request.caller)
        else:
            self.service_time.add(self.now_s - request.admitted_s)
        self._send_end(request.request_id, outcome, code, message)
        if request.mode is not Mode.FULL:
            self.handoff_sides[request.mode].on_ended(request, outcome, message or outcome.value)
        self.release(request)

    def release(self, request: ActiveRequest) -> None:
        if request.state is not RequestState.ENDED or self.in_pending_step(request):
            return
        if request.in_handoff or request.loading:
            return
        if request.lease is not None:
            self.cache.close(request.lease)
            request.lease = None

    def on_abort(self, request_id: RequestId) -> None:
        request = self.live.get(request_id)
        if request is not None:
            self.end(request, Outcome.ABORTED)

    def on_queue_timeout(self, request_id: str) -> None:
        request = self.live[RequestId(request_id)]
        message = f"the request was not started within {self.config.queue_timeout_s:g} s (--queue-timeout-s)"
        self.end(request, Outcome.FAILED, "timeout", message)

    def _send_end(self, request_id: RequestId, outcome: Outcome, code: str | None, message: str) -> None:
        self.totals[_OUTCOME_COUNTERS[outcome]] += 1
        wait_s = None
        if code == "overloaded":
            num_waiting = self.num_waiting
            num_served = len(self.live) - num_waiting
            wait_s = retry_after_s(self.service_time.mean_s, num_ahead=num_waiting, num_served=num_served)
        self.out.ended.append(
            Ended(
                request_id=request_id,
                outcome=outcome,
                error_code=code,
                message=message,
                retry_after_s=wait_s,
            )
        )
