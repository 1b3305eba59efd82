"""The storage tier's plan: the pages to store, the pages to fetch, their slots, and the share of the host tier."""

from __future__ import annotations

import math

from kvist.kv.tiers.host import HostPage, HostTier
from kvist.kv.tiers.prefetch import Prefetch, PrefetchConfig
from kvist.kv.tiers.storage import FETCH_PAGES, MAX_FINDS, StorageTier
from kvist.kv.tiers.store_queue import MAX_STORES
from kvist.plan.tiers import (
    CancelFetch,
    FetchPages,
    FindPages,
    PagesFetched,
    PagesFound,
    PagesStored,
    StorageAttached,
    StoreJob,
    StorePages,
)


def tier(num_host_pages: int, threshold_tokens: int = 1) -> tuple[HostTier, StorageTier]:
    host = HostTier(num_host_pages)
    storage = StorageTier(host, PrefetchConfig(threshold_tokens=threshold_tokens), page_size=1)
    storage.on_event(StorageAttached(attached=True))
    return host, storage


def chain(name: str, length: int) -> list[bytes]:
    return [f"{name}{place}".encode() for place in range(length)]


def keep(host: HostTier, digests: list[bytes]) -> list[HostPage]:
    pages: list[HostPage] = []
    for digest in digests:
        page = host.reserve(pages[-1] if pages else None, digest)
        assert page is not None
        host.written(page, ok=True)
        pages.append(page)
    return pages


def planned_jobs(storage: StorageTier) -> list[StoreJob]:
    storage.start_queued()
    return storage.take_jobs()


def settled(storage: StorageTier) -> list[Prefetch]:
    storage.start_queued()
    return storage.take_settled()


def begin(storage: StorageTier, digests: list[bytes], num_cached: int = 0) -> tuple[Prefetch, FindPages]:
    prefetch = storage.begin(digests, num_cached)
    (find,) = planned_jobs(storage)
    assert prefetch is not None
    assert isinstance(find, FindPages)
    return prefetch, find


def fetches(storage: StorageTier) -> list[FetchPages]:
    return [job for job in planned_jobs(storage) if isinstance(job, FetchPages)]


def test_each_prefetch_policy_sets_the_longest_wait() -> None:
    assert PrefetchConfig().wait_s(8000) == 1.0 + 8 * 0.25
    assert PrefetchConfig(policy="best_effort").wait_s(8000) == 0
    assert PrefetchConfig(policy="wait_complete").wait_s(8000) == math.inf


def test_a_long_prefix_is_fetched_in_pieces_after_the_pages_in_the_host_tier() -> None:
    host, storage = tier(1000)
    digests = chain("a", 300)
    head = keep(host, digests[:10])
    prefetch, find = begin(storage, digests)
    assert find.digests == tuple(digests[10:])
    storage.on_event(PagesFound(job_id=find.job_id, num_pages=280))
    jobs = fetches(storage)
    assert [len(job.digests) for job in jobs] == [FETCH_PAGES] * 17 + [280 - 17 * FETCH_PAGES]
    assert jobs[0].names[0] == (digests[10], head[-1].digest)
    assert len({slot for job in jobs for slot in job.host_slots} | {page.slot for page in head}) == 290
    for job in reversed(jobs):
        assert not prefetch.is_done
        storage.on_event(PagesFetched(job_id=job.job_id, num_pages=len(job.digests)))
    assert settled(storage) == [prefetch]
    assert len(host.match(digests)) == 290
    assert [page.from_storage for page in host.match(digests)] == [False] * 10 + [True] * 280


def test_a_page_counts_as_a_miss_only_if_the_store_reported_it_missing() -> None:
    _, storage = tier(100)
    for answered, num_misses in ((False, 0), (True, 10)):
        _, find = begin(storage, chain("a", 10))
        storage.on_event(PagesFound(job_id=find.job_id, num_pages=0, answered=answered))
        assert storage.totals()["storage_miss_pages"] == num_misses


