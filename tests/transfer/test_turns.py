"""Handoffs take turns, and the jobs of each keep their order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvist.request import HandoffId
from kvist.transfer.turns import Turns

JOBS = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 4)), min_size=1, max_size=20)  # handoff, parts


class Job:
    def __init__(self, handoff: str, number: int, parts: int) -> None:
        self.handoff, self.number, self.parts_left = HandoffId(handoff), number, parts


def make_jobs(drawn: list[tuple[str, int]]) -> list[Job]:
    return [Job(handoff, number, parts) for number, (handoff, parts) in enumerate(drawn)]


def take_turn(turns: Turns[Job]) -> Job:
    handoff_id, job = turns.next()
    job.parts_left -= 1
    assert turns.end_turn(handoff_id, job, is_done=not job.parts_left) == (not job.parts_left)
    return job


@given(JOBS)
def test_no_handoff_has_two_turns_while_another_waits(drawn: list[tuple[str, int]]) -> None:
    turns: Turns[Job] = Turns()
    jobs = make_jobs(drawn)
    for job in jobs:
        turns.add(job.handoff, job)
    done: list[Job] = []
    while turns:
        waiting = {job.handoff for job in jobs if job.parts_left}
        done.append(take_turn(turns))
        since = [job.handoff for job in done[-len(waiting) :]]
        assert len(set(since)) == len(since), "each waiting handoff has one turn in a round"
    assert not any(job.parts_left for job in jobs)
    for handoff in "abcd":
        numbers = [job.number for job in done if job.handoff == handoff]
        assert numbers == sorted(numbers)


@given(JOBS, st.data())
def test_a_job_that_was_removed_during_its_turn_is_gone_and_the_others_stay(
    drawn: list[tuple[str, int]], data: st.DataObject
) -> None:
    turns: Turns[Job] = Turns()
    jobs = make_jobs(drawn)
    for job in jobs:
        turns.add(job.handoff, job)
    for _ in range(data.draw(st.integers(0, sum(job.parts_left for job in jobs) - 1))):
        take_turn(turns)
    handoff_id, running = turns.next()
    removed = turns.remove(handoff_id, lambda job: job.number % 2 == running.number % 2)
    assert running in removed
    stop = Job(handoff_id, -1, 1)
    turns.add(handoff_id, stop)
    assert not turns.end_turn(handoff_id, running, is_done=True)
    left: list[Job] = []
    while turns:
        left.append(take_turn(turns))
    assert not set(left) & set(removed)
    assert stop in left
    assert not any(job.parts_left for job in jobs if job not in removed)
