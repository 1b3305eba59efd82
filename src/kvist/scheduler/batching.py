"""Chooses what runs in the next step: which requests get pages, which give pages up, how the token budget is shared.

    running decodes (one token each) ──► running prompt chunks, oldest first ──► the head of the queue, and the next, …
                                     ──► the same for ungranted PREFILLs (whose Grant has not arrived)

Pages: a request gets the pages of all its known tokens when it leaves the queue, then one page at each page edge. When
no page is left, the youngest request is preempted: first ungranted PREFILLs, then running requests that can be computed
again. A PREFILL with a Grant and a DECODE before its Done are never preempted: they hold a bounded number of pages for
a bounded time, and a peer may access those pages. The oldest running request is never preempted, so at least one
request always runs to its end.

Host tier: a request that leaves the queue with a part of its K/V in the host tier is LOADING until the copy is done,
and is in no batch. Tokens that the copy failed to bring are computed. No other request waits for a LOADING request, and
a LOADING request is never preempted, since the mover may access its pages. With `write_back`, pages may have to be
copied before they are evicted: while enough copies are pending, no request is preempted to free pages; requests that
need pages skip the batch.

Overlap: the next step is planned while one is pending, as if the pending step were finished. A request that gets a
token in the pending step takes part with that token still unknown (`takes_sampled`), one position further on, unless
it is a request with `needs_known_token`: that one skips the step. The largest number of tokens is known, so only an end
by a stop token is noticed late. The pending step still writes the pages of its requests: a victim is first left out of
the step being planned, and preempted when the step after that is planned.
"""

from __future__ import annotations

from collections import deque

from kvist.plan.batch import Batch, BatchItem
from kvist.plan.events import StepFailed, StepFinished
from kvist.plan.tiers import PagesLoaded
from kvist.request import Mode, Outcome
from kvist.scheduler.active import ActiveRequest, RequestState
from kvist.scheduler.budget import chunk_tokens, step_tokens
from kvist.scheduler.requests import PendingStep, RequestTable
from kvist.scheduler.timers import TimerKind


