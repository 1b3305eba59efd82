"""The index of all workers' pages, compared with plain sets."""

from __future__ import annotations

from random import Random

import pytest

from kvist.page_index.page_runs import TIERS, HeldPages
from kvist.page_index.prefix_index import PrefixIndex
from kvist.request import WorkerId
from kvist.testing.page_events import joined, split
from kvist.wire import DIGEST_BYTES, PageTier

A, B, C = (WorkerId(name) for name in "abc")
PROMPT = [bytes([number]) * DIGEST_BYTES for number in range(1, 100)]
ROOMY: dict[PageTier, int] = {"device": 1 << 20, "host": 1 << 20}


def make_index(*names: WorkerId, max_pages: int = 1 << 20) -> PrefixIndex:
    index = PrefixIndex(max_pages, seed=Random(1).getrandbits(128))
    for name in names:
        index.add(name, ROOMY)
    return index


def finish_work(index: PrefixIndex) -> None:
    while index.has_work:
        index.work(1 << 10)


def test_a_match_counts_the_leading_pages_of_each_worker_by_tier() -> None:
    index = make_index(A, B, C)
    index.store(A, "device", joined(*PROMPT[:5]))
    index.store(A, "host", joined(*PROMPT[:9]))
    index.store(B, "device", joined(*PROMPT[:2], *PROMPT[3:50]))
    index.store(C, "host", joined(*PROMPT[1:]))
    expected = {A: HeldPages(5, 4), B: HeldPages(2, 0)}
    assert index.match([joined(*PROMPT)]) == expected
    assert index.match([joined(*PROMPT[:3]), joined(*PROMPT[3:7]), joined(*PROMPT[7:])]) == expected
    assert index.match([joined(*PROMPT[:4])]) == {A: HeldPages(4, 0), B: HeldPages(2, 0)}
    assert index.match([]) == {}


def test_a_page_counts_while_any_tier_has_it() -> None:
    index = make_index(A)
    index.store(A, "device", joined(PROMPT[0]))
    index.store(A, "host", joined(PROMPT[0]))
    index.discard(A, "device", joined(PROMPT[0]))
    assert index.match([joined(PROMPT[0])]) == {A: HeldPages(0, 1)}
    index.discard(A, "host", joined(PROMPT[0]))
    assert index.match([joined(PROMPT[0])]) == {}
    assert index.num_entries == 0


def test_no_digest_is_drawn_after_the_first_page_that_no_worker_holds() -> None:
    index = make_index(A, B)
    index.store(A, "device", joined(*PROMPT[:12]))
    drawn = []

    def pieces():  # type: ignore[no-untyped-def]
        for start in range(0, 99, 10):
            drawn.append(start)
            yield joined(*PROMPT[start : start + 10])

    assert index.match(pieces()) == {A: HeldPages(12, 0)}
    assert drawn == [0, 10]


def test_pages_beyond_the_limits_of_a_tier_are_cut_and_counted_and_other_workers_are_not_affected() -> None:
    index = make_index(B)
    index.add(A, {"device": 3, "host": 0})
    assert index.store(A, "device", joined(*PROMPT[:2])) == 0
    assert index.store(A, "device", joined(*PROMPT[:5])) == 2
    assert index.store(A, "host", joined(PROMPT[0])) == 1
    assert (index.num_pages(A), index.num_cut(A)) == (3, 3)
    assert index.store(B, "device", joined(*PROMPT)) == 0
    index.discard(A, "device", joined(PROMPT[0]))
    assert index.store(A, "device", joined(PROMPT[0])) == 0


def test_a_flood_ends_at_the_share_of_its_worker() -> None:
    index = make_index(A, B, max_pages=4000)
    rng = Random(2)
    for _ in range(5):
        index.store(A, "device", rng.randbytes(1000 * DIGEST_BYTES))
    assert (index.num_pages(A), index.num_cut(A)) == (2000, 3000)
    assert index.store(B, "device", rng.randbytes(1000 * DIGEST_BYTES)) == 0
    index.add(C, ROOMY)
    assert index.exceeds_share(A)
    assert not index.exceeds_share(B)


def test_repeated_digests_in_one_message_count_once() -> None:
    index = make_index(A)
    index.store(A, "device", joined(*PROMPT[:3], *PROMPT[:3]))
    assert index.num_pages(A) == 3
    index.discard(A, "device", joined(PROMPT[0], PROMPT[0]))
    assert index.num_pages(A) == 2


