"""Rates, quantiles and the columns of charts, from counters that are read once a second."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.dashboard.windows import Chart, CounterWindow, HistogramWindow, quantile
from kvist.metrics import Histogram


def test_a_rate_is_the_growth_within_the_last_seconds() -> None:
    window = CounterWindow(60)
    for second, total in enumerate([100, 110, 130, 160, 200]):
        window.update(float(second), {"tokens": total})
    assert window.rate("tokens", 2) == pytest.approx((200 - 130) / 2)
    assert window.growth("tokens", 60) == 100
    assert window.growth("tokens", 0.1) == 40, "the last interval counts, however short the time"


def test_before_two_readings_every_rate_is_zero() -> None:
    window = CounterWindow(60)
    assert window.rate("tokens", 5) == 0
    window.update(0.0, {"tokens": 1000})
    assert window.rate("tokens", 5) == 0


def test_a_counter_that_began_again_grew_from_zero() -> None:
    window = CounterWindow(60)
    window.update(0.0, {"tokens": 1000})
    window.update(1.0, {"tokens": 40})
    assert window.rate("tokens", 5) == 40
    window.update(2.0, {"tokens": 70})
    window.update(3.0, {"tokens": 10})
    assert window.growth("tokens", 60) == 80


def test_a_window_forgets_the_oldest_intervals() -> None:
    window = CounterWindow(3)
    for second in range(1000):
        window.update(float(second), {"tokens": second})
    assert window.growth("tokens", 1e9) == 3


def test_a_late_reading_counts_with_its_whole_interval() -> None:
    window = CounterWindow(60)
    window.update(0.0, {"tokens": 0})
    window.update(30.0, {"tokens": 300})
    assert window.rate("tokens", 5) == 10


def test_a_quantile_lies_within_its_bucket() -> None:
    bounds = (1.0, 2.0, 4.0)
    assert quantile(bounds, (0, 0, 0, 0), 0.5) is None
    assert quantile(bounds, (0, 10, 0, 0), 0.5) == pytest.approx(1.5)
    assert quantile(bounds, (5, 0, 5, 0), 0.99) == pytest.approx(2.0 + 2.0 * 4.9 / 5)
    assert quantile(bounds, (0, 0, 0, 3), 0.5) == 4.0, "a value above the last bound counts as that bound"


@given(st.lists(st.floats(0.0, 500.0), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99]))
def test_a_quantile_is_in_the_bucket_of_the_exact_one(values: list[float], share: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.observe(value)
    found = quantile(histogram.bounds, histogram.counts(), share)
    exact = sorted(values)[max(0, -(-round(share * 100) * len(values) // 100) - 1)]
    upper = next((bound for bound in histogram.bounds if exact <= bound), histogram.bounds[-1])
    lower = max((bound for bound in histogram.bounds if bound < upper), default=0.0)
    assert found is not None
    assert lower <= found <= upper


def test_quantiles_of_a_window_leave_older_values_out() -> None:
    histogram, window = Histogram(), HistogramWindow(Histogram().bounds, 60)
    assert window.quantiles(10, 0.5) == [None]
    window.update(histogram.counts())
    for value in (50.0, 0.002, 0.002):
        histogram.observe(value)
        window.update(histogram.counts())
    assert window.quantiles(60, 0.99)[0] == pytest.approx(60.0, rel=0.1)
    last = window.quantiles(1, 0.99)[0]
    assert last is not None
    assert last < 0.0025


def test_a_chart_keeps_the_newest_points_and_gaps() -> None:
    chart, rng = Chart(["a", "b"], 5), random.Random(1)
    for time in range(100):
        chart.append(float(time), {"a": rng.random(), "b": None if time % 2 else 1.0})
    assert chart.times(1000) == [95.0, 96.0, 97.0, 98.0, 99.0]
    assert chart.lines(2)["b"] == [1.0, None]
    assert chart.times(0) == []
    with pytest.raises(KeyError):
        chart.append(0.0, {"a": 1.0})
