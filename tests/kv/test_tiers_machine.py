"""The cache and its tiers under any order of calls: every page found by a digest holds the content of that digest.

The state machine keeps the content of both pools and of the store, and acts as the movers: copies are late, out of
order, or fail and leave nonsense; the store misreports its pages and loses them. The digest of a page's prefix stands
for its K/V.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvist.kv.cache import PageCache
from kvist.kv.keys import page_digests
from kvist.kv.lease import PageLease
from kvist.kv.tiers.host import HostTier
from kvist.kv.tiers.prefetch import Prefetch, PrefetchConfig
from kvist.kv.tiers.storage import StorageTier
from kvist.kv.tiers.write_policy import WRITE_POLICIES
from kvist.plan.tiers import (
    BackUpPages,
    CancelFetch,
    FetchPages,
    FindPages,
    ForgetPages,
    LoadPages,
    PagesBackedUp,
    PagesFetched,
    PagesFound,
    PagesLoaded,
    PagesStored,
    StorageAttached,
    StorePages,
)
from kvist.testing.page_events import ReplayedPages, listed_pages
from tests.budget import budget

NUM_PAGES = 8
PAGE_SIZE = 2
NAMESPACE = "space"
NONSENSE = b"nonsense"
FIRST_PAGES = {page_digests(pair, PAGE_SIZE, NAMESPACE)[0] for pair in itertools.product((0, 1), repeat=PAGE_SIZE)}

TOKENS = st.one_of(
    st.lists(st.integers(0, 1), min_size=2, max_size=9).map(tuple),
    st.builds(lambda token_id, length: (token_id,) * length, st.integers(0, 1), st.integers(2, 9)),  # one of few
)


@dataclass(eq=False)
class Request:
    lease: PageLease
    token_ids: tuple[int, ...]
    num_written: int
    load_id: int | None

    def digests(self) -> list[bytes]:
        return page_digests(self.token_ids[: self.num_written], PAGE_SIZE, NAMESPACE)


class TiersMachine(RuleBasedStateMachine):
    @initialize(num_host_pages=st.integers(1, 24), policy=st.sampled_from(sorted(WRITE_POLICIES)))
    def start(self, num_host_pages: int, policy: str) -> None:
        self.policy = policy
        self.tier = HostTier(num_host_pages)
        self.storage = StorageTier(self.tier, PrefetchConfig(threshold_tokens=PAGE_SIZE), page_size=PAGE_SIZE)
        self.cache = PageCache(
            num_pages=NUM_PAGES,
            page_size=PAGE_SIZE,
            namespace=NAMESPACE,
            host=self.tier,
            write_policy=policy,
            storage=self.storage,
        )
        self.stored: set[bytes] = set()  # digests in the store; each stands for its page
        self.prefetches: list[tuple[Prefetch, tuple[int, ...]]] = []
        self.waiting: set[Prefetch] = set()  # not reported as done
        self.store_jobs: list[FindPages | FetchPages | StorePages] = []
        self.cancelled: set[int] = set()
        self.storage.on_event(StorageAttached(attached=True))
        self.device = [NONSENSE] * NUM_PAGES
        self.host = [NONSENSE] * num_host_pages
        self.requests: list[Request] = []
        self.early: list[Request] = []  # with the leases of early loads
        self.jobs: list[tuple[LoadPages | BackUpPages, list[bytes]]] = []  # with the content to copy
        self.replayed = ReplayedPages()

    @rule(token_ids=TOKENS, waits=st.booleans(), ok=st.booleans())
    def admit(self, token_ids: tuple[int, ...], waits: bool = True, ok: bool = True) -> None:
        digests = page_digests(token_ids, PAGE_SIZE, NAMESPACE)
        lease = self.cache.open(token_ids, max_tokens=len(token_ids))
        num_found = len(lease.page_ids)
        while not self.cache.grow(lease, len(token_ids)):
            self.take_jobs()
            if not (waits and self.cache.waits_for_copies(lease, len(token_ids))):
                self.cache.close(lease)
                return
            early_ids = {each.load_id for each in self.early}
            copies = [
                i for i, (job, _) in enumerate(self.jobs) if isinstance(job, BackUpPages) or job.job_id in early_ids
            ]
            self.run_job(copies[0], ok)  # without such a copy under way it would wait for ever
        for page_id in lease.page_ids[num_found:]:
            self.device[page_id] = NONSENSE
        resident = set(self.tier.digests())
        early = next((each for each in self.early if each.token_ids == token_ids and each.load_id is None), None)
        if early is not None:  # the request for which the pages were loaded
            lease.take_over_counts(early.lease)
        before = self.cache.totals()
        load_id = self.cache.start_load(lease, token_ids, max_tokens=len(token_ids))
        counted = {name: value - before[name] for name, value in self.cache.totals().items()}
        num_early = lease.num_early_tokens // PAGE_SIZE
        assert counted["device_hit_pages"] == num_found - num_early >= 0
        assert counted["device_miss_pages"] == len(digests) - num_found + num_early
        assert counted["host_hit_pages"] + counted["host_miss_pages"] == counted["device_miss_pages"]
        if early is not None:
            self.cache.close(early.lease)
            self.early.remove(early)
        assert (load_id is not None) == (num_found < len(digests) and digests[num_found] in resident)
        self.requests.append(Request(lease, token_ids, num_found * PAGE_SIZE, load_id))
        self.take_jobs()

    @rule(token_ids=TOKENS)
    def open_early(self, token_ids: tuple[int, ...]) -> None:
        lease = self.cache.open(token_ids, max_tokens=len(token_ids))
        self.early.append(Request(lease, token_ids, lease.num_cached_tokens, None))

    @precondition(lambda self: any(each.load_id is None for each in self.early))
    @rule(data=st.data(), num_reserved=st.integers(0, NUM_PAGES))
    def load_early(self, data: st.DataObject, num_reserved: int = 0) -> None:
        early = data.draw(st.sampled_from([each for each in self.early if each.load_id is None]))
        digests = page_digests(early.token_ids, PAGE_SIZE, NAMESPACE)
        num_pages, counts = early.lease.pin.num_pages, self.cache.counts()
        num_room = counts.free + counts.evictable - num_reserved + len(early.lease.page_ids) - num_pages
        next_page = self.tier.get(digests[num_pages]) if num_pages < len(digests) else None
        early.load_id = self.cache.load_early(early.lease, digests, num_reserved=num_reserved)
        may_load = next_page is not None and next_page.resident and num_room > 0
        assert may_load or early.load_id is None
        assert early.load_id is not None or not may_load or self.policy == "write_back", "only a copy can prevent it"
        counts = self.cache.counts()
        assert early.load_id is None or counts.free + counts.evictable >= min(num_reserved, NUM_PAGES) - len(
            early.lease.page_ids[num_pages:]
        ), "the reserve is left"
        self.take_jobs()

    @precondition(lambda self: any(each.load_id is None for each in self.early))
    @rule(data=st.data())
    def close_early(self, data: st.DataObject) -> None:
        early = data.draw(st.sampled_from([each for each in self.early if each.load_id is None]))
        self.early.remove(early)
        self.cache.close(early.lease)

    @rule(token_ids=TOKENS, closes=st.booleans(), evicts=st.booleans())
    def answer(self, token_ids: tuple[int, ...], closes: bool, evicts: bool) -> None:
        """Run a whole request at once, except its copies; perhaps evict it from the device pool at once."""
        num_requests = len(self.requests)
        self.admit(token_ids)
        if len(self.requests) > num_requests and self.requests[-1].load_id is None:
            self.write(self.requests[-1], len(token_ids))
            if closes:
                self.cache.close(self.requests.pop().lease)
        if evicts:
            self.evict_pages(num_pages=NUM_PAGES)

    @rule(token_ids=TOKENS)
    def repeat_after_eviction(self, token_ids: tuple[int, ...]) -> None:
        """Close all requests, evict the device pool, and repeat a request, so that its pages are being loaded."""
        self.copy_all(ok=True)
        for request in self.requests:
            self.cache.close(request.lease)
        self.requests = []
        self.answer(token_ids, closes=True, evicts=False)
        self.copy_all(ok=True)
        self.evict_pages(num_pages=NUM_PAGES)
        self.copy_all(ok=True)
        self.admit(token_ids)

    @rule(ok=st.booleans())
    def copy_all(self, ok: bool) -> None:
        while self.jobs:
            self.run_job(0, ok)

    @precondition(lambda self: any(request.load_id is None for request in self.requests))
    @rule(data=st.data(), more=st.integers(1, 8), more_tokens=st.lists(st.integers(0, 1), max_size=2))
    def compute(self, data: st.DataObject, more: int, more_tokens: list[int]) -> None:
        request = data.draw(st.sampled_from([each for each in self.requests if each.load_id is None]))
        request.token_ids += tuple(more_tokens)
        self.write(request, more)

    def write(self, request: Request, more: int) -> None:
        first = request.num_written // PAGE_SIZE
        room = min(len(request.lease.page_ids) * PAGE_SIZE, len(request.token_ids))
        request.num_written = min(request.num_written + more, room)
        for page, digest in enumerate(request.digests()):
            if page >= first:
                self.device[request.lease.page_ids[page]] = digest
        self.cache.insert(request.lease, request.token_ids, request.num_written)
        self.take_jobs()

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), ok=st.sampled_from([True, True, True, False]))
    def copy(self, data: st.DataObject, ok: bool) -> None:
        self.run_job(data.draw(st.integers(0, len(self.jobs) - 1)), ok)

    def run_job(self, index: int, ok: bool) -> None:
        job, asked = self.jobs.pop(index)
        assert self.source(job) == asked, "the content changed while the copy waited"
        found = asked if ok else [NONSENSE] * len(asked)
        if isinstance(job, BackUpPages):
            for slot, content in zip(job.host_slots, found, strict=True):
                self.host[slot] = content
            self.cache.backed_up(PagesBackedUp(job_id=job.job_id, ok=ok))
            self.take_jobs()
            return
        for page_id, content in zip(job.page_ids, found, strict=True):
            self.device[page_id] = content
        (request,) = (each for each in [*self.requests, *self.early] if each.load_id == job.job_id)
        expected = request.num_written + (len(found) * PAGE_SIZE if ok else 0)
        request.num_written = self.cache.loaded(PagesLoaded(job_id=job.job_id, ok=ok), request.token_ids)
        request.load_id = None
        assert request.num_written == expected
        self.take_jobs()

    @precondition(lambda self: any(request.load_id is None for request in self.requests))
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from([each for each in self.requests if each.load_id is None]))
        self.requests.remove(request)
        self.cache.close(request.lease)

    @rule(num_pages=st.integers(1, NUM_PAGES))
    def evict_pages(self, num_pages: int) -> None:
        lease = self.cache.open((), max_tokens=0)
        counts = self.cache.counts()
        num_pages = min(num_pages, counts.free + counts.evictable)
        if self.cache.grow(lease, num_pages * PAGE_SIZE):
            for page_id in lease.page_ids:
                self.device[page_id] = NONSENSE
        else:
            assert self.policy == "write_back", "only a copy can prevent the eviction"
        self.cache.close(lease)
        self.take_jobs()

    @rule(really=st.sampled_from([False, False, True]))
    def flush(self, really: bool) -> None:
        if really:
            self.cache.flush()
            assert self.cache.counts().evictable == 0

    @rule()
    def replay_events(self) -> None:
        self.replayed.apply(self.cache.take_changed_pages())
        assert self.replayed.pages == listed_pages(self.cache.list_pages)

    def take_jobs(self) -> None:
        self.storage.start_queued()
        done = self.storage.take_settled()
        assert len(done) == len(set(done)), "each prefetch is reported once"
        for job in self.cache.plan_jobs():
            if isinstance(job, LoadPages | BackUpPages):
                self.jobs.append((job, self.source(job)))
            elif isinstance(job, ForgetPages):
                for slot in job.host_slots:
                    self.host[slot] = NONSENSE
            elif isinstance(job, CancelFetch):
                self.cancelled.add(job.job_id)
            else:
                self.store_jobs.append(job)
                if isinstance(job, FetchPages):
                    for slot in job.host_slots:
                        self.host[slot] = NONSENSE
                elif isinstance(job, StorePages):
                    assert [self.host[slot] for slot in job.host_slots] == list(job.digests)
        self.storage.start_queued()
        done += self.storage.take_settled()  # prefetches that found no room
        self.waiting.difference_update(done)
        assert all(prefetch.is_done for prefetch in done)
        assert all(not prefetch.is_done for prefetch in self.waiting), "a prefetch that is done must be reported"

    # ---------------------------------------------------------------- the store

    @rule(token_ids=TOKENS)
    def start_prefetch(self, token_ids: tuple[int, ...]) -> None:
        prefetch = self.cache.prefetch(token_ids, max_tokens=len(token_ids))
        if prefetch is not None:
            self.prefetches.append((prefetch, token_ids))
            self.waiting.add(prefetch)
        self.take_jobs()

    @rule(token_ids=TOKENS, works=st.booleans())
    def evict_all_but_the_store(self, token_ids: tuple[int, ...], works: bool) -> None:
        """Answer a request, store its pages, flush both pools, and prefetch the pages again."""
        self.repeat_after_eviction(token_ids)
        self.copy_all(ok=True)
        self.run_all_store_jobs()
        self.hit_again(token_ids)  # store the pages that exceeded the limit of the first try
        while self.requests:
            self.cache.close(self.requests.pop().lease)
        self.cache.flush()
        self.start_prefetch(token_ids)
        if works:
            self.run_all_store_jobs()

    def hit_again(self, token_ids: tuple[int, ...]) -> None:
        for _ in range(2):
            self.admit(token_ids)
            self.copy_all(ok=True)
            self.run_all_store_jobs()

    @precondition(lambda self: self.store_jobs)
    @rule(data=st.data(), misreports=st.booleans(), fails=st.booleans())
    def run_one_store_job(self, data: st.DataObject, misreports: bool, fails: bool) -> None:
        self.run_store_job(data.draw(st.integers(0, len(self.store_jobs) - 1)), misreports, fails)

    @rule()
    def run_all_store_jobs(self) -> None:
        while self.store_jobs:
            self.run_store_job(0, False, False)

    def run_store_job(self, index: int, misreports: bool, fails: bool) -> None:
        job = self.store_jobs.pop(index)
        num_there = next((i for i, each in enumerate(job.digests) if each not in self.stored), len(job.digests))
        event: PagesFound | PagesFetched | PagesStored
        if isinstance(job, FindPages):
            num_pages = 0 if fails else len(job.digests) if misreports else num_there
            event = PagesFound(job_id=job.job_id, num_pages=num_pages)
        elif isinstance(job, FetchPages):
            num_pages = num_there // (1 + fails) * (job.job_id not in self.cancelled)
            for slot, digest in list(zip(job.host_slots, job.digests, strict=True))[:num_pages]:
                self.host[slot] = digest
            event = PagesFetched(job_id=job.job_id, num_pages=num_pages)
        else:
            num_pages = len(job.digests) // (1 + fails)
            assert [self.host[slot] for slot in job.host_slots] == list(job.digests), "changed while it was stored"
            self.stored.update(job.digests[:num_pages])
            event = PagesStored(job_id=job.job_id, num_pages=num_pages)
        self.storage.on_event(event)
        self.take_jobs()

    @precondition(lambda self: self.prefetches)
    @rule(data=st.data(), how=st.sampled_from(["admitted", "ended", "timed out"]))
    def end_prefetch(self, data: st.DataObject, how: str) -> None:
        index = data.draw(st.integers(0, len(self.prefetches) - 1))
        prefetch, token_ids = self.prefetches[index]
        self.waiting.discard(prefetch)
        if how == "timed out":
            self.storage.give_up(prefetch)
        else:
            if how == "admitted":
                self.admit(token_ids)
            del self.prefetches[index]
            self.storage.close(prefetch)
        self.take_jobs()

    @rule(which=st.integers(0, 5))
    def drop_stored_pages(self, which: int) -> None:
        self.stored = set(sorted(self.stored)[which::2])

    @rule(attached=st.sampled_from([True, True, False]))
    def attach_or_detach_store(self, attached: bool) -> None:
        self.storage.on_event(StorageAttached(attached=attached))
        self.take_jobs()
        assert attached or not self.waiting, "without a store no prefetch waits"

    def source(self, job: LoadPages | BackUpPages) -> list[bytes]:
        if isinstance(job, LoadPages):
            return [self.host[slot] for slot in job.host_slots]
        return [self.device[page_id] for page_id in job.page_ids]

    @invariant()
    def every_digest_finds_its_own_content(self) -> None:
        for node in self.cache._tree.nodes():
            assert self.device[node.page_id] == node.digest
        for page in self.tier.pages():
            assert not page.resident or self.host[page.slot] == page.digest
        for request in [*self.requests, *self.early]:
            for index, digest in enumerate(request.digests()):
                assert self.device[request.lease.page_ids[index]] == digest
        for early in self.early:
            counted = early.lease.num_loaded_tokens + early.lease.num_fetched_tokens
            assert counted == early.num_written - early.lease.num_cached_tokens

    @invariant()
    def every_page_of_each_tier_is_in_exactly_one_state(self) -> None:
        counts, host = self.cache.counts(), self.tier.counts()
        assert counts.free + counts.cached + counts.owned + counts.in_flight == counts.total
        assert host.free + host.cached + host.in_flight == host.total
        loads = [job for job, _ in self.jobs if isinstance(job, LoadPages)]
        assert counts.in_flight == sum(len(job.page_ids) for job in loads)
        used = [(slot, isinstance(job, BackUpPages)) for job, _ in self.jobs for slot in job.host_slots]
        for job in self.store_jobs:
            if not isinstance(job, FindPages):
                used += [(slot, isinstance(job, FetchPages)) for slot in job.host_slots]
        written = [slot for slot, is_written in used if is_written]
        assert len(written) == len(set(written)), "a slot is written twice at once"
        assert not set(written) & {slot for slot, is_written in used if not is_written}, "a slot is read and written"
        kept = {prefetch.pinned.slot for prefetch, _ in self.prefetches if prefetch.pinned is not None}
        assert host.in_flight == len({slot for slot, _ in used} | kept)
        fetching = sum(len(job.host_slots) for job in self.store_jobs if isinstance(job, FetchPages))
        num_kept = sum(prefetch.num_fetched for prefetch, _ in self.prefetches)
        assert self.storage.num_reserved == fetching + num_kept <= max(1, host.total // 2)
        storing = sum(len(job.host_slots) for job in self.store_jobs if isinstance(job, StorePages))
        assert self.storage.num_storing == storing <= max(1, host.total // 4)
        for page in self.tier.pages():  # every page can be reached by a match
            parent = page.parent
            assert page.digest in FIRST_PAGES if parent is None else self.tier.get(parent.digest) is parent

    def fail_all_copies(self) -> None:
        """Fail the copies that have begun, and those that the failures begin: a page that is being copied is pinned."""
        for _ in range(NUM_PAGES + 1):  # a page whose copy failed is not copied again until its next hit
            self.take_jobs()
            if not self.jobs:
                return
            while self.jobs:
                job, asked = self.jobs.pop()
                assert self.source(job) == asked
                if isinstance(job, BackUpPages):
                    self.cache.backed_up(PagesBackedUp(job_id=job.job_id, ok=False))
                else:
                    (request,) = (each for each in [*self.requests, *self.early] if each.load_id == job.job_id)
                    self.cache.loaded(PagesLoaded(job_id=job.job_id, ok=False), request.token_ids)
        raise AssertionError("copies begin without end")

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.fail_all_copies()
        for _ in list(self.store_jobs):
            self.run_store_job(0, False, True)
        self.run_all_store_jobs()
        for prefetch, _ in self.prefetches:
            self.storage.close(prefetch)
        self.prefetches = []
        self.waiting.clear()
        self.fail_all_copies()
        self.run_all_store_jobs()
        assert not self.storage.open_prefetches
        assert self.storage.num_reserved == 0
        for request in [*self.requests, *self.early]:
            self.cache.close(request.lease)
        self.cache.flush()
        counts, host = self.cache.counts(), self.tier.counts()
        assert (counts.free, counts.cached, counts.owned, counts.in_flight) == (NUM_PAGES, 0, 0, 0)
        assert host.free == host.total


TiersMachine.TestCase.settings = settings(max_examples=budget(60, long=3000), stateful_step_count=50)
TestTiers = TiersMachine.TestCase