def test_a_listing_replaces_the_pages_and_the_old_ones_serve_until_its_end() -> None:
    index = make_index(A)
    index.store(A, "device", joined(*PROMPT[:4]))
    index.begin_listing(A)
    assert index.match([joined(*PROMPT)]) == {A: HeldPages(4, 0)}
    index.store(A, "device", joined(PROMPT[0]))
    index.store(A, "device", joined(PROMPT[4]))
    assert index.match([joined(*PROMPT)]) == {A: HeldPages(5, 0)}
    index.discard(A, "device", joined(PROMPT[2]))
    assert index.match([joined(*PROMPT)]) == {A: HeldPages(2, 0)}
    index.end_listing(A)
    assert index.match([joined(*PROMPT)]) == {A: HeldPages(1, 0)}
    assert index.num_pages(A) == 2
    finish_work(index)
    assert index.num_entries == 2


def test_the_entries_of_workers_that_left_are_cleared_in_slices_and_their_numbers_are_used_again() -> None:
    index = make_index(B)
    index.store(B, "host", joined(*PROMPT[:1]))
    for _ in range(200):
        index.add(A, ROOMY)
        index.store(A, "device", joined(*PROMPT))
        assert index.match([joined(*PROMPT)])[A] == HeldPages(99, 0)
        index.remove(A)
        assert index.match([joined(*PROMPT)]) == {B: HeldPages(0, 1)}
        finish_work(index)
        assert index.num_entries == 1
    assert index.num_bytes < 1 << 19


def test_more_workers_than_bits_of_a_column() -> None:
    names = [WorkerId(f"w{number}") for number in range(70)]
    index = make_index(*names)
    for number, name in enumerate(names):
        index.store(name, "device", joined(*PROMPT[: number + 1]))
    assert index.match([joined(*PROMPT)]) == {name: HeldPages(number + 1) for number, name in enumerate(names)}


@pytest.mark.parametrize("seed", range(3))
def test_the_index_equals_plain_sets_while_it_grows_moves_and_forgets(seed: int) -> None:
    rng = Random(seed)
    index = make_index(A, B)
    universe = [rng.randbytes(DIGEST_BYTES) for _ in range(30_000)]
    truth: dict[tuple[WorkerId, PageTier], set[bytes]] = {(name, tier): set() for name in (A, B) for tier in TIERS}
    for step in range(150):
        name, tier = rng.choice((A, B)), rng.choice(TIERS)
        start = rng.randrange(len(universe))
        batch = universe[start : start + rng.choice((1, 50, 1500))]
        if rng.random() < 0.6:
            index.store(name, tier, joined(*batch))
            truth[name, tier] |= set(batch)
        else:
            index.discard(name, tier, joined(*batch))
            truth[name, tier] -= set(batch)
        if rng.random() < 0.7 and index.has_work:
            index.work(rng.choice((100, 10_000)))
        if step % 50 == 49:
            gone = rng.choice((A, B))
            index.remove(gone)
            index.add(gone, ROOMY)
            truth[gone, "device"], truth[gone, "host"] = set(), set()
        for name in (A, B):
            sums = {each.tier: each for each in index.sums(name)}
            for tier in TIERS:
                assert sums[tier].num_pages == len(truth[name, tier])
                assert sums[tier].xor == xor_of(truth[name, tier])
    finish_work(index)
    assert index.num_entries == len(set().union(*truth.values()))
    for digest in universe[::30]:
        held = index.match([digest])
        for name in (A, B):
            in_device, in_host = (digest in truth[name, tier] for tier in TIERS)
            assert held.get(name, HeldPages()) == HeldPages(int(in_device), int(in_host and not in_device))


def xor_of(digests: set[bytes]) -> bytes:
    found = 0
    for digest in digests:
        found ^= int.from_bytes(digest, "little")
    return found.to_bytes(DIGEST_BYTES, "little")


def test_digests_are_split_as_they_were_joined() -> None:
    assert split(joined(*PROMPT)) == PROMPT


# ---------------------------------------------------------------- pages in stores


def hint(index: PrefixIndex, name: WorkerId, found: list[bytes], missing: list[bytes] | None = None) -> None:
    index.on_store_hints(name, found=joined(*found), missing=joined(*(missing or [])))


def test_a_page_in_a_store_counts_for_every_worker_of_the_store_after_its_own_pages() -> None:
    index = make_index(A, B, C)
    for name, location in ((A, "/pages"), (B, "/pages"), (C, "/others")):
        index.set_store(name, location)
    index.store(B, "device", joined(*PROMPT[:2]))
    index.store(B, "host", joined(*PROMPT[:3], PROMPT[5]))
    hint(index, A, PROMPT[:7])
    expected = {A: HeldPages(0, 0, 7), B: HeldPages(2, 1, 4)}
    assert index.match([joined(*PROMPT)]) == expected
    assert index.match([joined(page) for page in PROMPT]) == expected
    hint(index, B, [], [PROMPT[4]])
    assert index.match([joined(*PROMPT)]) == {A: HeldPages(0, 0, 4), B: HeldPages(2, 1, 1)}


