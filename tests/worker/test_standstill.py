"""A loop that stands still ends its process, and no other does."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
import threading

import pytest

from kvist.runner.tp import COLLECTIVE_TIMEOUT_S
from kvist.worker import standstill
from kvist.worker.standstill import LOOK_INTERVAL_S, STEP_LIMIT_S, StandstillWatch

LOOKS = int(STEP_LIMIT_S / LOOK_INTERVAL_S)


def test_a_turn_that_never_ends_ends_the_process_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    ends: list[str] = []
    watch = StandstillWatch(lambda: 7, lambda: ends.append("now"))
    for _ in range(LOOKS - 1):
        watch.look()
    assert not ends
    with caplog.at_level(logging.CRITICAL):
        watch.look()
    assert ends == ["now"]
    assert "no step has ended for 180 s" in caplog.text


def test_a_loop_that_goes_on_however_slowly_is_left_alone() -> None:
    turns = (number // (LOOKS - 1) for number in itertools.count())  # just quick enough
    watch = StandstillWatch(lambda: next(turns), lambda: pytest.fail("it was ended"))
    for _ in range(10 * LOOKS):
        watch.look()


def test_ranks_that_wait_for_each_other_give_up_first() -> None:
    assert STEP_LIMIT_S > COLLECTIVE_TIMEOUT_S + LOOK_INTERVAL_S


def test_it_looks_from_start_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standstill, "LOOK_INTERVAL_S", 0.001)
    looks, seen = itertools.count(), threading.Event()

    def num_turns() -> int:
        look = next(looks)
        if look == 20:
            seen.set()
        return look

    watch = StandstillWatch(num_turns, lambda: pytest.fail("it was ended"))
    watch.start()
    assert seen.wait(60)
    watch.stop()
    assert "kvist-standstill" not in [thread.name for thread in threading.enumerate()]


STUCK = """
import itertools, sys, threading
from kvist.worker import standstill
standstill.LOOK_INTERVAL_S, standstill.STEP_LIMIT_S = 0.01, 0.05
main, turns = sys._getframe(), itertools.count()
standstill.StandstillWatch(lambda: -1 if main.f_lineno == 7 else next(turns)).start()
threading.Event().wait(60)
"""


def test_a_process_that_is_stuck_ends_with_1_and_the_places_of_its_threads() -> None:
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "no step has ended" in done.stderr
    assert "threading.py" in done.stderr
    assert 'File "<string>", line 7' in done.stderr
