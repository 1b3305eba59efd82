"""The host tier's index: matches, the order of eviction, and pinned pages."""

from __future__ import annotations

import random

from kvist.kv.tiers.host import HostPage, HostTier
from kvist.testing.page_events import changed_pages


def keep(tier: HostTier, *digests: bytes, parent: HostPage | None = None) -> list[HostPage]:
    """Make a chain of resident pages."""
    pages = []
    for digest in digests:
        page = tier.reserve(parent, digest)
        assert page is not None
        tier.written(page, ok=True)
        pages.append(page)
        parent = page
    return pages


def test_a_match_ends_at_the_first_page_that_is_not_resident() -> None:
    tier = HostTier(4)
    a, _ = keep(tier, b"a", b"b")
    writing = tier.reserve(a, b"c")
    assert [page.digest for page in tier.match([b"a", b"b", b"x", b"b"])] == [b"a", b"b"]
    assert tier.match([b"c"]) == []
    assert writing is not None
    tier.written(writing, ok=True)
    assert tier.match([b"c"]) == [writing]


def test_the_least_recently_used_prefix_is_evicted_first_from_its_leaf_up() -> None:
    tier = HostTier(5)
    keep(tier, b"a1", b"a2", b"a3")
    old = keep(tier, b"b1", b"b2")
    tier.touch(tier.match([b"a1", b"a2", b"a3"]))
    for digest, gone in ((b"c", b"b2"), (b"d", b"b1"), (b"e", b"a3")):
        keep(tier, digest)
        assert tier.get(gone) is None
    assert [page.digest for page in old] == [b"b2", b"b1"][::-1]
    assert tier.num_evicted == 3


def test_pinned_pages_and_the_prefix_being_extended_are_not_evicted() -> None:
    tier = HostTier(2)
    (a,) = keep(tier, b"a")
    (b,) = keep(tier, b"b", parent=a)
    assert tier.reserve(b, b"c") is None  # only the new page's own prefix could be evicted
    tier.pin(b)
    assert tier.reserve(None, b"x") is None
    tier.unpin(b)
    assert tier.reserve(None, b"x") is not None
    assert tier.get(b"b") is None


def test_a_page_whose_write_failed_is_not_matched_and_its_slot_is_reused() -> None:
    tier = HostTier(1)
    page = tier.reserve(None, b"a")
    assert page is not None
    tier.written(page, ok=False)
    assert tier.match([b"a"]) == []
    assert tier.reserve(None, b"a") is page
    tier.written(page, ok=False)
    keep(tier, b"b")
    assert tier.digests() == [b"b"]
    assert tier.changes.take() == (changed_pages(b"b", tier="host"),)  # the failed page was never reported


def test_a_flush_keeps_pinned_pages_and_their_prefixes() -> None:
    tier = HostTier(6)
    keep(tier, b"x", b"y")
    a, b, _ = keep(tier, b"a", b"b", b"c")
    tier.pin(b)
    assert len(tier.flush()) == 3
    assert tier.digests() == [b"a", b"b"]
    tier.unpin(b)
    assert sorted(tier.flush()) == sorted({a.slot, b.slot})
    assert (tier.counts().free, tier.counts().cached) == (6, 0)
    assert a.num_children == 0


def test_any_order_of_uses_keeps_whole_prefixes_and_every_slot_accounted_for() -> None:
    draw = random.Random(5)
    tier = HostTier(12)
    moving: list[tuple[HostPage, bool]] = []  # is it being written?
    for _ in range(20_000):
        action = draw.random()
        if action < 0.5:
            parent = draw.choice([None, *tier.pages()]) if draw.random() < 0.8 else None
            digest = (parent.digest if parent else b"") + bytes([draw.randrange(3)])
            known = tier.get(digest)
            if len(digest) < 6 and (known is None or known.lost):
                page = tier.reserve(parent, digest)
                if page is not None:
                    moving.append((page, True))
        elif action < 0.6 and [*tier.pages()]:
            page = draw.choice([*tier.pages()])
            if page.resident:
                tier.pin(page)
                moving.append((page, False))
        elif action < 0.9 and moving:
            page, written = moving.pop(draw.randrange(len(moving)))
            if written:
                tier.written(page, ok=draw.random() < 0.8)
            else:
                tier.unpin(page)
        elif [*tier.pages()]:
            tier.touch([draw.choice([*tier.pages()])])
        counts = tier.counts()
        assert counts.free + counts.cached + counts.in_flight == counts.total
        used = [page.slot for page in tier.pages()]
        assert len(used) == len(set(used)) == 12 - tier.counts().free
        assert counts.in_flight == len({page for page, _ in moving})
        assert all(tier.get(page.digest) is page for page, _ in moving)
        assert all(page.parent is None or tier.get(page.parent.digest) is page.parent for page in tier.pages())
        assert len(tier._leaves) <= 2 * len(used) + 65
    assert tier.num_evicted > 1000
