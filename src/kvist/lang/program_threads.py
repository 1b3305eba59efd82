"""Runs the programs of a batch in as few threads as they need.

A thread takes the next program as soon as the function of the last one has returned: no thread waits for results that
no program reads. Another thread is started when all wait for results, and while programs are left also every 10 ms, as
many as there are: a program may be waiting for something else, or computing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

_GROWTH_S = 0.01


class Activity(Protocol):
    """Learns when the code of a program runs, and may add requests. Any thread may call; `Executor` is one."""

    def starts(self) -> None: ...

    def waits(self) -> None: ...

    def resumes(self) -> None: ...

    def ends(self) -> None: ...


class ProgramThreads:
    """Mutable; one use. An `Activity` for its programs, which passes everything on to `activity`."""

    def __init__(
        self,
        activity: Activity,
        *,
        num_programs: int,
        most: int,
        run: Callable[[ProgramThreads, int], None],
        growth_s: float = _GROWTH_S,
    ) -> None:
        """`most`: programs that have begun and not ended. `run(self, index)` runs the function of a program in the
        calling thread, with `self` as its activity; `ended` is called when its last result is there."""
        self._activity, self._run, self._most, self._growth_s = activity, run, most, growth_s
        self._num_left, self._num_programs = num_programs, num_programs
        self._num_open = 0  # programs that have begun and not ended
        self._num_awake = 0  # threads that run the code of a program, or are about to take one
        self._holds = True  # `activity` counts the programs that are left as one that runs
        self._changed = threading.Condition()

    def run_all(self) -> None:
        """Return when all programs have ended."""
        self._activity.starts()
        try:
            with self._changed:
                self._start(1)
                while not self._changed.wait_for(self._all_ended, self._growth_s if self._num_left else None):
                    self._start(min(max(self._num_awake, 1), self._room()))
        finally:
            with self._changed:  # after an interrupt, no further program begins
                self._num_left = 0
            self._release()

    def ended(self) -> None:
        """Record the end of a program, in any thread."""
        with self._changed:
            self._num_open -= 1
            self._start_if_stuck()
            self._changed.notify_all()

    # -- the activity of programs

    def starts(self) -> None:
        self._activity.starts()
        with self._changed:
            is_last = not self._room()
        if is_last:
            self._release()

    def waits(self) -> None:
        with self._changed:
            self._num_awake -= 1
            self._start_if_stuck()
        self._activity.waits()

    def resumes(self) -> None:
        with self._changed:
            self._num_awake += 1
        self._activity.resumes()

    def ends(self) -> None:
        self._activity.ends()

    # -- threads

    def _all_ended(self) -> bool:
        return not self._num_left and not self._num_open

    def _room(self) -> int:
        """Return how many programs may begin now."""
        return min(self._num_left, self._most - self._num_open)

    def _start_if_stuck(self) -> None:
        if not self._num_awake and self._room() > 0:
            self._start(1)

    def _start(self, count: int) -> None:
        self._num_awake += count
        for _ in range(count):
            threading.Thread(target=self._work, name="kvist-program", daemon=True).start()

    def _work(self) -> None:
        try:
            while (index := self._take()) is not None:
                self._run(self, index)
        except BaseException:
            with self._changed:
                self._num_awake -= 1
                self._start_if_stuck()
            raise

    def _take(self) -> int | None:
        with self._changed:
            if self._room() <= 0:
                self._num_awake -= 1
                return None
            index = self._num_programs - self._num_left
            self._num_left -= 1
            self._num_open += 1
            return index

    def _release(self) -> None:
        with self._changed:
            held, self._holds = self._holds, False
        if held:
            self._activity.ends()
