"""The circuit breaker alone: when a store may be called or probed, under any order of successes and failures."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.store.breaker import BreakerState, CircuitBreaker

PAUSE_S = 5.0


def test_a_failure_opens_and_a_pause_later_the_store_is_probed() -> None:
    breaker = CircuitBreaker(PAUSE_S)
    assert breaker.is_closed
    assert not breaker.needs_probe(0.0, is_tried=False)
    breaker.on_failure(10.0)
    assert breaker.state(10.0, is_tried=False) is BreakerState.OPEN
    assert not breaker.needs_probe(14.9, is_tried=False)
    assert breaker.needs_probe(15.0, is_tried=False)
    assert not breaker.needs_probe(15.0, is_tried=True)
    assert not breaker.is_closed
    assert breaker.state(15.0, is_tried=True) is BreakerState.HALF_OPEN
    assert breaker.state(15.0, is_tried=False) is BreakerState.OPEN, "the probe has not begun"


def test_a_probe_in_time_closes_and_a_failed_probe_opens_for_another_pause() -> None:
    breaker = CircuitBreaker(PAUSE_S)
    breaker.on_failure(0.0)
    breaker.on_failure(6.0)  # the probe
    assert not breaker.needs_probe(10.9, is_tried=False)
    assert breaker.on_success(11.0)
    assert breaker.state(11.0, is_tried=False) is BreakerState.CLOSED
    assert not breaker.on_success(12.0), "it was closed already"


def test_a_call_that_began_before_the_failure_closes_nothing_during_the_pause() -> None:
    breaker = CircuitBreaker(PAUSE_S)
    breaker.on_failure(0.0)
    assert not breaker.on_success(4.9)
    assert breaker.state(4.9, is_tried=False) is BreakerState.OPEN


@settings(max_examples=200, deadline=None)
@given(steps=st.lists(st.tuples(st.sampled_from(["failure", "success", "wait"]), st.booleans()), max_size=40))
def test_an_open_breaker_asks_for_at_most_one_probe_a_pause(steps: list[tuple[str, bool]]) -> None:
    breaker, now_s, failed_s = CircuitBreaker(PAUSE_S), 0.0, None
    for step, is_tried in steps:
        if step == "failure":
            breaker.on_failure(now_s)
            failed_s = now_s
        elif step == "success":
            if breaker.on_success(now_s):
                assert failed_s is not None
                assert now_s >= failed_s + PAUSE_S
                failed_s = None
        else:
            now_s += 2.0
        is_over = failed_s is None or now_s >= failed_s + PAUSE_S
        assert breaker.is_closed == (failed_s is None)
        assert breaker.needs_probe(now_s, is_tried=is_tried) == (failed_s is not None and is_over and not is_tried)
        state = breaker.state(now_s, is_tried=is_tried)
        assert (state is BreakerState.CLOSED) == (failed_s is None)
        assert state is not BreakerState.HALF_OPEN or (is_tried and is_over)
