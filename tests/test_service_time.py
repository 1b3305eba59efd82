"""The estimate of a queue's wait, for any queue and any measurement."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.service_time import PromptRate, Queue, ServiceTime, queue_wait_s, retry_after_s

RATES = st.none() | st.floats(0.001, 1e6)
TIMES = st.none() | st.floats(0.0, 1e4)
QUEUES = st.builds(
    Queue,
    num_requests=st.integers(0, 5000),
    num_tokens=st.floats(0, 1e9),
    num_free=st.integers(0, 1000),
    num_places=st.integers(0, 1000),
)


def wait_s(queue: Queue, tokens_per_s: float | None, service_s: float | None) -> float | None:
    return queue_wait_s(queue, tokens_per_s=tokens_per_s, service_s=service_s)


@given(queue=QUEUES, tokens_per_s=RATES, service_s=TIMES)
def test_a_wait_is_never_negative_and_unknown_only_if_nothing_was_measured(
    queue: Queue, tokens_per_s: float | None, service_s: float | None
) -> None:
    found = wait_s(queue, tokens_per_s, service_s)
    assert (found is None) == (queue.num_requests > 0 and tokens_per_s is None and service_s is None)
    assert found is None or found >= 0.0


@given(
    queue=QUEUES,
    num_more=st.integers(0, 100),
    more_tokens=st.floats(0, 1e6),
    fewer_free=st.integers(0, 100),
    tokens_per_s=RATES,
    service_s=TIMES,
)
def test_more_requests_more_tokens_and_fewer_free_places_never_shorten_a_wait(
    queue: Queue,
    num_more: int,
    more_tokens: float,
    fewer_free: int,
    tokens_per_s: float | None,
    service_s: float | None,
) -> None:
    longer = replace(
        queue,
        num_requests=queue.num_requests + num_more,
        num_tokens=queue.num_tokens + more_tokens,
        num_free=max(0, queue.num_free - fewer_free),
    )
    before, after = (wait_s(each, tokens_per_s, service_s) for each in (queue, longer))
    assert before is None or after is None or after >= before


@given(queue=QUEUES, tokens_per_s=st.floats(0.001, 1e6), service_s=TIMES)
def test_a_queue_for_which_places_are_free_lasts_as_long_as_its_tokens(
    queue: Queue, tokens_per_s: float, service_s: float | None
) -> None:
    free = replace(queue, num_free=queue.num_requests)
    assert wait_s(free, tokens_per_s, service_s) == queue.num_tokens / tokens_per_s


def test_fifty_prompts_with_one_prefix_wait_for_the_prefix_and_not_for_fifty() -> None:
    queue = Queue(num_requests=50, num_tokens=10_000 + 50 * 20, num_free=64, num_places=64)
    assert wait_s(queue, 4_000.0, None) == pytest.approx(2.75)


def test_fifty_cached_chats_wait_for_fifty_answers_over_the_places() -> None:
    queue = Queue(num_requests=50, num_tokens=50 * 20, num_free=0, num_places=16)
    assert wait_s(queue, 10_000.0, 8.0) == pytest.approx(50 / 16 * 8)


def test_a_rate_is_that_of_recent_steps() -> None:
    rate = PromptRate()
    assert rate.tokens_per_s is None
    rate.add(1000, 4.0)
    assert rate.tokens_per_s == pytest.approx(250)
    for _ in range(100):
        rate.add(40, 0.5)
    assert rate.tokens_per_s == pytest.approx(80, rel=0.02)


def test_a_service_time_is_the_mean_of_the_first_requests_and_settled_after_several() -> None:
    service = ServiceTime()
    for duration_s in (30.0, 2.0, 1.0):
        service.add(duration_s)
    assert service.mean_s == pytest.approx(11.0)
    assert not service.is_settled
    service.add(3.0)
    assert service.mean_s == pytest.approx(9.0)
    assert service.is_settled


@pytest.mark.parametrize(("num_ahead", "wait_s"), [(0, 1.0), (10, 5.0), (100, 50.0), (1000, 60.0)])
def test_retry_after_is_the_queue_length_times_the_recent_service_time(num_ahead: int, wait_s: float) -> None:
    service = ServiceTime()
    assert retry_after_s(service.mean_s, num_ahead=10, num_served=20) == 1.0, "no request has ended yet"
    service.add(100.0)
    for _ in range(200):
        service.add(10.0)
    assert retry_after_s(service.mean_s, num_ahead=num_ahead, num_served=20) == pytest.approx(wait_s, rel=0.01)
