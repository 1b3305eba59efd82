"""Plans the batch of the next step: which requests run, and how they share the token budget.

    running decodes (one token each) ──► running prompt chunks, oldest first ──► the head of the queue, and the next, …
                                     ──► the same for ungranted PREFILLs (whose Grant has not arrived)

With the scheduling policy "priority", chunks and queue are merged: a request that waits goes before running prompts of
a higher `priority` value.

allocation.py decides which requests get pages, and which are preempted.

Overlap: the next step is planned while a step is pending, as if the pending step were finished. A request that gets a
token in the pending step is in the next step too, one position further on, although that token is unknown
(`takes_sampled`). An end by length is known in advance; only an end by a stop token is noticed one step late. If the
pending step samples a row of several tokens, the step after it computes those that are then known as a chunk.
"""

from __future__ import annotations

from kvist.kv.cache import PageCache
from kvist.plan.batch import Batch, BatchItem
from kvist.plan.tiers import PagesLoaded
from kvist.request import Mode
from kvist.scheduler.active import ActiveRequest, RequestState
from kvist.scheduler.allocation import Allocation, Allocator
from kvist.scheduler.budget import MAX_STEP_LOGPROBS, chunk_tokens, num_logprobs_of, step_tokens
from kvist.scheduler.context import SchedulerContext
from kvist.scheduler.endings import Endings
from kvist.scheduler.handoff.sides import Handoffs
from kvist.scheduler.leases import Leases
from kvist.scheduler.pending import PendingStep, PendingSteps
from kvist.scheduler.stage_times import note_no_pages
from kvist.scheduler.states import Requests
from kvist.scheduler.timers import TimerKind
from kvist.scheduler.victims import keep_place


