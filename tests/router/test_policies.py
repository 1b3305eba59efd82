"""The routing policies: round robin, least loaded and cache-aware."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from kvist.page_index.page_runs import HeldPages
from kvist.request import WorkerId
from kvist.router.policies.by_worker import DECODE_HIT_WEIGHT
from kvist.router.policies.cache_aware import CacheAware, CacheAwareOptions
from kvist.router.policies.least_loaded import LeastLoaded
from kvist.router.policies.round_robin import RoundRobin
from kvist.router.policy import Prompt, WorkerView

PROMPT = Prompt(num_tokens=330)
CACHE_AWARE = CacheAware(CacheAwareOptions())


def view(name: str, *, num_pages: int = 0, num_requests: int = 0, pending: int = 0) -> WorkerView:
    return WorkerView(
        worker_id=WorkerId(name),
        page_size=16,
        num_requests=num_requests,
        num_pending_tokens=pending,
        num_known_pages=num_pages,
        held=HeldPages(num_pages, 0),
    )


def test_round_robin_visits_every_worker_while_workers_join_and_leave() -> None:
    policy = RoundRobin()
    a, b, c = view("a"), view("b"), view("c")
    assert [policy.choose(PROMPT, [c, a, b]) for _ in range(4)] == ["a", "b", "c", "a"]
    assert [policy.choose(PROMPT, [a, c]) for _ in range(3)] == ["c", "a", "c"]


def test_least_loaded_compares_requests_then_pending_prompt_tokens() -> None:
    policy = LeastLoaded()
    assert policy.choose(PROMPT, [view("a", num_requests=2), view("b", num_requests=1)]) == "b"
    assert policy.choose(PROMPT, [view("a", num_requests=1, pending=900), view("b", num_requests=1)]) == "b"


def test_cache_aware_prefers_the_longest_cached_prefix() -> None:
    assert CACHE_AWARE.choose(PROMPT, [view("a", num_pages=4), view("b", num_pages=9), view("c")]) == "b"


def test_pages_of_any_tier_are_hits() -> None:
    in_host = replace(view("z"), held=HeldPages(1, 8))
    assert CACHE_AWARE.choose(PROMPT, [view("a", num_pages=8), in_host]) == "z"


def test_a_hit_below_the_threshold_is_ignored() -> None:
    short = view("a", num_pages=2, num_requests=1)  # 32 of 330 tokens
    assert CACHE_AWARE.choose(PROMPT, [short, view("b", num_requests=0)]) == "b"
    everything_counts = CacheAware(CacheAwareOptions(cache_threshold=0.0))
    assert everything_counts.choose(PROMPT, [view("a"), view("b", num_pages=1)]) == "b"


def test_a_long_pending_prompt_outweighs_a_hit() -> None:
    """A long prompt must not delay requests that another worker can serve."""
    assert CACHE_AWARE.choose(PROMPT, [view("a", num_pages=10, pending=30_000), view("b")]) == "b"


def test_loads_that_differ_much_send_the_request_to_the_least_loaded_worker() -> None:
    long = Prompt(num_tokens=32_000)
    owner = view("a", num_pages=2_000, num_requests=33)
    assert CACHE_AWARE.choose(long, [owner, view("b")]) == "b"
    assert CACHE_AWARE.choose(long, [owner, view("b", num_requests=1)]) == "a"  # 32 apart is not more than 32
    assert CACHE_AWARE.choose(long, [owner, view("b", num_requests=30)]) == "a"


def test_equal_workers_are_ordered_by_cached_pages_then_by_name() -> None:
    full_elsewhere = replace(view("a"), num_known_pages=1)
    assert CACHE_AWARE.choose(PROMPT, [full_elsewhere, view("b")]) == "b"
    assert CACHE_AWARE.choose(PROMPT, [view("b"), view("a")]) == "a"


def test_decode_weighs_load_more_than_prefill_does() -> None:
    workers = [view("a", num_pages=10, num_requests=2), view("b")]  # 160 tokens cached, two requests
    assert CACHE_AWARE.choose(PROMPT, workers) == "a"
    assert CACHE_AWARE.choose(replace(PROMPT, hit_weight=DECODE_HIT_WEIGHT), workers) == "b"


@given(num_requests=st.integers(0, 50), hits=st.lists(st.integers(3, 20), min_size=2, max_size=5, unique=True))
def test_at_equal_load_the_longer_hit_wins(num_requests: int, hits: list[int]) -> None:
    candidates = [view(f"w{i}", num_pages=n, num_requests=num_requests) for i, n in enumerate(hits)]
    assert CACHE_AWARE.choose(PROMPT, candidates) == f"w{hits.index(max(hits))}"
