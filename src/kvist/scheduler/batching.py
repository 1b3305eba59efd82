"""Chooses what runs in the next step: who gets pages, who gives them up, and how the token budget is shared.

    running decodes (one token each) ──► running prompt chunks, oldest first ──► the queue's head, and the next, …
                                     ──► the same for PREFILLs whose Grant has not come

Pages: a request gets all the pages of its known tokens when it leaves the queue, then one at each page edge. When none
is left, the youngest gives up its own: first PREFILLs whose Grant has not come, then running requests that can begin
again. A PREFILL with a Grant and a DECODE before its Done are never victims: they hold a bounded number of pages for a
bounded time, and a peer may touch those. The oldest running request is never a victim, so something always ends.

Overlap: the next step is planned while one is under way, as if that were finished. A request that is to get a token
there takes part with the token still unknown (`takes_sampled`), one position further on; how many tokens it may have
is known, so only an end by a stop token is noticed late. The step under way still writes its pages: a victim is first
left out of the step being planned, and gives its pages up when the next is.
"""

from __future__ import annotations

from collections import deque

from kvist.request import Mode, Outcome
from kvist.scheduler.active import ActiveRequest, RequestState
from kvist.scheduler.budget import chunk_tokens, step_tokens
from kvist.scheduler.events import StepFailed, StepFinished
from kvist.scheduler.plan import Batch, BatchItem
from kvist.scheduler.requests import RequestTable
from kvist.scheduler.timers import TimerKind


