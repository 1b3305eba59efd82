"""The processor time of steps is told by what it was spent on."""

from __future__ import annotations

import time

import pytest

from kvist.worker.step_times import StepTimes


def busy(for_s: float) -> None:
    until_s = time.thread_time() + for_s
    while time.thread_time() < until_s:
        pass


def fail(spent: StepTimes) -> None:
    with spent.reading():
        busy(0.02)
        raise RuntimeError("the step failed")


def test_each_part_of_a_step_is_counted_apart_and_waiting_not_at_all() -> None:
    busy(0.02)  # before there was a loop
    spent = StepTimes()
    before = spent.totals()
    with spent.planning():
        busy(0.01)
    with spent.launching():
        busy(0.03)
        time.sleep(0.05)
    with pytest.raises(RuntimeError):
        fail(spent)
    busy(0.01)  # messages
    after = spent.totals()
    grown = {name: after[name] - before[name] for name in after}
    assert 0.01 <= grown["plan_cpu_seconds"] < 0.02
    assert 0.03 <= grown["launch_cpu_seconds"] < 0.05
    assert 0.02 <= grown["read_cpu_seconds"] < 0.03
    assert before["loop_cpu_seconds"] < 0.01
    assert grown["loop_cpu_seconds"] >= 0.07
    assert grown["process_cpu_seconds"] >= grown["loop_cpu_seconds"] - 0.001
