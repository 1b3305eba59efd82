"""The width of a client: grows slowly, shrinks fast, once for each queue."""

from __future__ import annotations

from kvist.planning.width import Width


def test_the_width_grows_by_about_one_for_each_round_of_answers() -> None:
    width = Width(limit=8.0, most=64)
    for _ in range(9):
        width = width.after_answer(0.0)
    assert 9.0 <= width.limit < 9.2


def test_a_queue_shrinks_the_width_once_and_not_for_each_request_in_it() -> None:
    width = Width(limit=10.0, most=64)
    shrunk = width.after_answer(1.0)
    assert shrunk.limit == 7.0
    for _ in range(5):
        shrunk = shrunk.after_answer(1.0)
    assert shrunk.limit == 7.0
    for _ in range(3):
        shrunk = shrunk.after_answer(1.0)
    assert shrunk.limit < 7.0


def test_the_width_stays_between_its_limits() -> None:
    width = Width(limit=2.0, most=3)
    for _ in range(50):
        width = width.after_answer(0.0)
    assert width.requests == 3
    for _ in range(50):
        width = width.after_refusal()
    assert width.requests == 1