class Batcher:
    """Mutable; its one owner is the scheduler. At most one batch is pending; with overlap, two."""

    def __init__(
        self,
        context: SchedulerContext,
        requests: Requests,
        cache: PageCache,
        pending: PendingSteps,
        endings: Endings,
        handoffs: Handoffs,
        leases: Leases,
    ) -> None:
        self._context = context
        self._requests = requests
        self._page_size = cache.page_size
        self._pending = pending
        self._endings = endings
        self._handoffs = handoffs
        self._allocator = Allocator(context, requests, cache, pending, leases)
        self._step_tokens = 0  # token budget of the step being planned
        self._num_logprobs_left = 0  # logprobs of prompts that the step being planned may still report

    def on_pages_loaded(self, event: PagesLoaded) -> None:
        request = self._allocator.finish_load(event)
        if request is None:
            return
        if request.state is RequestState.ENDED:
            self._endings.release(request)
        else:
            self._start(request)

    def load_early(self) -> None:
        self._allocator.load_early()

    def plan(self) -> Batch | None:
        if self._pending.is_full:
            return None
        self._allocator.begin_step()
        self._admit_claimants()
        self._num_logprobs_left = MAX_STEP_LOGPROBS
        items: list[BatchItem] = []
        step = PendingStep(decodes=[], chunks=[], planned_s=self._context.now_s)
        prompts = self._add_decodes(items, step.decodes)
        backlog = self._requests.waiting.num_tokens + sum(len(each.token_ids) - each.num_planned for each in prompts)
        self._step_tokens = step_tokens(self._context.config, num_decodes=len(items), backlog_tokens=backlog)
        budget = self._step_tokens - len(items)
        for ungranted in (False, True):
            for request in prompts:
                # the request may have been preempted in this loop
                if request.ungranted is not ungranted:
                    continue
                budget = self._admit(ungranted, budget, items, step, before=request.priority)
                if self._allocator.may_run(request):
                    budget -= self._add_chunk(request, budget, items, step)
            budget = self._admit(ungranted, budget, items, step)
        begun = {*prompts, *(request for request, *_ in step.chunks)}
        self._context.num_begun_tokens = sum(len(each.token_ids) - each.num_planned for each in begun)
        if not items:
            return None
        step.is_full = budget <= 0
        ended, started = self._requests.slots.drain()
        batch = Batch(step_id=self._pending.next_id, ended=ended, started=started, items=tuple(items))
        self._pending.push(step)
        return batch

    def _admit_claimants(self) -> None:
        """Admit requests that may have the places or pages of running ones. Nothing is in the batch yet."""
        requests, allocator = self._requests, self._allocator
        while (request := requests.waiting.head()) is not None and allocator.may_claim(request):
            if not request.awaits_handoff and self._num_prompt_tokens_left >= self._context.config.chunked_prefill_size:
                return  # prompts of running requests come first: the step has no room for another one
            allocation = allocator.allocate(request, claims=True)
            if allocation is Allocation.NO_PAGES:
                return
            if allocation is Allocation.READY:
                self._start(request)

    @property
    def _num_prompt_tokens_left(self) -> int:
        """The number of prompt tokens that running requests have to compute."""
        left = (len(each.token_ids) - each.num_planned for each in self._requests.running)
        return sum(num_left for num_left in left if num_left > 1)

    def _add_decodes(self, items: list[BatchItem], decodes: list[ActiveRequest]) -> list[ActiveRequest]:
        """Add one token of each request that has exactly one token left to compute; return the other requests, most
        urgent first. A hot loop: it runs for every stream in every step."""
        page_size, step_id, deferred = self._page_size, self._pending.next_id, self._allocator.deferred_victims
        running, prefill = RequestState.RUNNING, Mode.PREFILL
        prompts: list[ActiveRequest] = []
        for request in list(self._requests.running):
            if request.state is not running or (deferred and request in deferred):
                continue  # preempted by a more urgent request
            token_ids, start = request.token_ids, request.num_planned
            num_known = len(token_ids) - start  # 0: the pending step samples the token
            if num_known > 1 or request.mode is prefill:
                if self._allocator.covers_tokens(request):
                    prompts.append(request)
                continue
            end = start + 1
            if end >= request.max_len:
                continue  # its last token is pending
            if not start % page_size and not self._allocator.grow(request, end):  # the token begins a page
                continue
            request.num_planned = end
            request.last_step_id = step_id
            decodes.append(request)
            items.append(
                BatchItem(
                    slot=request.slot,
                    token_ids=(token_ids[start],) if num_known else (),
                    start=start,
                    page_ids=request.page_ids,
                    samples=True,
                )
            )
        return prompts

    def _add_chunk(self, request: ActiveRequest, budget: int, items: list[BatchItem], step: PendingStep) -> int:
        start, num_tokens = request.num_planned, len(request.token_ids)
        if budget <= 0 or start == num_tokens:
            return 0
        most = self._context.config.max_prefill_tokens
        end = start + chunk_tokens(num_tokens - start, budget, self._step_tokens, most)
        score_from, scored_token_ids = None, request.token_ids[:0]
        if request.scores_prompt:
            first_scored = max(request.next_scored, start + 1)  # the pending step scores the tokens before
            end = self._cut_scored(request, first_scored, end)
            if end == start:
                return 0
            scored_token_ids = request.token_ids[first_scored : min(end + 1, request.num_prompt)]
            score_from = first_scored if scored_token_ids else None
        samples = end == num_tokens and not request.has_first_token
        request.num_planned = end
        request.last_step_id = self._pending.next_id
        step.chunks.append((request, end, samples))
        items.append(
            BatchItem(
                slot=request.slot,
                token_ids=request.token_ids[start:end],
                start=start,
                page_ids=request.page_ids,
                samples=samples,
                score_from=score_from,
                scored_token_ids=scored_token_ids,
            )
        )
        num_replayed = max(0, min(end, request.num_replayed) - start)  # none of the tokens of a row
        step.num_prompt_tokens += num_replayed
        self._context.count("computed_prompt_tokens", num_replayed)
        return end - start

    def _cut_scored(self, request: ActiveRequest, first_scored: int, end: int) -> int:
        """Return `end`, the end of a chunk, or a smaller end with which the step stays below MAX_STEP_LOGPROBS."""
        per_token = num_logprobs_of(request.sampling)
        num_scored = min(end + 1, request.num_prompt) - first_scored
        if num_scored * per_token > self._num_logprobs_left:
            num_scored = self._num_logprobs_left // per_token
            end = first_scored + num_scored - 1
        self._num_logprobs_left -= max(0, num_scored) * per_token
        return end

    def _admit(
        self, ungranted: bool, budget: int, items: list[BatchItem], step: PendingStep, *, before: int | None = None
    ) -> int:
        """Admit requests from the head of the queue while pages and budget are left; return the budget left. With
        `before`, admit only requests of a lower priority value."""
        requests, allocator, context = self._requests, self._allocator, self._context
        most = context.config.max_running_requests
        while not context.lacks_pages and requests.num_counted_as_running < most:
            request = requests.waiting.head()
            if request is None or request.ungranted is not ungranted:
                break
            if before is not None and request.priority >= before:
                break
            if budget <= 0 and not request.awaits_handoff:
                break
            allocation = allocator.allocate(request)
            if allocation is Allocation.NO_PAGES:
                context.lacks_pages = True
                note_no_pages(request, context.now_s)
                break
            if allocation is Allocation.READY:
                self._start(request)
                if request.state is RequestState.RUNNING:
                    budget -= self._add_chunk(request, budget, items, step)
        return budget

    def _start(self, request: ActiveRequest) -> None:
        """Start an admitted request: it has its pages, and the first of them hold all its cached tokens."""
        if not request.was_admitted:
            self._count_admission(request)
        request.num_replayed = len(request.token_ids)
        keep_place(request)
        computes = not request.awaits_handoff
        self._requests.move(request, RequestState.RUNNING if computes else RequestState.GRANTED)
        if computes:
            self._allocator.begin_computing(request)
        self._handoffs.on_allocated(request)

    def _count_admission(self, request: ActiveRequest) -> None:
        """Record the first admission; admissions after a preemption are not counted."""
        context, lease = self._context, request.lease
        context.timers.cancel(TimerKind.QUEUE, request.request_id)
        request.num_cached_tokens = num_left = min(request.num_computed, request.num_prompt)
        num_left = max(0, num_left - lease.num_device_tokens)  # cached tokens beyond those found in the device pool
        request.num_cached_host_tokens = min(lease.num_loaded_tokens, num_left)
        request.num_cached_storage_tokens = num_left - request.num_cached_host_tokens
        if not request.awaits_handoff:
            context.count("prompt_tokens", request.num_prompt)
            context.count("cached_prompt_tokens", request.num_cached_tokens)
            context.count("ceiling_prompt_tokens", min(lease.num_ceiling_tokens, request.num_prompt))
