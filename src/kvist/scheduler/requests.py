"""Every live request of one engine, from `Arrived` to `Ended`: what a step's tokens mean, how each ends.

It owns the requests, their leases' closing and the page counters. Who may enter is decided by entry.py, what runs by
batching.py. It knows of handoffs only that a peer may hold a request's pages (`in_handoff`): a lease is closed when the
request has ended, no step under way writes it, no load fills it and no handoff holds it.

Whose pages may be in the store waits for them before its turn (FETCHING): until they have come or failed, at most for
as long as the policy says, and never for more than half of what a request may wait in all. A store that hangs costs
time, not the request. So it is when there is no turn to wait for, too: an idle engine would leave no time to fetch.

With overlap a step may be under way for a request that has ended meanwhile: an end by a stop token is seen only when
the next step is planned already. What that step chooses is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kvist.errors import EngineError
from kvist.fairness import CallerCounts
from kvist.kv.cache import PageCache
from kvist.kv.storage_tier import Prefetch
from kvist.request import EngineRequest, FinishReason, HandoffId, Mode, Outcome, RequestId, SampledToken
from kvist.scheduler.active import ActiveRequest, RequestState
from kvist.scheduler.config import SchedulerConfig
from kvist.scheduler.entry import find_refusal, newest_waiting
from kvist.scheduler.events import SampledTokens
from kvist.scheduler.load import COUNTERS
from kvist.scheduler.outbox import Outbox
from kvist.scheduler.timers import TimerKind, Timers
from kvist.scheduler.waiting import WaitingQueue
from kvist.service_time import ServiceTime, retry_after_s
from kvist.wire import Ended, Submit, TokenChunk

_BROKEN_LOGITS = (
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
    """Whose K/V a step computes."""

    decodes: list[ActiveRequest]  # of the last known token, or of one that the step before chooses; each gets another
    chunks: list[tuple[ActiveRequest, int, bool]]  # up to this position; whether it gets a token


class HandoffHooks(Protocol):
    """One engine's side of its handoffs (source.py, target.py), as the requests see it."""

    def on_arrived(self, request: ActiveRequest) -> None:
        """It was accepted; it may be ended in this call."""

    def on_refused(self, handoff_id: HandoffId, code: str, message: str) -> None:
        """It was ended before it was accepted."""

    def on_allocated(self, request: ActiveRequest) -> None:
        """Its lease now covers all its tokens (PREFILL: some are cached already; DECODE: the pages to grant)."""

    def on_computed(self, request: ActiveRequest) -> None:
        """PREFILL: more of its K/V is in its pages, perhaps all."""

    def on_ended(self, request: ActiveRequest, outcome: Outcome, message: str) -> None:
        """It is over for a reason outside the handoff: break the handoff off."""


