"""The page cache under any order of calls: every page holds the K/V that its user expects.

The state machine keeps the pool's content. The prefix that a page was computed from stands for its K/V: a page that is
allocated twice, freed too early, evicted while used or matched wrongly shows as wrong content.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from kvist.kv.cache import PageCache
from kvist.kv.keys import page_digests
from kvist.kv.lease import PageLease
from kvist.kv.pages import PageState
from kvist.testing.page_events import ReplayedPages, listed_digests, listed_pages, short
from tests.budget import budget

NUM_PAGES = 10
PAGE_SIZE = 2
NAMESPACE = "space"

Content = tuple[str, tuple[int, ...]]  # cache salt, tokens up to the end of the page

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple)
SALTS = st.sampled_from(["", "salt"])


@dataclass(eq=False)
class Request:
    """A lease, and the state that its user expects."""

    lease: PageLease
    token_ids: tuple[int, ...]
    cache_salt: str
    num_written: int  # K/V of token_ids[:num_written] is in the pages
    num_inserted_pages: int
    in_flight: bool = False

    def content(self, page: int) -> Content:
        return (self.cache_salt, self.token_ids[: min((page + 1) * PAGE_SIZE, self.num_written)])

    def written_pages(self) -> range:
        return range(-(-self.num_written // PAGE_SIZE))


class CacheMachine(RuleBasedStateMachine):
    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.cache = PageCache(num_pages=NUM_PAGES, page_size=PAGE_SIZE, namespace=NAMESPACE)
        self.content: dict[int, Content] = {}
        self.open_requests: list[Request] = []
        self.replayed = ReplayedPages()

    def model_hit(self, token_ids: tuple[int, ...], cache_salt: str, max_tokens: int) -> int:
        """Count the cached tokens by comparing digests with those of every cached page."""
        cached = listed_digests(self.cache.list_pages)
        num_tokens = 0
        for digest in page_digests(token_ids[:max_tokens], PAGE_SIZE, NAMESPACE, cache_salt):
            if short(digest) not in cached:
                break
            num_tokens += PAGE_SIZE
        return num_tokens

    @rule(target=requests, token_ids=TOKENS, cache_salt=SALTS, all_tokens=st.booleans())
    def open(self, token_ids: tuple[int, ...], cache_salt: str, all_tokens: bool) -> Request:
        max_tokens = len(token_ids) - (0 if all_tokens else 1)
        expected = self.model_hit(token_ids, cache_salt, max_tokens)
        lease = self.cache.open(token_ids, cache_salt=cache_salt, max_tokens=max_tokens)
        assert lease.num_cached_tokens == expected
        assert len(lease.page_ids) * PAGE_SIZE == expected
        request = Request(lease, token_ids, cache_salt, expected, expected // PAGE_SIZE)
        self.open_requests.append(request)
        return request

    @rule(request=requests, num_tokens=st.integers(1, 9))
    def grow(self, request: Request, num_tokens: int) -> None:
        before, counts = list(request.lease.page_ids), self.cache.counts()
        num_needed = max(0, -(-num_tokens // PAGE_SIZE) - len(before))
        grown = self.cache.grow(request.lease, num_tokens)
        assert grown == (num_needed <= counts.free + counts.evictable)
        if not grown:
            assert request.lease.page_ids == before
            assert self.cache.counts() == counts
            return
        assert len(request.lease.page_ids) == len(before) + num_needed
        for page_id in request.lease.page_ids[len(before) :]:
            self.content[page_id] = ("scribble", ())  # the request may write its own pages at once

    @precondition(lambda self: any(not request.in_flight for request in self.open_requests))
    @rule(data=st.data(), more=st.integers(0, 5), more_tokens=st.lists(st.integers(0, 1), max_size=3))
    def write_and_commit(self, data: st.DataObject, more: int, more_tokens: list[int]) -> None:
        request = data.draw(st.sampled_from([request for request in self.open_requests if not request.in_flight]))
        request.token_ids += tuple(more_tokens)  # a stream decodes on
        room = min(len(request.lease.page_ids) * PAGE_SIZE, len(request.token_ids))
        start = request.num_written
        request.num_written = min(start + more, room)
        for page in request.written_pages():
            if (page + 1) * PAGE_SIZE > start:
                self.content[request.lease.page_ids[page]] = request.content(page)
        self.cache.insert(request.lease, request.token_ids, request.num_written)
        request.num_inserted_pages = request.num_written // PAGE_SIZE

    @precondition(lambda self: self.open_requests)
    @rule(data=st.data(), first_page=st.integers(0, 4))
    def begin_transfer(self, data: st.DataObject, first_page: int) -> None:
        request = data.draw(st.sampled_from(self.open_requests))
        self.cache.begin_transfer(request.lease, first_page)
        request.in_flight = request.in_flight or len(request.lease.page_ids) > max(
            first_page, request.num_inserted_pages
        )

    @precondition(lambda self: self.open_requests)
    @rule(data=st.data())
    def end_transfer(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.open_requests))
        self.cache.end_transfer(request.lease)
        request.in_flight = False

    @rule(target=requests, request=consumes(requests))
    def close(self, request: Request) -> object:
        if request.in_flight:
            return request
        self.open_requests.remove(request)
        self.cache.close(request.lease)
        return multiple()

    @rule()
    def flush(self) -> None:
        evictable = self.cache.counts().evictable
        assert self.cache.flush() == (evictable, None)
        assert self.cache.counts().evictable == 0

    @rule()
    def replay_events(self) -> None:
        self.replayed.apply(self.cache.take_changed_pages())
        assert self.replayed.pages == listed_pages(self.cache.list_pages)

    @invariant()
    def every_page_is_in_exactly_one_state(self) -> None:
        counts = self.cache.counts()
        assert counts.free + counts.cached + counts.owned + counts.in_flight == counts.total == NUM_PAGES
        cached = [node.page_id for node in self.cache._tree.nodes()]
        own = [page_id for request in self.open_requests for page_id in self.own_pages(request)]
        free = list(self.cache._ledger._free)
        assert sorted(cached + own + free) == list(range(NUM_PAGES))
        assert (len(cached), len(own), len(free)) == (counts.cached, counts.owned + counts.in_flight, counts.free)

    def own_pages(self, request: Request) -> Iterator[int]:
        state = self.cache._ledger.state
        return (page_id for page_id in request.lease.page_ids if state(page_id) is not PageState.CACHED)

    @invariant()
    def every_request_reads_what_it_wrote_or_matched(self) -> None:
        for request in self.open_requests:
            for page in request.written_pages():
                assert self.content[request.lease.page_ids[page]] == request.content(page)

    @invariant()
    def pages_no_request_uses_can_be_had(self) -> None:
        used = {page_id for request in self.open_requests for page_id in request.lease.page_ids}
        counts = self.cache.counts()
        assert counts.free + counts.evictable == NUM_PAGES - len(used)

    @invariant()
    def own_pages_of_a_transfer_are_in_flight(self) -> None:
        num_in_flight = self.cache.counts().in_flight
        assert (num_in_flight > 0) == any(request.in_flight for request in self.open_requests)

    def teardown(self) -> None:
        for request in self.open_requests:
            self.cache.end_transfer(request.lease)
            self.cache.close(request.lease)
        self.cache.flush()
        counts = self.cache.counts()
        assert (counts.free, counts.cached, counts.owned, counts.in_flight) == (NUM_PAGES, 0, 0, 0)
        assert listed_digests(self.cache.list_pages) == set()


CacheMachine.TestCase.settings = settings(max_examples=budget(50, long=2000), stateful_step_count=50)
TestCache = CacheMachine.TestCase