def test_pages_in_the_device_pool_are_fetched_only_as_the_prefix_of_missing_pages() -> None:
    _, storage = tier(100, threshold_tokens=4)
    digests = chain("a", 10)
    assert storage.begin(digests, 7) is None
    _, find = begin(storage, digests, 6)
    assert len(find.digests) == 10
    storage.on_event(PagesFound(job_id=find.job_id, num_pages=9))
    assert fetches(storage) == []
    assert len(settled(storage)) == 1
    _, find = begin(storage, digests, 5)
    storage.on_event(PagesFound(job_id=find.job_id, num_pages=9))
    (job,) = fetches(storage)
    assert job.digests == tuple(digests[:9])


def test_fetched_pages_stay_until_their_request_is_admitted() -> None:
    host, storage = tier(8)
    digests = chain("a", 4)
    prefetch, find = begin(storage, digests)
    storage.on_event(PagesFound(job_id=find.job_id, num_pages=4))
    (job,) = fetches(storage)
    storage.on_event(PagesFetched(job_id=job.job_id, num_pages=3))
    keep(host, chain("other", 5))
    assert host.reserve(None, b"more") is not None
    assert len(host.match(digests)) == 3  # the other pages are newer, but one of them was evicted
    storage.close(prefetch)
    host.flush()
    assert host.match(digests) == []


def test_prefetches_use_at_most_half_of_the_host_tier_and_queue_for_it_in_order() -> None:
    _, storage = tier(16)
    opened = [begin(storage, chain(name, 6)) for name in "abc"]
    for _, find in opened:
        storage.on_event(PagesFound(job_id=find.job_id, num_pages=6))
    (first,) = fetches(storage)
    storage.on_event(PagesFetched(job_id=first.job_id, num_pages=6))
    assert fetches(storage) == []  # the fetched pages fill the share
    assert settled(storage) == [opened[0][0]]
    storage.give_up(opened[1][0])  # the second request stops waiting
    storage.close(opened[0][0])
    (third,) = fetches(storage)
    assert third.digests == tuple(chain("c", 6))
    storage.on_event(PagesFetched(job_id=third.job_id, num_pages=0))
    assert settled(storage) == [opened[2][0]]
    prefetch, find = begin(storage, chain("long", 30))
    storage.on_event(PagesFound(job_id=find.job_id, num_pages=30))
    (long,) = fetches(storage)
    assert len(long.digests) == 8
    storage.close(prefetch)
    assert planned_jobs(storage) == [CancelFetch(job_id=long.job_id)]
    assert storage.num_reserved == 8
    storage.on_event(PagesFetched(job_id=long.job_id, num_pages=2))
    assert storage.num_reserved == 0


def test_a_shared_fetch_is_cancelled_when_its_last_request_leaves() -> None:
    _, storage = tier(16)
    digests = chain("a", 4)
    first, find = begin(storage, digests)
    storage.on_event(PagesFound(job_id=find.job_id, num_pages=4))
    (job,) = fetches(storage)
    second = storage.begin(digests, 0)
    assert second is not None
    storage.close(first)
    assert planned_jobs(storage) == []
    storage.close(second)
    assert planned_jobs(storage) == [CancelFetch(job_id=job.job_id)]
    storage.on_event(PagesFetched(job_id=job.job_id, num_pages=0))
    assert storage.totals()["storage_failed_pages"] == 0
    assert settled(storage) == []


def test_a_prefix_evicted_during_the_store_lookup_is_fetched_with_the_rest() -> None:
    host, storage = tier(20)
    digests = chain("a", 6)
    keep(host, digests[:3])
    _, find = begin(storage, digests)
    host.flush()
    storage.on_event(PagesFound(job_id=find.job_id, num_pages=3))
    (job,) = fetches(storage)
    assert job.digests == tuple(digests)


def test_pages_are_stored_again_only_after_a_failure_or_in_another_store() -> None:
    host, storage = tier(40)
    pages = keep(host, chain("a", 4))
    storage.store(pages)
    storage.store(pages)
    (job,) = planned_jobs(storage)
    assert isinstance(job, StorePages)
    assert host.counts().in_flight == 4
    storage.on_event(PagesStored(job_id=job.job_id, num_pages=3))
    assert host.counts().in_flight == 0
    storage.store(pages)
    (job,) = planned_jobs(storage)
    assert isinstance(job, StorePages)
    assert job.digests == (pages[3].digest,)
    storage.on_event(StorageAttached(attached=False))
    storage.store(pages)
    assert planned_jobs(storage) == []
    storage.on_event(StorageAttached(attached=True))
    storage.on_event(PagesStored(job_id=job.job_id, num_pages=1))  # in the detached store
    storage.store(pages)
    (job,) = planned_jobs(storage)
    assert isinstance(job, StorePages)
    assert len(job.digests) == 4