class RequestTable:
    """Mutable; its one owner is the scheduler. `now_s` and `step_count` are set at the start of each step."""

    def __init__(
        self,
        config: SchedulerConfig,
        cache: PageCache,
        *,
        refuse_mode: Callable[[Submit], str | None],
    ) -> None:
        self.config = config
        self.cache = cache
        self.now_s = 0.0
        self.step_count = 0
        self.last_finished_id = 0  # of the steps that came back, finished or failed
        self.timers = Timers()
        self.out = Outbox()
        self.service_time = ServiceTime()
        self.totals: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self.waiting = WaitingQueue()
        self.unadmitted = CallerCounts()  # of the live requests that have not had theirs
        self.live: dict[RequestId, ActiveRequest] = {}
        self.running: list[ActiveRequest] = []  # by arrival; those that ended are dropped by `compact`
        self.awaiting_transfer: dict[RequestId, ActiveRequest] = {}
        self.loading: dict[int, ActiveRequest] = {}  # by load; some may have ended
        self.fetching: dict[Prefetch, ActiveRequest] = {}
        self.awaiting_load: dict[ActiveRequest, int] = {}  # that another began
        self.num_granted = 0
        self.num_suspended = 0
        self.handoff_side: HandoffHooks  # set by the scheduler that composes both
        self._refuse_mode = refuse_mode
        self._num_arrived = 0
        # The longest sequence whose K/V the pool can hold when nothing else is in it.
        self.context_len = min(config.max_model_len, cache.num_pages * cache.page_size)

    # ---------------------------------------------------------------- arrival

    def on_submit(self, event: Submit) -> None:
        """Queue it, or refuse it with `Ended`. A second Submit of a live request is ignored: one end answers both."""
        if event.request.request_id in self.live:
            return
        fault = find_refusal(event, self.cache, context_len=self.context_len, wrong_mode=self._refuse_mode(event))
        if fault is not None:
            self._refuse(event, *fault)
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
        if request.handoff_id is not None:
            self.handoff_side.on_arrived(request)

    def _refuse(self, event: Submit, code: str, message: str) -> None:
        self.totals["requests_refused"] += 1
        self._send_end(event.request.request_id, Outcome.FAILED, code, message)
        if event.handoff_id is not None:
            self.handoff_side.on_refused(event.handoff_id, code, message)

    def _make_queue_room(self, request: ActiveRequest) -> str | None:
        """Why there is none for it in the queue. It may be another's."""
        if self.num_waiting < self.config.max_queued_requests + self._num_free_run_slots():
            return None
        caller = self.unadmitted.displaced_by(request.caller)
        other = None if caller is None else newest_waiting(caller, reversed(self.live.values()))
        if other is None:
            most = self.config.max_queued_requests
            return f"{self.num_waiting} requests wait already, and this worker queues at most {most}"
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
        )

    # ---------------------------------------------------------------- the storage tier

    def _fetch(self, request: ActiveRequest) -> bool:
        """Ask the store for what the tiers here lack; whether it waits for that."""
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
        """To the queue with those that need not wait for the store any more."""
        for prefetch in self.cache.drain_prefetches():
            if prefetch in self.fetching:
                self._requeue(self.fetching[prefetch])

    def on_prefetch_timeout(self, request_id: str) -> None:
        request = self.live[RequestId(request_id)]
        assert request.prefetch is not None
        self.totals["prefetch_timeouts"] += 1
        self.cache.give_up_prefetch(request.prefetch)
        self._requeue(request)

    def wait_for_load(self, request: ActiveRequest, load: int) -> None:
        """Another loads the pages that it needs next: it will find them in the device pool."""
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
        """It was admitted, or has ended."""
        if request.prefetch is not None:
            self.cache.close_prefetch(request.prefetch)
            request.prefetch = None

    # ---------------------------------------------------------------- states

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + len(self.fetching) + len(self.awaiting_load) + self.num_suspended

    def _num_free_run_slots(self) -> int:
        """To run in: a burst on an idle engine fills them, and the queue beside them."""
        num_running = sum(request.state is RequestState.RUNNING for request in self.running)
        return self.config.max_running_requests - num_running - self.num_granted - len(self.loading)

    def in_pending_step(self, request: ActiveRequest) -> bool:
        """A step under way writes its pages."""
        return request.last_step_id > self.last_finished_id

    def start_running(self, request: ActiveRequest) -> None:
        request.move(RequestState.RUNNING)
        index = len(self.running)
        while index and self.running[index - 1].number > request.number:
            index -= 1
        self.running.insert(index, request)

    def compact(self) -> list[ActiveRequest]:
        running = RequestState.RUNNING  # to look it up for each of them would cost more than the rest
        self.running = [request for request in self.running if request.state is running]
        return self.running

    def preempt(self, request: ActiveRequest) -> None:
        """Its full pages are in the tree for as long as nobody needs the room; the rest is given up."""
        assert not self.in_pending_step(request), "a step under way writes its pages"
        assert not request.in_handoff
        assert request.lease is not None
        self.totals["preemptions"] += 1
        if request.state is RequestState.AWAITING_TRANSFER:
            del self.awaiting_transfer[request.request_id]
        else:
            self.running.remove(request)
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
        """PREFILL: from now on it may claim pages and keeps them."""
        request.granted = request.in_handoff = True
        self._send_first_token(request)
        if request.state is RequestState.SUSPENDED:
            request.move(RequestState.WAITING)
            self.num_suspended -= 1
        if request.state is RequestState.WAITING:
            self.waiting.push(request)

    # ---------------------------------------------------------------- tokens

    def apply_sampled(self, step: PendingStep, sampled: SampledTokens) -> None:
        """A step is finished: its K/V is in the pages, and these tokens were chosen."""
        num_chunks_before = len(self.out.chunks)
        if sampled.invalid_rows:
            self._fail_invalid_rows(step, sampled.invalid_rows)
        self._apply_decodes(step.decodes, sampled)
        place = len(step.decodes)
        for request, end, samples in step.chunks:
            if request.state is RequestState.ENDED:
                self.release(request)
            else:
                self._apply_chunk(request, end, sampled[place] if samples else None)
            place += samples
        assert place == len(sampled), "one token for each item that wants one"
        self.totals["generation_tokens"] += len(self.out.chunks) - num_chunks_before

    def _fail_invalid_rows(self, step: PendingStep, places: frozenset[int]) -> None:
        """Only their requests: no row of a step depends on another. What the step wrote for them is not committed."""
        sampled_requests = [*step.decodes, *(request for request, _, samples in step.chunks if samples)]
        for place in sorted(places):
            if sampled_requests[place].state is not RequestState.ENDED:
                self.end(sampled_requests[place], Outcome.FAILED, EngineError.code, _BROKEN_LOGITS)

    def _apply_decodes(self, decodes: list[ActiveRequest], sampled: SampledTokens) -> None:
        """This loop runs for every stream in every step: what is rare is left to others."""
        page_size, ended, chunks = self.cache.page_size, RequestState.ENDED, self.out.chunks
        logprobs = sampled.logprobs
        for place, request, token_id in zip(range(len(decodes)), decodes, sampled.token_ids, strict=False):
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
                and not (logprobs and place in logprobs)
            ):
                token_ids.append(token_id)
                chunks.append(TokenChunk(request_id=request.request_id, position=position, token_ids=(token_id,)))
            else:
                self._append(request, sampled[place])

    def _apply_chunk(self, request: ActiveRequest, end: int, token: SampledToken | None) -> None:
        request.num_computed = end
        assert request.lease is not None
        self.cache.insert(request.lease, request.token_ids, end)
        is_whole = end == len(request.token_ids)
        if request.mode is Mode.PREFILL:
            if is_whole:
                self._complete_prefill(request, token)
            else:
                self.handoff_side.on_computed(request)
        elif is_whole:
            assert token is not None
            self._append(request, token)

    def _append(self, request: ActiveRequest, token: SampledToken) -> None:
        position = request.next_position
        request.token_ids.append(token.token_id)
        finish = request.finish_reason(token.token_id, len(request.token_ids))
        self.send_chunk(request, position, token, finish)
        if finish is not None:
            self.end(request, Outcome.FINISHED)

    def start_decoding(self, request: ActiveRequest, token: SampledToken, finish: FinishReason | None) -> None:
        """DECODE: the given tokens' K/V is in its pages, and prefill has told `token` to the gateway."""
        assert request.lease is not None
        request.num_computed = request.num_planned = request.num_handoff_tokens
        self.cache.insert(request.lease, request.token_ids, request.num_handoff_tokens)
        request.token_ids.append(token.token_id)
        if finish is not None:  # prefill told it with the token
            self.end(request, Outcome.FINISHED)
            return
        self.num_granted -= 1
        self.start_running(request)

    def _complete_prefill(self, request: ActiveRequest, token: SampledToken | None) -> None:
        if request.first_token is None:  # else its pages were evicted since
            assert token is not None
            request.first_token = token
            request.first_token_finish = request.finish_reason(token.token_id, len(request.token_ids) + 1)
        request.move(RequestState.AWAITING_TRANSFER)
        self.awaiting_transfer[request.request_id] = request
        self._send_first_token(request)
        self.handoff_side.on_computed(request)

    def _send_first_token(self, request: ActiveRequest) -> None:
        """PREFILL: once it is known, and decode has a place for the rest: a stream that began waits in no queue."""
        if request.granted and request.first_token is not None and not request.first_token_sent:
            request.first_token_sent = True
            self.send_chunk(request, request.next_position, request.first_token, request.first_token_finish)

    def send_chunk(
        self, request: ActiveRequest, position: int, token: SampledToken, finish: FinishReason | None
    ) -> None:
        reports_cached = position == 0 and request.mode is not Mode.DECODE  # decode did not read the prompt
        by_tier = (request.num_cached_host_tokens, request.num_cached_storage_tokens) if reports_cached else (0, 0)
        chunk = TokenChunk(
            request_id=request.request_id,
            position=position,
            token_ids=(token.token_id,),
            logprobs=None if token.logprobs is None else (token.logprobs,),
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
        """The request's one end. Its pages go when nobody touches them any more."""
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
        request.move(RequestState.ENDED)
        self.close_prefetch(request)
        del self.live[request.request_id]
        self.timers.cancel(TimerKind.QUEUE, request.request_id)
        if request.admitted_s is None:
            self.unadmitted.remove(request.caller)
        else:
            self.service_time.note(self.now_s - request.admitted_s)
        self._send_end(request.request_id, outcome, code, message)
        if request.handoff_id is not None:
            self.handoff_side.on_ended(request, outcome, message or outcome.value)
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
        message = f"no room for the request within {self.config.queue_timeout_s:g} s (--queue-timeout-s)"
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
