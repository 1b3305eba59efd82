"""The stages of an answer cover its time, for all reports of workers, in any order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.flight.records import Stage
from kvist.flight.stages import MAX_PARTS, STAGES, StageClock, StageTime
from kvist.flight.timeline import MAX_STAGES, SentTo, Timeline


def alone(worker: str) -> SentTo:
    return SentTo(prefill=worker, decode=worker)


def shown(timeline: Timeline) -> list[tuple[str, str, float]]:
    return [(stage.name, stage.where, stage.duration_s) for stage in timeline.stages()]


def check_cover(stages: tuple[Stage, ...], duration_s: float) -> None:
    """The stages follow one another, and their sum is the duration to 1% or 1 ms."""
    assert abs(sum(stage.duration_s for stage in stages) - duration_s) <= max(0.001, 0.01 * duration_s)
    end_s = 0.0
    for stage in stages:
        assert stage.name in STAGES
        assert stage.duration_s >= 0.0
        assert stage.start_s == pytest.approx(end_s, abs=1e-4)
        end_s = stage.start_s + stage.duration_s


def test_parts_of_a_worker_end_with_the_token_that_brings_them() -> None:
    timeline = Timeline(10.0)
    timeline.advance("received", 10.5)
    timeline.on_submit(11.0, alone("w"))
    timeline.lay([StageTime("queued", 1.0), StageTime("prefill", 2.0, "tokens 0 to 7")], 14.25, "w")
    timeline.token_s = 14.25
    timeline.token_s = 16.0
    timeline.on_last_token()
    assert shown(timeline) == [
        ("received", "gateway", 0.5),
        ("queued", "gateway", 0.5),
        ("other", "w", 0.25),
        ("queued", "w", 1.0),
        ("prefill", "w", 2.0),
        ("decode", "w", 1.75),
    ]


def test_stages_of_decode_before_the_first_token_of_prefill_are_left_out() -> None:
    timeline = Timeline(0.0)
    timeline.on_submit(0.0, alone("d"))
    timeline.lay([StageTime("prefill", 5.0)], 5.0, "p")
    timeline.token_s = 5.0
    timeline.lay([StageTime("queued", 1.0), StageTime("handoff", 5.0, "written"), StageTime("decode", 1.0)], 7.0, "d")
    timeline.token_s = 7.0
    assert shown(timeline) == [("prefill", "p", 5.0), ("handoff", "d", 1.0), ("decode", "d", 1.0)]


def test_a_failover_lasts_from_the_last_token_until_another_worker_has_the_request() -> None:
    timeline = Timeline(0.0)
    timeline.on_submit(0.0, alone("a"))
    timeline.lay([StageTime("prefill", 1.0)], 1.0, "a")
    timeline.token_s = 3.0
    timeline.on_submit(5.0, alone("b"), "worker a was lost")
    timeline.lay([StageTime("prefill", 0.5)], 6.0, "b")
    timeline.token_s = 6.0
    assert shown(timeline) == [
        ("prefill", "a", 1.0),
        ("decode", "a", 2.0),
        ("failover", "gateway", 2.0),
        ("other", "b", 0.5),
        ("prefill", "b", 0.5),
    ]
    assert timeline.stages()[2].detail == "worker a was lost"


def test_parts_that_no_worker_can_have_measured_do_not_harm_the_timeline() -> None:
    timeline = Timeline(0.0)
    bad = [float("nan"), float("inf"), -1.0]
    timeline.lay([StageTime("magic", each, "x" * 1000) for each in bad] + [StageTime("spells", 9.0)], 2.0, "w")
    assert shown(timeline) == [("other", "w", 2.0)]
    timeline.lay([StageTime("prefill", 1e-3)] * 10_000, 3.0, "w")
    check_cover(timeline.stages(), 3.0)
    assert len(timeline.stages()) < 10


def test_the_number_of_stages_is_bounded() -> None:
    timeline = Timeline(0.0)
    for number in range(1000):
        timeline.lay([StageTime("prefill", 0.5), StageTime("preempted", 0.5)], number + 1.0, f"w{number}")
        timeline.token_s = number + 1.0
    assert len(timeline.stages()) == MAX_STAGES
    check_cover(timeline.stages(), 1000.0)


def test_a_request_under_way_is_covered_until_now_by_the_stage_in_which_it_is() -> None:
    timeline, is_queued = Timeline(0.0), True

    def last(now_s: float, *, has_all_tokens: bool = False) -> tuple[str, str, float]:
        stages = timeline.so_far(now_s, has_all_tokens=has_all_tokens).stages()
        check_cover(stages, now_s)
        return stages[-1].name, stages[-1].where, stages[-1].duration_s

    assert last(0.5) == ("other", "gateway", 0.5)
    timeline.on_submit(1.0, SentTo(prefill="p", decode="d", is_queued=lambda: is_queued))
    assert last(5.0) == ("queued", "p", 4.0)
    is_queued = False
    assert last(6.0) == ("prefill", "p", 5.0)
    timeline.on_failure()
    assert last(7.0) == ("failover", "gateway", 6.0)
    timeline.on_submit(8.0, SentTo(prefill="p2", decode="d"), "p was lost")
    assert last(9.0) == ("prefill", "p2", 1.0)
    timeline.lay([StageTime("prefill", 2.0)], 10.0, "p2")
    timeline.token_s = 10.0
    assert last(11.0) == ("handoff", "d", 1.0)
    timeline.lay([StageTime("handoff", 1.5)], 12.0, "d")
    timeline.token_s = 13.0
    assert last(16.0) == ("decode", "d", 4.0)
    assert last(16.0, has_all_tokens=True) == ("sent", "gateway", 3.0)
    assert timeline.end_s == 12.0, "reading changes nothing"
    timeline.ends_early(14.0)
    assert last(14.0) == ("decode", "d", 2.0)


def test_a_clock_reports_what_happened_since_the_last_report() -> None:
    clock = StageClock(0.0)
    clock.enter("prefill", 1.0)
    clock.end_part(2.0, "tokens 0 to 511")
    assert clock.has_news
    assert clock.take(4.0) == (
        StageTime("queued", 1.0),
        StageTime("prefill", 1.0, "tokens 0 to 511"),
        StageTime("prefill", 2.0),
    )
    assert not clock.has_news
    clock.enter("preempted", 5.0)
    clock.enter("prefill", 7.0)
    assert clock.has_news
    assert [each.stage for each in clock.take(8.0)] == ["decode", "preempted", "prefill"]


def test_a_clock_keeps_a_bounded_number_of_parts() -> None:
    clock = StageClock(0.0)
    for number in range(10 * MAX_PARTS):
        clock.enter("prefill", float(number), f"chunk {number}")
    parts = clock.take(10.0 * MAX_PARTS)
    assert len(parts) == MAX_PARTS
    assert sum(part.duration_s for part in parts) == pytest.approx(10.0 * MAX_PARTS)


class Journey:
    """A random way of a request: over workers that measure stages, lose pages, hand over and die."""

    def __init__(self, draw: st.DataObject) -> None:
        self._draw = draw
        self.now_s = 100.0
        self.timeline = Timeline(self.now_s)

    def pass_time(self) -> None:
        self.now_s += self._draw.draw(st.floats(0.0, 2.0))

    def run_at(self, worker: str) -> None:
        """Run at one worker: it measures, and sends a token after each measurement."""
        clock = StageClock(self.now_s)
        for _ in range(self._draw.draw(st.integers(0, 3))):
            for stage in self._draw.draw(st.lists(st.sampled_from(STAGES), max_size=4)):
                self.pass_time()
                clock.enter(stage, self.now_s)
            self.pass_time()
            parts = clock.take(self.now_s)
            self.pass_time()  # the message is on its way
            self.timeline.lay(parts, self.now_s, worker)
            self.timeline.token_s = self.now_s


@given(st.data())
def test_stages_cover_the_time_of_every_journey(data: st.DataObject) -> None:
    journey = Journey(data)
    timeline = journey.timeline
    for number, way in enumerate(
        data.draw(st.lists(st.sampled_from(["full", "pair", "stored"]), min_size=1, max_size=4))
    ):
        journey.pass_time()
        timeline.on_submit(journey.now_s, alone(f"d{number}"), "it died" if number else None)
        if way == "pair":
            decode = StageClock(journey.now_s)
            journey.run_at(f"p{number}")
            decode.enter("handoff", data.draw(st.floats(99.0, journey.now_s)))
            journey.pass_time()
            timeline.lay(decode.take(journey.now_s), journey.now_s, f"d{number}")
            timeline.token_s = journey.now_s
        else:
            journey.run_at(f"w{number}")
        if way == "stored":
            journey.pass_time()
            timeline.on_stored(journey.now_s, f"w{number}")
    timeline.on_last_token()
    journey.pass_time()
    timeline.advance("sent", journey.now_s)
    check_cover(timeline.stages(), journey.now_s - timeline.start_s)
