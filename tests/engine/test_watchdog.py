"""The watchdog ends a process if and only if its loop makes no progress, and reports to the parent all the time."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
import threading

import pytest

from kvist.clock import PauseMeter
from kvist.engine import watchdog
from kvist.engine.watchdog import CHECK_INTERVAL_S, LEAST_CPU_S, Watchdog

LIMIT_S = 30.0
LOOKS = int(LIMIT_S / CHECK_INTERVAL_S)


def never() -> None:
    pytest.fail("it was ended")


def test_the_watchdog_ends_a_process_whose_loop_hangs_and_logs_why(caplog: pytest.LogCaptureFixture) -> None:
    ends: list[str] = []
    watch = Watchdog(lambda: 7, limit_s=LIMIT_S, end=lambda: ends.append("now"))
    for _ in range(LOOKS - 1):
        watch.check()
    assert not ends
    with caplog.at_level(logging.CRITICAL):
        watch.check()
    assert ends == ["now"]
    assert "no progress for 30 s (--stall-restart-s)" in caplog.text


def test_the_watchdog_leaves_a_slow_loop_alone() -> None:
    turns = (number // (LOOKS - 1) for number in itertools.count())  # just fast enough
    watch = Watchdog(lambda: next(turns), limit_s=LIMIT_S, end=never)
    for _ in range(10 * LOOKS):
        watch.check()


def test_a_long_step_is_progress_only_while_it_uses_the_cpu() -> None:
    beats: list[tuple[float, float]] = []
    cpu_s = itertools.count(start=0.0, step=2 * LEAST_CPU_S)
    watch = Watchdog(lambda: 7, limit_s=LIMIT_S, loop_cpu_s=lambda: next(cpu_s), end=never)
    watch.start(lambda turn_s, stalled_s, _place: beats.append((turn_s, stalled_s)))
    watch.stop()
    beats.clear()
    for _ in range(3 * LOOKS):
        watch.check()
    assert beats[-1] == (pytest.approx(3 * LIMIT_S, abs=2 * CHECK_INTERVAL_S), 0.0)

    blocked = Watchdog(lambda: 7, limit_s=LIMIT_S, loop_cpu_s=lambda: 1.0, end=never)
    blocked.start(lambda turn_s, stalled_s, _place: beats.append((turn_s, stalled_s)))
    blocked.stop()
    for _ in range(4):
        blocked.check()
    assert beats[-1] == (pytest.approx(4 * CHECK_INTERVAL_S, abs=2 * CHECK_INTERVAL_S),) * 2


def test_the_pause_meter_counts_the_time_in_which_the_process_was_stopped() -> None:
    pauses = PauseMeter(100.0, max_interval_s=1.0)
    assert pauses.measure_s(100.5) == 0.0
    assert pauses.measure_s(160.5) == 59.0
    assert pauses.measure_s(161.0) == 0.0


def test_the_watchdog_checks_from_start_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "CHECK_INTERVAL_S", 0.001)
    looks, seen = itertools.count(), threading.Event()

    def num_iterations() -> int:
        look = next(looks)
        if look == 20:
            seen.set()
        return look

    watch = Watchdog(num_iterations, limit_s=LIMIT_S, end=never)
    watch.start()
    assert seen.wait(60)
    watch.stop()


STUCK = """
import itertools, sys, threading
from kvist.engine import watchdog
watchdog.CHECK_INTERVAL_S = 0.01
main, turns = sys._getframe(), itertools.count()
watchdog.Watchdog(lambda: -1 if main.f_lineno == 7 else next(turns), limit_s=0.05).start()
threading.Event().wait(60)
"""


def test_a_hung_process_exits_with_1_and_prints_the_stacks_of_its_threads() -> None:
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "no progress" in done.stderr
    assert "threading.py" in done.stderr
    assert 'File "<string>", line 7' in done.stderr


def test_a_hang_is_reported_once_with_all_stacks_and_named_in_each_heartbeat(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dumps: list[int] = []
    monkeypatch.setattr("faulthandler.dump_traceback", lambda: dumps.append(1))
    places: list[str] = []
    turns = iter([0] + [7] * 12 + [8, 8, 8] + [9] * 12)
    watch = Watchdog(lambda: next(turns), limit_s=LIMIT_S, end=never)
    watch._beat = lambda _turn_s, _stalled_s, place: places.append(place)
    for _ in range(12):
        watch.check()
    assert len(dumps) == 1
    assert places[0] == "", "the first iteration makes progress"
    assert all("place_of (watchdog.py:" in place for place in places[1:]), "the innermost frame in Kvist's code"
    assert "no progress for 2.0 s, in place_of (watchdog.py" in caplog.text
    for _ in range(14):
        watch.check()
    assert len(dumps) == 2, "another hang"
    assert "makes progress again" in caplog.text
