"""A gateway remembers no more after many requests than after some, finished, failed or cancelled: counted, not timed.

Objects that one request leaves behind grow without end over a million requests. The objects are counted after rounds of
requests of every kind; bench/bench_routing.py counts the entries of routing over a million requests.
"""

from __future__ import annotations

import gc
import itertools
import logging
from collections.abc import Iterator

import pytest

from kvist import wire
from kvist.errors import KvistError
from kvist.flight.flight_log import FlightLog
from kvist.request import FinishReason, Outcome, Role
from kvist.router.registry import Worker
from kvist.testing.gateway_bench import GatewayBench, gateway_bench
from kvist.testing.router_bench import RouterBench, settle
from kvist.testing.specs import make_request

NUM_REQUESTS = 300  # in each round
FEW = NUM_REQUESTS // 10  # objects that caches with a bound may have more


@pytest.fixture(autouse=True)
def no_log_records() -> Iterator[None]:
    """pytest keeps the log records of a test; they are not the gateway's objects."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def num_objects() -> int:
    gc.collect()
    return len(gc.get_objects())


async def serve(bench: RouterBench, prefill: Worker, decode: Worker, name: str, number: int) -> None:
    """Let one request finish, fail, be retried or be left by its client."""
    answer = await bench.begin(make_request(name, tuple(range(number % 7, 300)), client=f"key/{number % 5}/1"))
    match number % 4:
        case 0:
            bench.engines.emit(decode, 0, 7, finish=FinishReason.STOP)
            bench.engines.end(decode)
            bench.engines.end(prefill)
        case 1:
            bench.engines.end(decode, Outcome.FAILED, error_code="engine_error", message="failed")
        case 2:
            answer.cancel()
        case _:
            bench.engines.end(prefill, Outcome.FAILED, error_code="timeout", message="failed")
    for _ in range(3):  # a request that failed is tried again: it then gets its answer
        await bench.pass_time(1.0)
        for worker in (decode, prefill):
            ids = tuple(worker.in_flight)
            chunks = [
                wire.TokenChunk(request_id=each, position=0, token_ids=(7,), finish_reason=FinishReason.STOP)
                for each in ids
            ]
            ended = [wire.Ended(request_id=each, outcome=Outcome.FINISHED) for each in ids]
            bench.engines.events.on_outputs(worker, wire.StepOutputs(chunks=tuple(chunks), ended=tuple(ended)))
    await settle()
    if not answer.cancelled():
        assert isinstance(answer.exception(), KvistError | None)


async def test_the_dispatcher_keeps_no_object_of_requests_that_have_ended() -> None:
    bench = RouterBench()
    prefill, decode = bench.engines.join("p", role=Role.PREFILL), bench.engines.join("d", role=Role.DECODE)
    numbers, counts = itertools.count(), list[int]()
    for _ in range(3):
        for number in itertools.islice(numbers, NUM_REQUESTS):
            await serve(bench, prefill, decode, f"r{number}", number)
            bench.clock.advance(0.01)
        assert bench.idle()
        bench.engines.sent.clear()
        counts.append(num_objects())
    assert counts[2] - counts[1] < FEW, counts


async def ask(bench: GatewayBench, number: int) -> None:
    match number % 4:
        case 0:
            assert (await bench.chat(f"question {number}")).status_code == 200
        case 1:
            assert (await bench.chat(f"question {number}", stream=True, user=f"u{number}")).status_code == 200
        case 2:
            assert (await bench.post(f"/no/such/path/{number}", {"n": number})).status_code == 404
        case _:
            assert (await bench.chat(f"question {number}", max_tokens=-number)).status_code == 400


async def test_the_http_server_keeps_no_object_of_requests_that_have_ended() -> None:
    bench = gateway_bench(flights=FlightLog(10))  # the last 1,000 requests are kept otherwise
    bench.dispatcher.answer = "Paris"
    numbers, counts = itertools.count(1), list[int]()
    async with bench.client:
        for _ in range(3):
            for number in itertools.islice(numbers, NUM_REQUESTS):
                await ask(bench, number)
            bench.dispatcher.requests.clear()
            bench.dispatcher.placements.clear()
            num_series = len((await bench.client.get("/metrics")).text.splitlines())
            counts.append(num_objects())
    assert counts[2] - counts[1] < FEW, counts
    assert num_series < 1000, "names that clients choose are no labels"