def test_a_page_fetched_from_a_detached_store_is_not_assumed_in_the_next() -> None:
    host, storage = tier(40)
    digests = chain("a", 4)
    _, find = begin(storage, digests)
    storage.on_event(PagesFound(job_id=find.job_id, num_pages=4))
    (job,) = fetches(storage)
    storage.on_event(StorageAttached(attached=True))
    storage.on_event(PagesFetched(job_id=job.job_id, num_pages=4))
    assert [page.stored for page in host.match(digests)] == [False] * 4


def stores(storage: StorageTier) -> list[StorePages]:
    return [job for job in planned_jobs(storage) if isinstance(job, StorePages)]


def test_writes_to_the_store_are_bounded_in_jobs_and_in_host_pages() -> None:
    host, storage = tier(8 * MAX_STORES)
    for number in range(MAX_STORES + 5):
        storage.store(keep(host, chain(f"{number}-", 1)))
    jobs = stores(storage)
    assert len(jobs) == MAX_STORES
    for job in jobs[:2]:
        storage.on_event(PagesStored(job_id=job.job_id, num_pages=1))
    assert [len(job.digests) for job in stores(storage)] == [5], "the next job takes all that wait"
    host, storage = tier(40)
    pages = keep(host, chain("a", 30))
    storage.store(pages)
    storage.store(pages)
    stored: list[bytes] = []
    while jobs := stores(storage):
        (job,) = jobs
        assert len(job.digests) == 10
        stored += job.digests
        storage.on_event(PagesStored(job_id=job.job_id, num_pages=10))
    assert stored == [page.digest for page in pages]
    assert (storage.totals()["storage_stored_pages"], storage.totals()["storage_skipped_pages"]) == (30, 0)


def test_pages_waiting_to_be_stored_are_skipped_after_an_eviction_or_a_detach() -> None:
    host, storage = tier(40)
    pages = keep(host, chain("a", 30))
    storage.store(pages)
    (job,) = stores(storage)
    keep(host, chain("b", 25))  # evicts 15 of the 20 that wait
    storage.on_event(PagesStored(job_id=job.job_id, num_pages=10))
    (job,) = stores(storage)
    assert job.digests == tuple(page.digest for page in pages[10:15])
    assert storage.totals()["storage_skipped_pages"] == 15
    storage.store(host.match(chain("b", 25)))
    (more,) = stores(storage)
    assert len(more.digests) == 5
    storage.on_event(StorageAttached(attached=False))
    storage.on_event(StorageAttached(attached=True))
    for each in (job, more):
        storage.on_event(PagesStored(job_id=each.job_id, num_pages=5))
    assert stores(storage) == []


def test_pages_waiting_to_be_stored_never_outnumber_the_host_tier() -> None:
    host, storage = tier(40)
    storage.store(keep(host, chain("a", 10)))
    for number in range(20):  # the store hangs; the host tier does not
        storage.store(keep(host, chain(f"{number}-", 10)))
        assert storage.num_due <= 40
    assert storage.totals()["storage_skipped_pages"] == 20 * 10 - 40


def test_store_lookups_under_way_are_bounded() -> None:
    _, storage = tier(8)
    for number in range(MAX_FINDS):
        prefetch = storage.begin(chain(f"{number}-", 2), 0)
        assert prefetch is not None
        storage.close(prefetch)  # the request has ended; the store has not answered
    assert storage.begin(chain("more", 2), 0) is None
    for job in planned_jobs(storage):
        storage.on_event(PagesFound(job_id=job.job_id, num_pages=2))
    assert planned_jobs(storage) == []
    assert storage.begin(chain("more", 2), 0) is not None