class Batcher:
    """Plans the batches. Mutable; its one owner is the scheduler. One batch is pending at a time; with overlap, two."""

    def __init__(self, table: RequestTable) -> None:
        self._table = table
        self._cache = table.cache
        self._config = table.config
        self._step_id = 0
        self._step_tokens = 0  # token budget of the step being planned
        self._max_pending_steps = 2 if table.config.overlap else 1
        self._pending_steps: deque[PendingStep] = deque()
        self._deferred_victims: set[ActiveRequest] = set()  # victims whose pages the pending step still writes
        self._out_of_pages = False
        self._last_failed_allocation: tuple[int, int] | None = None  # ticket; reclaimable pages beyond the reserve

    # ---------------------------------------------------------------- the step is reported

    def on_step_finished(self, event: StepFinished) -> None:
        step = self._pop_pending_step(event.step_id)
        self._table.totals["steps"] += 1
        self._table.apply_sampled(step, event.sampled)

    def on_step_failed(self, event: StepFailed) -> None:
        step = self._pop_pending_step(event.step_id)
        for request in (*step.decodes, *(request for request, *_ in step.chunks)):
            if request.state is RequestState.ENDED:
                self._table.release(request)
            else:
                self._table.end(request, Outcome.FAILED, "engine_error", event.message)

    def on_pages_loaded(self, event: PagesLoaded) -> None:
        """Start the request: its host pages are in the device pool; if the copy failed, their tokens are computed."""
        table = self._table
        request = table.loading.pop(event.job_id)
        request.loading = False
        num_tokens = self._cache.loaded(event, request.token_ids)
        table.on_load_finished(event.job_id)
        if request.state is RequestState.ENDED:
            table.release(request)
            return
        request.num_computed = request.num_planned = num_tokens
        self._start(request)

    def _pop_pending_step(self, step_id: int) -> PendingStep:
        assert self._pending_steps, "no step is pending"
        assert step_id == self._step_id - len(self._pending_steps) + 1, "steps are reported once, in order"
        self._table.last_finished_id = step_id
        return self._pending_steps.popleft()

    # ---------------------------------------------------------------- the next step

    def plan(self) -> Batch | None:
        if len(self._pending_steps) == self._max_pending_steps:
            return None
        self._out_of_pages = False
        self._deferred_victims.clear()
        items: list[BatchItem] = []
        step = PendingStep(decodes=[], chunks=[])
        prompts = self._add_decodes(items, step.decodes)
        backlog = self._table.waiting.num_tokens + sum(len(each.token_ids) - each.num_planned for each in prompts)
        self._step_tokens = step_tokens(self._config, num_decodes=len(items), backlog_tokens=backlog)
        budget = self._step_tokens - len(items)
        for ungranted in (False, True):
            for request in prompts:
                if request.ungranted is ungranted and self._may_run(request):  # it may have been preempted in this loop
                    budget -= self._add_chunk(request, budget, items, step)
            budget = self._admit(ungranted, budget, items, step)
        if not items:
            return None
        self._step_id += 1
        self._pending_steps.append(step)
        ended, started = self._table.slots.drain()
        return Batch(step_id=self._step_id, ended=ended, started=started, items=tuple(items))

    def _add_decodes(self, items: list[BatchItem], decodes: list[ActiveRequest]) -> list[ActiveRequest]:
        """Add one token of each request with exactly one token left to compute; return the others, oldest first.

        Hot loop: it runs for every stream in every step."""
        page_size, step_id, deferred = self._cache.page_size, self._step_id + 1, self._deferred_victims
        running, prefill = RequestState.RUNNING, Mode.PREFILL
        prompts: list[ActiveRequest] = []
        for request in list(self._table.compact()):
            if request.state is not running or (deferred and request in deferred):
                continue  # preempted by an older request
            token_ids, start = request.token_ids, request.num_planned
            num_known = len(token_ids) - start  # 0: the pending step samples the token
            if num_known > 1 or request.mode is prefill:
                if self._covers_tokens(request):
                    prompts.append(request)
                continue
            if not num_known and request.needs_known_token:
                continue
            end = start + 1
            if end >= request.max_len:
                continue  # its last token is pending
            lease, slot = request.lease, request.slot
            assert lease is not None
            assert slot is not None
            if not start % page_size and not self._grow(request, end):  # the token begins a page
                continue
            request.num_planned = end
            request.last_step_id = step_id
            decodes.append(request)
            items.append(
                BatchItem(
                    slot=slot,
                    token_ids=(token_ids[start],) if num_known else (),
                    start=start,
                    page_ids=lease.page_ids,
                    samples=True,
                )
            )
        return prompts

    def _covers_tokens(self, request: ActiveRequest) -> bool:
        """Return whether the request has the pages of its known tokens, after growing its lease if a row of several
        tokens went beyond it."""
        lease, num_tokens = request.lease, len(request.token_ids)
        assert lease is not None
        return len(lease.page_ids) * self._cache.page_size >= num_tokens or self._grow(request, num_tokens)

    def _add_chunk(self, request: ActiveRequest, budget: int, items: list[BatchItem], step: PendingStep) -> int:
        start, num_tokens = request.num_planned, len(request.token_ids)
        if budget <= 0 or start == num_tokens:
            return 0
        end = start + chunk_tokens(num_tokens - start, budget, self._step_tokens, self._config.max_prefill_tokens)
        lease, slot = request.lease, request.slot
        assert lease is not None
        assert slot is not None
        # A PREFILL that was preempted after it sampled its first token computes its pages again, not the token.
        samples = end == num_tokens and request.first_token is None
        request.num_planned = end
        request.last_step_id = self._step_id + 1
        step.chunks.append((request, end, samples))
        items.append(
            BatchItem(
                slot=slot,
                token_ids=request.token_ids[start:end],
                start=start,
                page_ids=lease.page_ids,
                samples=samples,
            )
        )
        self._table.totals["computed_prompt_tokens"] += end - start
        return end - start

    # ---------------------------------------------------------------- pages for running requests

    def _grow(self, request: ActiveRequest, num_tokens: int) -> bool:
        """Grow the lease to `num_tokens`, preempting others if needed; return whether the request may run now."""
        lease = request.lease
        assert lease is not None
        while not self._cache.grow(lease, num_tokens):
            self._out_of_pages = True
            if self._cache.waits_for_copies(lease, num_tokens):
                return False
            victim = self._youngest_ungranted() or self._youngest_running()
            if victim is None:
                return False  # the oldest request waits for pages of handoffs, which hold them for a bounded time
            if not self._preempt(victim) or victim is request:
                return False
        return True

    def _may_run(self, request: ActiveRequest) -> bool:
        return request.state is RequestState.RUNNING and request not in self._deferred_victims

    def _preempt(self, victim: ActiveRequest) -> bool:
        """Free the victim's pages and return True; return False if a pending step still writes them. In that case the
        victim is preempted when the next step is planned, if its pages are still needed."""
        if self._table.in_pending_step(victim):
            self._deferred_victims.add(victim)
            return False
        self._table.preempt(victim)
        return True

    def _youngest_ungranted(self) -> ActiveRequest | None:
        prefill = Mode.PREFILL  # most engines run hundreds of requests and no PREFILL: the loop tests the mode first
        prefills = [
            each for each in (*self._table.running, *self._table.awaiting_transfer.values()) if each.mode is prefill
        ]
        ungranted = [each for each in prefills if each.ungranted and each.state is not RequestState.ENDED]
        return max(ungranted, key=lambda request: request.number, default=None)

    def _youngest_running(self) -> ActiveRequest | None:
        """Return the youngest running request that may be preempted; None if it is the only one. The caller's request
        is not in the batch yet, so neither is a younger one."""
        candidates = [request for request in self._table.running if request.mode is not Mode.PREFILL]
        return candidates[-1] if len(candidates) > 1 else None

    # ---------------------------------------------------------------- pages for the head of the queue

    def _admit(self, ungranted: bool, budget: int, items: list[BatchItem], step: PendingStep) -> int:
        """Admit requests from the head of the queue while pages and budget last; return the budget left."""
        table = self._table
        most = self._config.max_running_requests
        while not self._out_of_pages and len(table.running) + table.num_granted + len(table.loading) < most:
            request = table.waiting.head()
            if request is None or request.ungranted is not ungranted:
                break
            if budget <= 0 and not request.awaits_grant_of_pages:
                break
            if not self._allocate(request):
                break
            if request.state is RequestState.FETCHING:
                continue
            table.waiting.take(request)
            if request.loading:
                request.move(RequestState.LOADING)
                continue
            self._start(request)
            if request.state is RequestState.RUNNING:
                budget -= self._add_chunk(request, budget, items, step)
        return budget

    def _start(self, request: ActiveRequest) -> None:
        """Start an admitted request: it has its pages, and the first of them hold all its cached tokens."""
        table = self._table
        self._count_admission(request)
        if request.awaits_grant_of_pages:
            request.move(RequestState.GRANTED)
            table.num_granted += 1
        else:
            table.start_running(request)
        if request.mode is not Mode.FULL:
            table.handoff_sides[request.mode].on_allocated(request)

    def _allocate(self, request: ActiveRequest) -> bool:
        """Give the request a lease over all its tokens, or let it wait for another request's load, out of the queue.
        Return False if too few pages are reclaimable. One page is kept in reserve for each growing request, so that
        few requests are preempted."""
        cache, num_tokens = self._cache, len(request.token_ids)
        table, prefill = self._table, Mode.PREFILL
        growing = sum(other.mode is not prefill for other in table.running)
        reserve = table.num_granted + len(table.loading) + growing
        unchanged = self._last_failed_allocation == (request.ticket, cache.num_reclaimable - reserve)
        if unchanged and (request.ungranted or self._youngest_ungranted() is None):
            return False  # matching a long prompt again in each step would cost more than it gains
        max_cached = request.max_cached_tokens
        lease = cache.open(request.token_ids, cache_salt=request.request.cache_salt, max_tokens=max_cached)
        load = cache.pending_load(lease, request.token_ids, max_tokens=max_cached)
        if load is not None:
            cache.close(lease)
            self._table.wait_for_load(request, load)
            return True
        num_needed = -(-num_tokens // cache.page_size) - len(lease.page_ids)
        while (too_few := cache.num_reclaimable - num_needed < reserve) or not cache.grow(lease, num_tokens):
            # with enough reclaimable pages, pending copies free them: no victim is needed
            victim = self._youngest_ungranted() if too_few and not request.ungranted else None
            if victim is None or not self._preempt(victim):
                cache.close(lease)
                self._last_failed_allocation = (request.ticket, cache.num_reclaimable - reserve) if too_few else None
                return False
        request.lease = lease
        request.num_computed = request.num_planned = lease.num_cached_tokens
        load = cache.start_load(lease, request.token_ids, max_tokens=max_cached)
        table.close_prefetch(request)
        if load is not None:
            table.loading[load] = request
            request.loading = True
        return True

    def _count_admission(self, request: ActiveRequest) -> None:
        """Record the first admission; admissions after a preemption are not counted."""
        if request.was_admitted:
            return
        table = self._table
        request.admitted_s = table.now_s
        table.unadmitted.remove(request.caller)
        table.timers.cancel(TimerKind.QUEUE, request.request_id)
        lease = request.lease
        assert lease is not None
        request.num_cached_tokens = num_left = min(request.num_computed, request.num_prompt)
        num_left = max(0, num_left - lease.num_cached_tokens)  # cached tokens beyond those found in the device pool
        request.num_cached_host_tokens = min(lease.num_loaded_tokens, num_left)
        request.num_cached_storage_tokens = num_left - request.num_cached_host_tokens
        if not request.awaits_grant_of_pages:
            table.totals["prompt_tokens"] += request.num_prompt
            table.totals["cached_prompt_tokens"] += request.num_cached_tokens
            table.totals["ceiling_prompt_tokens"] += min(lease.num_ceiling_tokens, request.num_prompt)
