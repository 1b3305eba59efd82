"""The dispatcher puts the stages of a request together: those of its workers, and the pauses between them."""

from __future__ import annotations

import pytest

from kvist.errors import WorkerLost
from kvist.flight.stages import StageTime
from kvist.flight.timeline import Timeline
from kvist.request import FinishReason, Outcome, Role
from kvist.testing.router_bench import RouterBench, settle
from kvist.testing.specs import make_load, make_request

REQUEST = make_request("r", range(100))
PREFILL = (StageTime("queued", 0.5), StageTime("prefill", 1.0))


def shown(timeline: Timeline) -> list[tuple[str, str, float]]:
    return [(stage.name, stage.where, round(stage.duration_s, 3)) for stage in timeline.stages()]


async def test_a_pair_of_workers() -> None:
    bench = RouterBench()
    prefill, decode = bench.engines.join("p", role=Role.PREFILL), bench.engines.join("d", role=Role.DECODE)
    timeline = Timeline(bench.clock.now_s())
    task = await bench.begin(REQUEST, timeline)
    bench.clock.advance(2.0)
    bench.engines.emit(prefill, 0, 7, stages=PREFILL)
    bench.clock.advance(1.0)
    handoff = (StageTime("queued", 1.0), StageTime("handoff", 1.75), StageTime("decode", 0.25))
    bench.engines.emit(decode, 1, 8, stages=handoff)
    bench.clock.advance(3.0)
    bench.engines.emit(decode, 2, 9, finish=FinishReason.STOP)
    assert await task == [7, 8, 9]
    timeline.on_last_token()
    assert shown(timeline) == [
        ("other", "p", 0.5),
        ("queued", "p", 0.5),
        ("prefill", "p", 1.0),
        ("handoff", "d", 0.75),
        ("decode", "d", 3.25),
    ]


async def test_a_request_without_tokens_is_queued_or_in_prefill_as_its_worker_reports() -> None:
    bench = RouterBench()
    prefill, _ = bench.engines.join("p", role=Role.PREFILL), bench.engines.join("d", role=Role.DECODE)
    timelines = [Timeline(bench.clock.now_s()) for _ in range(3)]
    tasks = [
        await bench.begin(make_request(f"r{number}", range(100)), timeline) for number, timeline in enumerate(timelines)
    ]
    bench.clock.advance(1.0)
    prefill.load = make_load(num_running=1, num_waiting=2)
    shown_now = [shown(timeline.so_far(bench.clock.now_s())) for timeline in timelines]
    assert shown_now == [[("prefill", "p", 1.0)], [("queued", "p", 1.0)], [("queued", "p", 1.0)]]
    for task in tasks:
        task.cancel()


async def test_a_stream_that_goes_on_at_another_worker() -> None:
    bench = RouterBench()
    first = bench.engines.join("a", role=Role.UNIFIED)
    timeline = Timeline(bench.clock.now_s())
    task = await bench.begin(REQUEST, timeline)
    second = bench.engines.join("b", role=Role.UNIFIED)
    bench.clock.advance(1.5)
    bench.engines.emit(first, 0, 7, stages=PREFILL)
    bench.clock.advance(1.0)
    bench.engines.emit(first, 1, 8)
    bench.clock.advance(2.0)
    bench.engines.lose(first)
    await settle()
    bench.clock.advance(1.0)
    bench.engines.emit(second, 2, 9, finish=FinishReason.STOP, stages=(StageTime("prefill", 1.0),))
    assert await task == [7, 8, 9]
    assert shown(timeline) == [
        ("queued", "a", 0.5),
        ("prefill", "a", 1.0),
        ("decode", "a", 1.0),
        ("failover", "gateway", 2.0),
        ("prefill", "b", 1.0),
    ]
    assert "it died" in str(timeline.stages()[3].detail)


async def test_a_preemption_is_between_two_decodes() -> None:
    bench = RouterBench()
    worker = bench.engines.join("a", role=Role.UNIFIED)
    timeline = Timeline(bench.clock.now_s())
    task = await bench.begin(REQUEST, timeline)
    bench.clock.advance(1.5)
    bench.engines.emit(worker, 0, 7, stages=PREFILL)
    bench.clock.advance(4.0)
    paused = (StageTime("decode", 1.0), StageTime("preempted", 2.0), StageTime("prefill", 0.75))
    bench.engines.emit(worker, 1, 8, stages=paused)
    bench.clock.advance(1.0)
    bench.engines.emit(worker, 2, 9, finish=FinishReason.STOP)
    assert await task == [7, 8, 9]
    timeline.on_last_token()
    assert shown(timeline)[2:] == [
        ("decode", "a", 1.25),
        ("preempted", "a", 2.0),
        ("prefill", "a", 0.75),
        ("decode", "a", 1.0),
    ]


async def test_a_failed_request_has_the_stages_that_its_worker_reports_at_its_end() -> None:
    bench = RouterBench()
    worker = bench.engines.join("a", role=Role.UNIFIED)
    timeline = Timeline(bench.clock.now_s())
    task = await bench.begin(REQUEST, timeline)
    bench.clock.advance(60.0)
    bench.engines.end(
        worker, Outcome.FAILED, error_code="timeout", message="not started", stages=(StageTime("queued", 59.0),)
    )
    with pytest.raises(Exception, match="not started"):
        await task
    assert shown(timeline) == [("other", "a", 1.0), ("queued", "a", 59.0)]


async def test_a_failure_of_prefill_after_decode_began_adds_no_stage() -> None:
    bench = RouterBench()
    prefill, decode = bench.engines.join("p", role=Role.PREFILL), bench.engines.join("d", role=Role.DECODE)
    timeline = Timeline(bench.clock.now_s())
    task = await bench.begin(REQUEST, timeline)
    bench.engines.emit(prefill, 0, 7)
    bench.engines.emit(decode, 1, 8)
    bench.clock.advance(5.0)
    bench.engines.end(prefill, Outcome.FAILED, error_code="handoff_failed", stages=(StageTime("handoff", 4.0),))
    bench.engines.emit(decode, 2, 9, finish=FinishReason.STOP)
    assert await task == [7, 8, 9]
    timeline.on_last_token()
    assert shown(timeline) == [("decode", "d", 5.0)]


async def test_a_request_whose_worker_died_before_a_token_waits_for_another() -> None:
    bench = RouterBench()
    worker = bench.engines.join("a", role=Role.UNIFIED)
    timeline = Timeline(bench.clock.now_s())
    task = await bench.begin(REQUEST, timeline)
    bench.clock.advance(1.0)
    bench.engines.lose(worker)
    await bench.pass_time(60.0)
    with pytest.raises(WorkerLost):
        await task
    ((stage, where, duration_s),) = shown(timeline)
    assert (stage, where) == ("failover", "gateway")
    assert duration_s > 1.0
