"""The ceiling is the hits of an infinite cache, exact while nothing is forgotten, and never below the hits."""

from __future__ import annotations

from collections import OrderedDict
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.kv.cache import PageCache
from kvist.kv.ceiling import EvictionHistory
from kvist.kv.keys import page_digests
from kvist.kv.lease import PageLease
from kvist.kv.tiers.host import HostTier
from kvist.plan.tiers import BackUpPages, LoadPages, PagesBackedUp, PagesLoaded
from kvist.testing.page_events import listed_digests, short
from tests.budget import budget

PAGE_SIZE = 2
NUM_PAGES = 9
ONE_ROW = 16


def digest(number: int) -> bytes:
    return (number + 1).to_bytes(8, "little") + number.to_bytes(24, "little")


def test_the_count_ends_at_the_first_page_that_was_never_evicted() -> None:
    history = EvictionHistory()
    for number in (1, 2, 4):
        history.remember(digest(number))
    assert history.num_leading(map(digest, (1, 2, 3, 4))) == 2
    assert history.num_leading(map(digest, (3, 4))) == 0
    assert (history.num_remembered, history.num_forgotten) == (3, 0)


@given(st.lists(st.integers(0, ONE_ROW + 4), max_size=80))
def test_a_full_row_forgets_and_counts_the_digest_evicted_longest_ago(numbers: list[int]) -> None:
    history, model, num_new = EvictionHistory(ONE_ROW), OrderedDict[int, None](), 0
    for number in numbers:
        num_new += number not in model
        model[number] = None
        model.move_to_end(number)
        if len(model) > ONE_ROW:
            model.popitem(last=False)
        history.remember(digest(number))
    assert {number for number in range(ONE_ROW + 5) if history.num_leading([digest(number)])} == set(model)
    assert (history.num_remembered, history.num_forgotten) == (num_new, num_new - len(model))


def test_two_hundred_thousand_digests_are_all_known() -> None:
    history = EvictionHistory()
    for number in range(200_000):
        history.remember(page_digests((number,), 1, "space")[0])
    assert (history.num_remembered, history.num_forgotten) == (200_000, 0)


# ---- in the cache


def run_job(cache: PageCache, lease: PageLease, tokens: list[int], *, copies_work: bool) -> int:
    """Run the mover's jobs; return the tokens that the lease has."""
    num_hit = lease.num_cached_tokens
    for job in cache.plan_jobs():
        if isinstance(job, LoadPages):
            num_hit = cache.loaded(PagesLoaded(job_id=job.job_id, ok=copies_work), tokens)
        elif isinstance(job, BackUpPages):
            cache.backed_up(PagesBackedUp(job_id=job.job_id, ok=copies_work))
    return num_hit


@settings(max_examples=budget(30, long=500))
@given(
    seed=st.integers(0, 2**32),
    num_host_pages=st.sampled_from([0, 4, 12]),
    policy=st.sampled_from(["write_through", "write_back"]),
)
def test_the_ceiling_is_what_was_ever_cached_and_no_hit_exceeds_it(seed: int, num_host_pages: int, policy: str) -> None:
    random = Random(seed)
    host = HostTier(num_host_pages) if num_host_pages else None
    cache = PageCache(num_pages=NUM_PAGES, page_size=PAGE_SIZE, namespace="space", host=host, write_policy=policy)
    ever: set[bytes] = set()
    open_leases: list[PageLease] = []  # their pages stay while others are evicted
    for _ in range(60):
        if open_leases and random.random() < 0.5:
            cache.close(open_leases.pop())
        if random.random() < 0.03:
            cache.flush()
            ever = listed_digests(cache.list_pages)
        tokens = random.choices((0, 1), weights=(3, 1), k=random.randint(1, 9))
        lease = cache.open(tokens, max_tokens=len(tokens) - 1)
        if not cache.grow(lease, len(tokens)):
            cache.close(lease)
            continue
        cache.start_load(lease, tokens, max_tokens=len(tokens) - 1)
        named = page_digests(tokens[:-1], PAGE_SIZE, "space")
        expected = next((index for index, name in enumerate(named) if short(name) not in ever), len(named)) * PAGE_SIZE
        assert lease.num_ceiling_tokens == expected
        num_hit = run_job(cache, lease, tokens, copies_work=random.random() < 0.8)
        assert num_hit <= expected
        assert num_hit == expected or cache.totals()["device_evicted_pages"]
        cache.insert(lease, tokens, len(tokens))
        ever |= {short(name) for name in page_digests(tokens, PAGE_SIZE, "space")}
        run_job(cache, lease, tokens, copies_work=random.random() < 0.8)
        open_leases.append(lease)


def test_flushed_pages_are_not_part_of_the_ceiling() -> None:
    cache = PageCache(num_pages=NUM_PAGES, page_size=PAGE_SIZE, namespace="space")
    tokens = list(range(9))
    for expected in (0, 0):
        lease = cache.open(tokens, max_tokens=8)
        assert cache.grow(lease, 9)
        cache.start_load(lease, tokens, max_tokens=8)
        assert lease.num_ceiling_tokens == expected
        cache.insert(lease, tokens, 9)
        cache.close(lease)
        cache.flush()
