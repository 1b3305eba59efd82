"""A record of a request: of the answer that is last, also when the client leaves."""

from __future__ import annotations

import dataclasses

import pytest

from kvist.flight.flight import Arrival, Flight, Progress
from kvist.flight.flight_log import FlightLog
from kvist.flight.records import CachedTokens, Status
from kvist.flight.stages import StageTime

UNDER_WAY = Progress(
    prompt_tokens=7,
    cached_tokens=CachedTokens(),
    completion_tokens=3,
    first_token_s=102.0,
    finish_reason=None,
    is_complete=False,
    workers=("w",),
)
ARRIVAL = Arrival(
    request_id="r",
    response_id="chatcmpl-1",
    endpoint="/v1/completions",
    model="m",
    received_s=100.0,
    received_unix_s=5.0,
)


class Bench:
    """A flight at a time that the test sets."""

    def __init__(self, num_answers: int = 1) -> None:
        self.now_s = 100.0
        self.progress = UNDER_WAY
        self.flight = Flight(ARRIVAL, lambda: self.now_s, lambda: self.progress, num_answers)
        self.log = FlightLog(2)
        self.log.begin(self.flight)

    def end(self) -> None:
        self.flight.ends()
        self.log.end(self.flight)

    def stages(self) -> list[tuple[str, float]]:
        (record,) = self.log.records()
        assert sum(stage.duration_s for stage in record.stages) == pytest.approx(record.duration_s)
        return [(stage.name, stage.duration_s) for stage in record.stages]


def test_a_client_that_leaves_ends_a_stage_of_its_own() -> None:
    bench = Bench()
    timeline = bench.flight.open_answer()
    timeline.lay([StageTime("prefill", 2.0)], 102.0, "w")
    timeline.token_s = 104.0
    bench.now_s = 105.0
    assert bench.stages() == [("prefill", 2.0), ("decode", 2.0), ("other", 1.0)]
    bench.end()
    assert bench.stages() == [("prefill", 2.0), ("decode", 2.0), ("other", 1.0)]
    (record,) = bench.log.records()
    assert (record.status, record.error, record.ttft_s) == (Status.ABORTED, None, 2.0)


def test_stages_are_of_the_answer_that_ends_last() -> None:
    bench = Bench(num_answers=2)
    bench.flight.reached("received", 101.0)
    first, second = bench.flight.open_answer(), bench.flight.open_answer()
    first.lay([StageTime("prefill", 1.0)], 102.0, "a")
    second.lay([StageTime("prefill", 0.5)], 101.5, "b")
    first.token_s, second.token_s = 103.0, 106.0
    bench.now_s = 107.0
    bench.progress = dataclasses.replace(UNDER_WAY, is_complete=True, finish_reason="stop")
    bench.end()
    assert bench.stages() == [("received", 1.0), ("prefill", 0.5), ("decode", 4.5), ("sent", 1.0)]


def test_an_error_after_the_last_token_is_a_failure_even_if_the_answer_is_complete() -> None:
    bench = Bench()
    bench.progress = dataclasses.replace(UNDER_WAY, is_complete=True)
    bench.flight.error_code = "internal_error"
    bench.end()
    (record,) = bench.log.records()
    assert (record.status, record.error) == (Status.FAILED, "internal_error")
