"""The threads of a batch: as few as its programs need, and never fewer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from kvist.lang.program_threads import ProgramThreads

NEVER_S, SOON_S, LIMIT_S = 60.0, 0.001, 30.0


@dataclass
class Activity:
    """Counts the programs that run, as the executor does."""

    num_active: int = 0
    counts: list[int] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def starts(self) -> None:
        with self.lock:
            self.num_active += 1
            self.counts.append(self.num_active)

    resumes = starts

    def ends(self) -> None:
        with self.lock:
            self.num_active -= 1
            self.counts.append(self.num_active)

    waits = ends


def run_all(
    function: Callable[[ProgramThreads, int], None],
    *,
    count: int,
    most: int = 100,
    growth_s: float = NEVER_S,
    ended: Callable[[ProgramThreads, int], None] = lambda threads, _: threads.ended(),
) -> Activity:
    activity = Activity()

    def run(threads: ProgramThreads, index: int) -> None:
        threads.starts()
        try:
            function(threads, index)
        finally:
            threads.ends()
        ended(threads, index)

    ProgramThreads(activity, num_programs=count, most=most, run=run, growth_s=growth_s).run_all()
    assert activity.num_active == 0
    return activity


def test_programs_that_wait_for_nothing_share_one_thread() -> None:
    threads: list[int] = []
    indices: list[int] = []

    def program(_: ProgramThreads, index: int) -> None:
        threads.append(threading.get_ident())
        indices.append(index)

    activity = run_all(program, count=50)
    assert indices == list(range(50))
    assert len(set(threads)) == 1
    assert activity.counts.index(0) == len(activity.counts) - 1, "a batch is active until its last program has run"


def test_a_program_that_waits_leaves_its_turn_to_the_next() -> None:
    all_wait = threading.Barrier(20)

    def program(threads: ProgramThreads, _: int) -> None:
        threads.waits()
        all_wait.wait(LIMIT_S)
        threads.resumes()

    activity = run_all(program, count=20)
    assert 0 in activity.counts[:-1], "the plan is made at once when all programs wait"


def test_programs_that_block_in_their_own_code_get_more_threads() -> None:
    all_block = threading.Barrier(20)

    def program(*_: object) -> None:
        all_block.wait(LIMIT_S)

    run_all(program, count=20, growth_s=SOON_S)


def test_no_more_programs_than_allowed_have_begun_and_not_ended() -> None:
    lock = threading.Lock()
    open_now: set[int] = set()
    widths: list[int] = []

    def program(_: ProgramThreads, index: int) -> None:
        with lock:
            open_now.add(index)
            widths.append(len(open_now))

    def ended(threads: ProgramThreads, index: int) -> None:
        def later() -> None:  # as the loop does, when the last result is there
            with lock:
                open_now.discard(index)
            threads.ended()

        threading.Timer(0.002, later).start()

    run_all(program, count=30, most=3, growth_s=SOON_S, ended=ended)
    assert len(widths) == 30
    assert max(widths) == 3


def test_after_an_interrupt_no_further_program_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    hold = threading.Event()

    def run(threads: ProgramThreads, index: int) -> None:
        begun.append(index)
        hold.wait(LIMIT_S)
        threads.ended()

    activity = Activity()
    threads = ProgramThreads(activity, num_programs=9, most=9, run=run, growth_s=NEVER_S)

    def interrupt(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(threads._changed, "wait_for", interrupt)
    with pytest.raises(KeyboardInterrupt):
        threads.run_all()
    assert activity.num_active == 0
    hold.set()
    for thread in threading.enumerate():
        if thread.name == "kvist-program":
            thread.join(LIMIT_S)
    assert len(begun) <= 1
