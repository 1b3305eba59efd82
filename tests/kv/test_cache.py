"""The page cache, one guarantee at a time. test_cache_machine.py tries all calls in any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import pytest

from kvist.kv.cache import PageCache
from kvist.kv.keys import page_digests
from kvist.kv.lease import PageLease
from kvist.testing.page_events import ReplayedPages, changed_pages, listed_digests, listed_pages, short

PAGE_SIZE = 4


def make_cache(num_pages: int = 16) -> PageCache:
    return PageCache(num_pages=num_pages, page_size=PAGE_SIZE, namespace="space")


def write(cache: PageCache, tokens: Sequence[int], *, cache_salt: str = "") -> PageLease:
    """A request that has computed all its tokens."""
    lease = cache.open(tokens, cache_salt=cache_salt, max_tokens=len(tokens))
    assert cache.grow(lease, len(tokens))
    cache.insert(lease, tokens, len(tokens))
    return lease


def num_cached(cache: PageCache, tokens: Sequence[int], cache_salt: str = "") -> int:
    """Count the tokens in leading cached pages, without a change of the eviction order."""
    cached = listed_digests(cache.list_pages)
    digests = page_digests(tokens, PAGE_SIZE, "space", cache_salt)
    return next((page for page, digest in enumerate(digests) if short(digest) not in cached), len(digests)) * PAGE_SIZE


# ---- match


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "hit"), [(8, 8, 8), (8, 7, 4), (9, 8, 8), (7, 7, 4), (3, 3, 0), (20, 20, 12)]
)
def test_a_hit_is_the_longest_cached_prefix_in_whole_pages(num_tokens: int, max_tokens: int, hit: int) -> None:
    cache = make_cache()
    first = write(cache, range(14))
    pages = list(first.page_ids)
    lease = cache.open(range(num_tokens), max_tokens=max_tokens)
    assert lease.num_cached_tokens == hit
    assert lease.page_ids == pages[: hit // PAGE_SIZE]


def test_a_prompt_hits_up_to_the_page_where_it_differs() -> None:
    cache = make_cache()
    cache.close(write(cache, range(12)))
    assert num_cached(cache, [0, 1, 2, 3, 4, 5, 6, 99, 8, 9, 10, 11]) == 4
    assert num_cached(cache, [99, *range(1, 12)]) == 0


def test_salts_do_not_mix() -> None:
    cache = make_cache()
    cache.close(write(cache, range(8), cache_salt="a"))
    assert num_cached(cache, range(8), "a") == 8
    assert num_cached(cache, range(8), "b") == 0
    assert num_cached(cache, range(8)) == 0
    lease = write(cache, range(8), cache_salt="b")
    assert lease.num_cached_tokens == 0
    assert len(listed_digests(cache.list_pages)) == 4


def test_cached_pages_have_the_digests_that_the_gateway_computes() -> None:
    cache = make_cache()
    write(cache, range(10), cache_salt="s")
    digests = page_digests(range(10), PAGE_SIZE, "space", "s")
    assert cache.take_changed_pages() == (changed_pages(*digests),)
    assert listed_digests(cache.list_pages) == set(map(short, digests))


# ---- grow


def test_grow_is_all_or_nothing() -> None:
    cache = make_cache(num_pages=3)
    lease = cache.open(range(16), max_tokens=15)
    assert not cache.grow(lease, 13)
    assert lease.page_ids == []
    assert cache.grow(lease, 12)
    assert len(lease.page_ids) == 3


def test_a_failed_grow_evicts_nothing() -> None:
    cache = make_cache(num_pages=4)
    cache.close(write(cache, range(8)))
    held = write(cache, range(50, 54))
    lease = cache.open([99] * 16, max_tokens=15)
    assert not cache.grow(lease, 16)
    assert num_cached(cache, range(8)) == 8
    assert held.page_ids


def test_grow_evicts_only_the_pages_it_lacks_and_never_pages_in_use() -> None:
    cache = make_cache(num_pages=6)
    used = write(cache, range(8))
    cache.close(write(cache, range(50, 58)))
    lease = cache.open([99] * 12, max_tokens=11)
    assert cache.grow(lease, 12)  # two were free, one is evicted
    assert num_cached(cache, range(8)) == 8
    assert num_cached(cache, range(50, 58)) == 4
    assert not set(lease.page_ids) & set(used.page_ids)


def test_the_prefix_of_a_used_page_is_never_evicted() -> None:
    cache = make_cache(num_pages=4)
    cache.close(write(cache, range(8)))
    reader = cache.open(range(8), max_tokens=8)
    other = cache.open([99] * 16, max_tokens=15)
    assert not cache.grow(other, 12)
    assert cache.grow(other, 8)
    assert reader.num_cached_tokens == num_cached(cache, range(8)) == 8


# ---- insert


def test_insert_shares_full_pages_only_and_continues_where_it_stopped() -> None:
    cache = make_cache()
    lease = cache.open(range(11), max_tokens=10)
    cache.grow(lease, 11)
    for num_tokens, cached in [(3, 0), (4, 4), (4, 4), (7, 4), (11, 8)]:
        cache.insert(lease, range(11), num_tokens)
        assert num_cached(cache, range(11)) == cached
    assert cache.counts().owned == 1


def test_pages_not_inserted_are_never_shared() -> None:
    cache = make_cache()
    lease = cache.open(range(8), max_tokens=7)
    cache.grow(lease, 8)
    cache.close(lease)
    assert num_cached(cache, range(8)) == 0
    assert cache.counts().free == cache.counts().total


def test_a_page_computed_twice_stays_with_its_request_while_the_first_is_used() -> None:
    cache = make_cache()
    first, second = cache.open(range(8), max_tokens=7), cache.open(range(8), max_tokens=7)
    for lease in (first, second):
        cache.grow(lease, 8)
        cache.insert(lease, range(8), 8)
    assert not set(first.page_ids) & set(second.page_ids)
    assert (cache.counts().cached, cache.counts().owned) == (2, 2)
    assert cache.open(range(8), max_tokens=8).page_ids == first.page_ids


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (2, 0, 1)])
def test_equal_requests_closed_in_any_order_leave_one_copy(order: tuple[int, ...]) -> None:
    cache = make_cache()
    leases = [cache.open(range(8), max_tokens=7) for _ in range(3)]
    for lease in leases:
        cache.grow(lease, 8)
        cache.insert(lease, range(8), 8)
    cache.take_changed_pages()
    for index in order:
        cache.close(leases[index])
    counts = cache.counts()
    assert (counts.cached, counts.evictable, counts.owned) == (2, 2, 0)
    assert cache.take_changed_pages() == ()


def test_a_lone_request_can_use_the_whole_pool_after_an_equal_one_wrote_its_prefix() -> None:
    """Otherwise the oldest request could wait for ever for pages that only its own pin keeps."""
    cache = make_cache(num_pages=8)
    other, lease = cache.open(range(16), max_tokens=15), cache.open(range(16), max_tokens=15)
    for one in (other, lease):
        assert cache.grow(one, 16)
        cache.insert(one, range(16), 16)
    cache.close(other)
    assert cache.grow(lease, 32)
    assert len(set(lease.page_ids)) == 8


def test_a_page_computed_again_replaces_the_unused_copy() -> None:
    cache = make_cache()
    cache.close(write(cache, range(8)))
    lease = cache.open(range(8), max_tokens=7)  # must compute its last token, so it computes the last page
    cache.grow(lease, 8)
    cache.insert(lease, range(8), 8)
    counts = cache.counts()
    assert (counts.cached, counts.owned, counts.evictable) == (2, 0, 0)
    assert cache.open(range(8), max_tokens=8).page_ids == lease.page_ids


def test_the_page_list_of_a_plan_survives_close() -> None:
    cache = make_cache()
    lease = write(cache, range(8))
    page_ids = lease.page_ids
    cache.close(lease)
    assert len(page_ids) == 2
    assert lease.page_ids == []


# ---- transfers


def test_granted_pages_are_in_flight_until_the_transfer_ends_and_then_can_be_shared() -> None:
    cache = make_cache()
    cache.close(write(cache, range(4)))
    lease = cache.open(range(10), max_tokens=10)
    cache.grow(lease, 10)
    cache.begin_transfer(lease, 1)
    assert (cache.counts().in_flight, cache.counts().owned) == (2, 0)
    cache.end_transfer(lease)
    cache.insert(lease, range(10), 10)
    assert (cache.counts().in_flight, cache.counts().owned, cache.counts().cached) == (0, 1, 2)


def test_pages_in_flight_can_be_neither_shared_nor_freed() -> None:
    cache = make_cache()
    lease = cache.open(range(8), max_tokens=8)
    cache.grow(lease, 8)
    cache.begin_transfer(lease, 0)
    with pytest.raises(AssertionError, match="end the transfer"):
        cache.insert(lease, range(8), 8)
    with pytest.raises(AssertionError, match="end the transfer"):
        cache.close(lease)
    assert cache.flush() == (0, None)
    assert cache.counts().in_flight == 2


def test_a_transfer_can_be_widened_and_ended_twice() -> None:
    cache = make_cache()
    lease = cache.open(range(12), max_tokens=11)
    cache.grow(lease, 8)
    cache.begin_transfer(lease, 1)
    cache.grow(lease, 12)
    cache.begin_transfer(lease, 0)
    assert cache.counts().in_flight == 3
    cache.end_transfer(lease)
    cache.end_transfer(lease)
    assert (cache.counts().in_flight, cache.counts().owned) == (0, 3)


def test_a_transfer_of_cached_pages_leaves_them_cached_and_pinned() -> None:
    cache = make_cache(num_pages=3)
    lease = cache.open(range(10), max_tokens=9)
    cache.grow(lease, 10)
    cache.insert(lease, range(10), 10)
    cache.begin_transfer(lease, 0)
    assert (cache.counts().cached, cache.counts().in_flight, cache.counts().evictable) == (2, 1, 0)


# ---- close, flush, changes


def test_a_lease_is_closed_once() -> None:
    cache = make_cache()
    lease = write(cache, range(8))
    cache.close(lease)
    with pytest.raises(AssertionError, match="closed once"):
        cache.close(lease)


def test_flush_frees_all_pages_except_those_in_use() -> None:
    cache = make_cache()
    cache.close(write(cache, range(12)))
    reader = cache.open(range(4), max_tokens=4)
    assert cache.flush() == (2, None)
    assert num_cached(cache, range(12)) == 4
    cache.close(reader)
    assert cache.flush() == (1, None)
    assert cache.counts().free == cache.counts().total


def test_changes_replayed_equal_the_list_of_all_pages() -> None:
    cache = make_cache(num_pages=4)
    replayed = ReplayedPages()
    for start in (0, 100, 0, 200, 100):
        cache.close(write(cache, range(start, start + 12)))
        replayed.apply(cache.take_changed_pages())
        assert replayed.pages == listed_pages(cache.list_pages)
    assert len(replayed.pages) == 4


def test_insert_without_a_newly_full_page_does_not_read_the_tokens() -> None:
    """O(1): insert does not read the tokens."""

    class Untouchable(list[int]):
        def __getitem__(self, index: object) -> NoReturn:
            raise AssertionError("read")

    cache = make_cache()
    lease = write(cache, range(10))
    assert cache.grow(lease, 12)
    cache.insert(lease, Untouchable(range(11)), 11)