def test_without_a_store_hints_are_dropped_and_the_last_worker_takes_its_store_along() -> None:
    index = make_index(A, B)
    hint(index, A, PROMPT[:7])
    assert index.num_entries == 0
    index.set_store(A, "/pages")
    index.set_store(B, "/pages")
    hint(index, A, PROMPT[:7])
    index.set_store(A, "")
    assert index.match([joined(*PROMPT)]) == {B: HeldPages(0, 0, 7)}
    index.remove(B)
    assert index.match([joined(*PROMPT)]) == {}
    finish_work(index)
    assert index.num_entries == 0
    index.set_store(A, "/pages")
    assert index.match([joined(*PROMPT)]) == {}


def test_during_a_listing_the_pages_of_the_store_count() -> None:
    index = make_index(A)
    index.set_store(A, "/pages")
    index.store(A, "device", joined(*PROMPT[:2]))
    hint(index, A, PROMPT[:5])
    index.begin_listing(A)
    index.store(A, "device", joined(*PROMPT[:1]))
    assert index.match([joined(*PROMPT)]) == {A: HeldPages(2, 0, 3)}
    index.end_listing(A)
    assert index.match([joined(*PROMPT)]) == {A: HeldPages(1, 0, 4)}
    assert index.num_pages(A) == 1, "the pages of a store are not counted as the worker's own"


def test_a_full_store_forgets_the_pages_that_were_not_used_for_longest() -> None:
    index = make_index(A, max_pages=4000)  # a share of 2000: two generations of 1000
    index.set_store(A, "/pages")
    rng = Random(3)
    pages = [rng.randbytes(DIGEST_BYTES) for _ in range(3000)]
    hint(index, A, pages[:1000])
    hint(index, A, [*pages[:10], *pages[1000:1900]])
    assert index.match([joined(pages[500])]) == {A: HeldPages(0, 0, 1)}
    hint(index, A, pages[1900:2900])
    assert index.match([joined(pages[500])]) == {}
    assert index.match([joined(*pages[:10])]) == {A: HeldPages(0, 0, 10)}
    for start in range(0, 3000, 100):
        hint(index, A, pages[start : start + 100])
        assert index.num_store_pages(A) <= 2000
        finish_work(index)
    assert index.num_entries <= 2000
    assert index.store(A, "device", joined(*PROMPT)) == 0, "a store leaves room for its workers"


@pytest.mark.parametrize("seed", range(3))
def test_matches_over_stores_equal_plain_sets(seed: int) -> None:
    rng = Random(seed)
    names = [WorkerId(f"w{number}") for number in range(40)]  # two groups of bits
    index = make_index(*names)
    own: dict[WorkerId, dict[PageTier, set[bytes]]] = {name: {tier: set() for tier in TIERS} for name in names}
    stores: dict[WorkerId, str] = dict.fromkeys(names, "")
    stored: dict[str, set[bytes]] = {"x": set(), "y": set()}
    for _ in range(300):
        name, start, end = rng.choice(names), rng.randrange(30), rng.randrange(1, 40)
        pages = PROMPT[start:end]
        kind = rng.randrange(5)
        if kind == 0:
            stores[name] = rng.choice(["", "x", "y"])
            index.set_store(name, stores[name])
            stored = {key: pages if key in stores.values() else set() for key, pages in stored.items()}
        elif kind == 1 and stores[name]:
            hint(index, name, pages)
            stored[stores[name]] |= set(pages)
        elif kind == 2 and stores[name]:
            hint(index, name, [], pages[:2])
            stored[stores[name]] -= set(pages[:2])
        elif kind == 3:
            tier = rng.choice(TIERS)
            index.store(name, tier, joined(*pages))
            own[name][tier] |= set(pages)
        elif kind == 4 and rng.random() < 0.3:
            index.remove(name)
            index.add(name, ROOMY)
            own[name], stores[name] = {tier: set() for tier in TIERS}, ""
            stored = {key: pages if key in stores.values() else set() for key, pages in stored.items()}
        finish_work(index)
        expected = {}
        for each in names:
            device, host, store = own[each]["device"], own[each]["host"], stored.get(stores[each], set())
            num_device = leading(device)
            num_own = leading(device | host)
            held = HeldPages(num_device, num_own - num_device, leading(device | host | store) - num_own)
            if any(held):
                expected[each] = held
        assert index.match([joined(*PROMPT)]) == expected
        assert index.match([joined(page) for page in PROMPT]) == expected


def leading(pages: set[bytes]) -> int:
    return next((index for index, page in enumerate(PROMPT) if page not in pages), len(PROMPT))
