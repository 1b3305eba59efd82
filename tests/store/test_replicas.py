"""Which replica of each page is read: every page with a living copy is read, and no store is read twice for a page."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kvist.store.replicas import SUSPECT_S, ReadPlan, Replica, SuspectStores, num_leading

STORES = ("a", "b", "c", "d")
pages_of_stores = st.lists(st.lists(st.sampled_from(STORES), unique=True, max_size=4), max_size=12)


def plan_of(pages: list[list[str]], turn: int = 0) -> ReadPlan:
    places = [[Replica(session, 1000 * page) for session in sessions] for page, sessions in enumerate(pages)]
    return ReadPlan(places, turn)


def read_all(plan: ReadPlan, suspects: SuspectStores, dead: set[str], now_s: float = 0.0) -> Counter[tuple[str, int]]:
    """Read until nothing more can be read; return how often each page was read at each store."""
    reads: Counter[tuple[str, int]] = Counter()
    while found := plan.next_reads(suspects, now_s):
        for session, pages in found.items():
            assert all(replica.session == session and replica.address == 1000 * page for page, replica in pages)
            reads.update((session, page) for page, _ in pages)
            plan.ended(session, session not in dead)
            if session in dead:
                suspects.add(session, now_s)
    return reads


@given(pages=pages_of_stores, dead=st.sets(st.sampled_from(STORES)), turn=st.integers(0, 100))
def test_the_leading_pages_with_a_living_replica_are_read_and_no_dead_store_is_asked_twice(
    pages: list[list[str]], dead: set[str], turn: int
) -> None:
    plan, suspects = plan_of(pages, turn), SuspectStores()
    reads = read_all(plan, suspects, dead)
    expected = num_leading(set(sessions) - dead for sessions in pages)
    assert [plan.is_read(page) for page in range(expected)] == [True] * expected
    assert expected == len(pages) or not plan.is_read(expected)
    assert max(reads.values(), default=0) == min(1, len(reads)), "a replica is read once"
    assert all(len([page for session, page in reads if session == store]) <= len(pages) for store in STORES)
    later = plan_of(pages, turn + 1)
    assert not {session for session, _ in read_all(later, suspects, dead)} & {
        session for session, _ in reads if session in dead
    }, "a store that failed is not asked again"
    assert [later.is_read(page) for page in range(expected)] == [True] * expected


def test_a_store_that_failed_is_asked_again_after_a_while() -> None:
    suspects = SuspectStores()
    suspects.add("a", 100.0)
    assert suspects.contains("a", 100.0 + SUSPECT_S - 0.1)
    assert not plan_of([["a"]]).next_reads(suspects, 100.0 + SUSPECT_S - 0.1)
    assert plan_of([["a"]]).next_reads(suspects, 100.0 + SUSPECT_S)


@given(num_replicas=st.integers(1, 4), num_pages=st.integers(1, 30), turn=st.integers(0, 100))
def test_pages_of_a_call_and_calls_for_a_page_are_spread_evenly_over_the_replicas(
    num_replicas: int, num_pages: int, turn: int
) -> None:
    pages = [list(STORES[:num_replicas])] * num_pages
    of_a_call = Counter(session for session, _ in read_all(plan_of(pages, turn), SuspectStores(), set()))
    of_a_page: Counter[str] = Counter()
    for call in range(num_pages):
        of_a_page.update(session for session, _ in read_all(plan_of(pages[:1], turn + call), SuspectStores(), set()))
    for counts in (of_a_call, of_a_page):
        assert counts.total() == num_pages
        assert max(counts.values()) <= -(-num_pages // num_replicas)


def test_pages_that_come_from_elsewhere_do_not_end_the_reads() -> None:
    plan = plan_of([["a"], [], ["a"], [], ["a"]])
    plan.skip(1)
    assert read_all(plan, SuspectStores(), set()) == Counter({("a", 0): 1, ("a", 2): 1})
    assert [plan.is_read(page) for page in range(5)] == [True, True, True, False, False]


@given(st.lists(st.integers(0, 2)))
def test_leading_pages_end_before_the_first_that_failed(oks: list[int]) -> None:
    number = num_leading(oks)
    assert all(oks[:number])
    assert number == len(oks) or not oks[number]
