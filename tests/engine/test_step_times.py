"""The CPU time of steps is counted for each part of a step."""

from __future__ import annotations

import time

import pytest

from kvist.engine.step_times import StepCpuTimes

SLACK_S = 0.004  # less than any part takes


def busy(for_s: float) -> float:
    """Use the CPU for `for_s` seconds; return the seconds used, which include interrupts on a busy machine."""
    began_s = time.thread_time()
    while time.thread_time() < began_s + for_s:
        pass
    return time.thread_time() - began_s


class StepFailed(Exception):
    """A step that failed after some seconds of CPU time."""


def fail(spent: StepCpuTimes) -> None:
    with spent.reading():
        raise StepFailed(busy(0.02))


def test_the_cpu_time_of_each_part_of_a_step_is_counted_and_waiting_is_not() -> None:
    busy(0.02)  # before the loop exists
    spent = StepCpuTimes()
    before = spent.totals()
    began_s = time.thread_time()
    with spent.planning():
        plan_s = busy(0.01)
    with spent.launching():
        launch_s = busy(0.03)
        time.sleep(0.05)
    with pytest.raises(StepFailed) as failed:
        fail(spent)
    busy(0.01)  # for messages
    loop_s = time.thread_time() - began_s
    after = spent.totals()
    grown = {name: after[name] - before[name] for name in after}
    assert grown["plan_cpu_seconds"] == pytest.approx(plan_s, abs=SLACK_S)
    assert grown["launch_cpu_seconds"] == pytest.approx(launch_s, abs=SLACK_S)
    assert grown["read_cpu_seconds"] == pytest.approx(failed.value.args[0], abs=SLACK_S)
    assert before["loop_cpu_seconds"] < SLACK_S
    assert grown["loop_cpu_seconds"] == pytest.approx(loop_s, abs=SLACK_S)
    assert grown["loop_cpu_seconds"] >= 0.07
    assert grown["process_cpu_seconds"] >= grown["loop_cpu_seconds"] - 0.001