class Batcher:
    """Mutable; its one owner is the scheduler. One batch is under way at a time; with overlap, two."""

    def __init__(self, table: RequestTable) -> None:
        self._table = table
        self._cache = table.cache
        self._config = table.config
        self._step_id = 0
        self._step_tokens = 0  # what the step being planned may compute
        self._max_under_way = 2 if table.config.overlap else 1
        self._under_way: deque[list[tuple[ActiveRequest, int]]] = deque()  # by step: request, end of what it computes
        self._yielding: set[ActiveRequest] = set()  # victims that the step under way still writes for
        self._short_of_pages = False
        self._head_did_not_fit: tuple[int, int] | None = None  # its ticket, and how many pages could be had

    # ---------------------------------------------------------------- the step comes back

    def finished(self, event: StepFinished) -> None:
        computed = self._take_under_way(event.step_id)
        self._table.totals["steps"] += 1
        self._table.take_tokens(computed, event.sampled)

    def failed(self, event: StepFailed) -> None:
        for request, _ in self._take_under_way(event.step_id):
            request.num_steps -= 1
            if request.state is RequestState.ENDED:
                self._table.release(request)
            else:
                self._table.end(request, Outcome.FAILED, "engine_error", event.message)

    def _take_under_way(self, step_id: int) -> list[tuple[ActiveRequest, int]]:
        assert self._under_way, "no step is under way"
        assert step_id == self._step_id - len(self._under_way) + 1, "steps are reported once, in their order"
        return self._under_way.popleft()

    # ---------------------------------------------------------------- the next step

    def plan(self) -> Batch | None:
        if len(self._under_way) == self._max_under_way:
            return None
        self._short_of_pages = False
        self._yielding.clear()
        items: list[BatchItem] = []
        planned: list[tuple[ActiveRequest, int]] = []
        prompts = self._add_decodes(items, planned)
        backlog = self._table.waiting.num_tokens + sum(len(each.token_ids) - each.num_planned for each in prompts)
        self._step_tokens = step_tokens(self._config, num_decodes=len(items), backlog_tokens=backlog)
        budget = self._step_tokens - len(items)
        for eager in (False, True):
            for request in prompts:
                if request.eager is eager and self._may_run(request):  # else its pages were taken
                    budget -= self._add_chunk(request, budget, items, planned)
            budget = self._admit(eager, budget, items, planned)
        if not items:
            return None
        self._step_id += 1
        self._under_way.append(planned)
        return Batch(step_id=self._step_id, items=tuple(items))

    def _add_decodes(self, items: list[BatchItem], planned: list[tuple[ActiveRequest, int]]) -> list[ActiveRequest]:
        """One token of each request that has one left to compute; returns the others, oldest first."""
        page_size, running = self._cache.page_size, RequestState.RUNNING
        prompts: list[ActiveRequest] = []
        for request in list(self._table.compact()):
            if request.state is not running or request in self._yielding:
                continue  # an older one took its pages
            token_ids, start, num_unknown = request.token_ids, request.num_planned, request.num_unknown
            end = len(token_ids) + num_unknown
            if end >= request.max_len:
                continue  # its last token is under way
            if end - start != 1 or request.mode is Mode.PREFILL:
                prompts.append(request)
                continue
            lease = request.lease
            assert lease is not None
            if end > len(lease.page_ids) * page_size and not self._grow(request):
                continue
            request.num_steps += 1
            request.num_planned = end
            request.num_unknown = num_unknown + 1
            planned.append((request, end))
            items.append(
                BatchItem(
                    request_id=request.request_id,
                    token_ids=() if num_unknown else (token_ids[start],),
                    start=start,
                    page_ids=lease.page_ids,
                    sampling=request.sampling,
                    suppressed_token_ids=request.suppressed_ids if end < request.suppress_until else (),
                    takes_sampled=num_unknown > 0,
                )
            )
        return prompts

    def _add_chunk(
        self,
        request: ActiveRequest,
        budget: int,
        items: list[BatchItem],
        planned: list[tuple[ActiveRequest, int]],
    ) -> int:
        start, num_tokens = request.num_planned, len(request.token_ids)
        if budget <= 0 or start == num_tokens:
            return 0
        end = start + chunk_tokens(num_tokens - start, budget, self._step_tokens, self._config.max_prefill_tokens)
        lease = request.lease
        assert lease is not None
        # A PREFILL that was evicted after it told its first token computes its pages again, not the token.
        samples = end == num_tokens and request.first_token is None
        request.num_steps += 1
        request.num_planned = end
        if samples and request.mode is not Mode.PREFILL:
            request.num_unknown = 1
        planned.append((request, end))
        items.append(
            BatchItem(
                request_id=request.request_id,
                token_ids=request.token_ids[start:end],
                start=start,
                page_ids=lease.page_ids,
                sampling=request.sampling if samples else None,
                suppressed_token_ids=request.suppressed_ids if samples and end < request.suppress_until else (),
            )
        )
        self._table.totals["computed_prompt_tokens"] += end - start
        return end - start

    # ---------------------------------------------------------------- pages for the running

    def _grow(self, request: ActiveRequest) -> bool:
        lease = request.lease
        assert lease is not None
        while not self._cache.grow(lease, len(request.token_ids) + request.num_unknown):
            self._short_of_pages = True
            victim = self._youngest_eager() or self._youngest_running()
            if victim is None:
                return False  # the oldest waits for pages that handoffs hold, which is bounded
            if not self._preempt(victim) or victim is request:
                return False
        return True

    def _may_run(self, request: ActiveRequest) -> bool:
        return request.state is RequestState.RUNNING and request not in self._yielding

    def _preempt(self, victim: ActiveRequest) -> bool:
        """Whether its pages are given up now. Else they are when the next step is planned, if still needed."""
        if victim.num_steps:
            self._yielding.add(victim)
            return False
        self._table.preempt(victim)
        return True

    def _youngest_eager(self) -> ActiveRequest | None:
        eager = [
            request
            for request in (*self._table.running, *self._table.held.values())
            if request.eager and request.state is not RequestState.ENDED
        ]
        return max(eager, key=lambda request: request.number, default=None)

    def _youngest_running(self) -> ActiveRequest | None:
        """Never the only one left. Called for a request that is not in the batch yet, so no younger one is."""
        candidates = [request for request in self._table.running if request.mode is not Mode.PREFILL]
        return candidates[-1] if len(candidates) > 1 else None

    # ---------------------------------------------------------------- pages for the queue's head

    def _admit(self, eager: bool, budget: int, items: list[BatchItem], planned: list[tuple[ActiveRequest, int]]) -> int:
        """Takes from the queue's head while pages and budget last; returns the budget left."""
        table = self._table
        while not self._short_of_pages and len(table.running) + table.num_granted < self._config.max_running_requests:
            request = table.waiting.head()
            if request is None or request.eager is not eager:
                break
            if budget <= 0 and not request.awaits_grant_of_pages:
                break
            if not self._take_pages(request):
                break
            table.waiting.remove(request)
            self._count_admission(request)
            if request.awaits_grant_of_pages:
                request.move(RequestState.GRANTED)
                table.num_granted += 1
            else:
                table.start_running(request)
                budget -= self._add_chunk(request, budget, items, planned)
            if request.handoff_id is not None:
                table.half.pages_taken(request)
        return budget

    def _take_pages(self, request: ActiveRequest) -> bool:
        """A lease over all its tokens. Leaves one page for each request that grows, so that few are preempted."""
        cache, num_tokens = self._cache, len(request.token_ids)
        reserve = self._table.num_granted + sum(other.mode is not Mode.PREFILL for other in self._table.running)
        unchanged = self._head_did_not_fit == (request.ticket, self._num_to_be_had() - reserve)
        if unchanged and (request.eager or self._youngest_eager() is None):
            return False  # matching a long prompt once more, each step, would cost more than it finds
        computes_last = not request.awaits_grant_of_pages
        lease = cache.open(
            request.token_ids, cache_salt=request.request.cache_salt, max_tokens=num_tokens - int(computes_last)
        )
        num_needed = -(-num_tokens // cache.page_size) - len(lease.page_ids)
        while self._num_to_be_had() - num_needed < reserve or not cache.grow(lease, num_tokens):
            victim = None if request.eager else self._youngest_eager()
            if victim is None or not self._preempt(victim):
                cache.close(lease)
                self._head_did_not_fit = (request.ticket, self._num_to_be_had() - reserve)
                return False
        request.lease = lease
        request.num_computed = request.num_planned = lease.num_cached_tokens
        return True

    def _num_to_be_had(self) -> int:
        counts = self._cache.counts()
        return counts.free + counts.evictable

    def _count_admission(self, request: ActiveRequest) -> None:
        """Once a request: later admissions (after preemption) are not news."""
        if request.num_cached_tokens is not None:
            return
        table = self._table
        table.timers.cancel(TimerKind.QUEUE, request.request_id)
        request.num_cached_tokens = min(request.num_computed, request.num_prompt)
        if not request.awaits_grant_of_pages:
            table.totals["prompt_tokens"] += request.num_prompt
            table.totals["cached_prompt_tokens"] += request.num_cached_tokens
