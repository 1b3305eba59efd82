"""The ledger of leases under any order of calls: it pins the leased pages, within its limits, and leaks none."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvist.kv import prefix_leases as module
from kvist.kv.cache import PageCache
from kvist.kv.prefix_leases import PrefixLeases
from tests.budget import budget

NUM_PAGES, PAGE_SIZE = 16, 2
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=13)
SALTS = st.sampled_from(["", "salt"])
OWNERS = st.sampled_from(["", "k", "l"])


class LedgerMachine(RuleBasedStateMachine):
    @initialize(most=st.integers(0, 12), of_owner=st.integers(0, 12))
    def start(self, most: int, of_owner: int) -> None:
        self.cache = PageCache(num_pages=NUM_PAGES, page_size=PAGE_SIZE, namespace="n")
        self.ledger = PrefixLeases(self.cache, max_pages=most, max_owner_pages=of_owner)
        self.expected: dict[str, tuple[str, float, list[bytes]]] = {}  # owner, end, digests
        self.count = 0

    @rule(token_ids=TOKENS, salt=SALTS)
    def compute(self, token_ids: list[int], salt: str) -> None:
        """Cache a prompt, evicting what is not leased."""
        lease = self.cache.open(token_ids, cache_salt=salt, max_tokens=len(token_ids))
        if self.cache.grow(lease, len(token_ids)):
            self.cache.insert(lease, token_ids, len(token_ids))
        self.cache.close(lease)

    @rule(token_ids=TOKENS, salt=SALTS, owner=OWNERS, ends_at_s=st.floats(0, 9))
    def take(self, token_ids: list[int], salt: str, owner: str, ends_at_s: float) -> None:
        before = self.cache.open(token_ids, cache_salt=salt, max_tokens=len(token_ids))
        digests = self.cache.digests_of(before)
        assert digests == self.cache.page_digests(token_ids, salt)[: len(digests)]
        self.cache.close(before)
        has_room = self.ledger.has_room(owner, digests)
        self.count += 1
        name = f"l{self.count}"
        lease = self.ledger.take(name, owner, token_ids, cache_salt=salt, ends_at_s=ends_at_s)
        assert (lease is not None) == has_room == self.fits(owner, digests)
        if lease is not None:
            self.expected[name] = owner, ends_at_s, digests
            assert self.ledger.take(name, "x", token_ids, cache_salt=salt, ends_at_s=0.0) is None

    def fits(self, owner: str, digests: list[bytes]) -> bool:
        pages = self.pages()
        of_all, of_owner = pages[None] | set(digests), pages[owner] | set(digests)
        limit = self.ledger.max_owner_pages if owner else self.ledger.max_pages
        return len(of_all) <= self.ledger.max_pages and len(of_owner) <= limit

    def pages(self) -> defaultdict[str | None, set[bytes]]:
        """Return the leased pages of each owner, and of all under None."""
        found: defaultdict[str | None, set[bytes]] = defaultdict(set)
        for owner, _, digests in self.expected.values():
            found[owner] |= set(digests)
            found[None] |= set(digests)
        return found

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.expected)))
        owner, _, _ = self.expected.pop(name)
        assert self.ledger.get(name, "other") is None
        lease = self.ledger.get(name, owner)
        assert lease is not None
        self.ledger.end(lease)
        assert self.ledger.find(name) is None

    @precondition(lambda self: self.expected)
    @rule()
    def end_the_soonest(self) -> None:
        lease = self.ledger.soonest()
        assert lease is not None
        assert lease.ends_at_s == min(end for _, end, _ in self.expected.values())
        del self.expected[lease.lease_id]
        self.ledger.end(lease)

    @rule()
    def flush(self) -> None:
        self.cache.flush()

    @invariant()
    def exactly_the_leased_pages_are_pinned(self) -> None:
        if not hasattr(self, "ledger"):
            return
        pages, counts = self.pages(), self.cache.counts()
        assert self.ledger.num_pages == len(pages[None]) == counts.cached - counts.evictable
        assert len(self.ledger) == len(self.expected)
        for owner in ("", "k", "l"):
            assert self.ledger.num_owner_pages(owner) == len(pages[owner])
        assert counts.owned == counts.in_flight == 0

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            for lease in list(self.ledger):
                self.ledger.end(lease)
            assert self.cache.counts().evictable == self.cache.counts().cached


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=budget(40, long=1000), stateful_step_count=30)


def test_the_number_of_leases_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LEASES", 2)
    cache = PageCache(num_pages=4, page_size=2, namespace="n")
    ledger = PrefixLeases(cache, max_pages=4, max_owner_pages=4)
    taken = [ledger.take(name, "", [1, 2], cache_salt="", ends_at_s=1.0) for name in "abc"]
    assert [each is not None for each in taken] == [True, True, False]
