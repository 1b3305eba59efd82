"""The CPU time of steps is counted for each part of a step."""

from __future__ import annotations

import pytest

from kvist.clock import cpu_s, thread_cpu_s
from kvist.engine.step_times import StepCpuTimes
from kvist.testing.clocks import FakeClock


class StepFailed(Exception):
    """A step that failed after some seconds of CPU time."""


def fail(spent: StepCpuTimes, thread: FakeClock) -> None:
    with spent.reading():
        thread.advance(4.0)
        raise StepFailed


def test_the_cpu_time_of_each_part_of_a_step_is_counted_also_if_it_fails() -> None:
    thread, process = FakeClock(100.0), FakeClock(200.0)  # loading took 100 s in this thread
    spent = StepCpuTimes(thread.now_s, process.now_s)
    with spent.planning():
        thread.advance(1.0)
    with spent.launching():
        thread.advance(2.0)
    with pytest.raises(StepFailed):
        fail(spent, thread)
    thread.advance(8.0)  # for messages
    process.advance(20.0)
    with spent.planning():
        thread.advance(16.0)
    assert spent.totals() == {
        "plan_cpu_seconds": 17.0,
        "launch_cpu_seconds": 2.0,
        "read_cpu_seconds": 4.0,
        "loop_cpu_seconds": 31.0,
        "process_cpu_seconds": 220.0,
    }


def test_the_clocks_of_an_engine_are_the_cpu_time_of_its_thread_and_of_its_process() -> None:
    thread_before_s, process_before_s = thread_cpu_s(), cpu_s()
    totals = StepCpuTimes().totals()
    assert 0.0 <= totals["loop_cpu_seconds"] <= thread_cpu_s() - thread_before_s
    assert process_before_s <= totals["process_cpu_seconds"] <= cpu_s()
