"""The executor with a fake server: order, width, leases, failures of its own parts."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kvist.clock import MonotonicClock
from kvist.errors import ProgramError, Unavailable
from kvist.execution import executor as executor_module
from kvist.execution.executor import Executor
from kvist.execution.fake_server import FakeServer
from kvist.execution.job import ExecutionConfig, Job
from kvist.execution.leases import Leases
from kvist.execution.results import Result
from kvist.execution.sampling import Sampling
from kvist.planning.graph import Generate, Place, Position
from kvist.planning.plan import Pin
from kvist.planning.prompt import Prompt, hole

_IDS = itertools.count()
LINE = Position("p.py", 7)


def _job(prompt: str, *, program: int = 0) -> Job:
    place = Place(operation_id=next(_IDS), position=LINE, program=program)
    operation = Generate(place=place, name="x", prompt=Prompt(prompt), max_tokens=4)
    return Job(operation=operation, result=Result(LINE), sampling=Sampling(max_tokens=4, seed=1))


@asynccontextmanager
async def _running(server: FakeServer, config: ExecutionConfig) -> AsyncIterator[Executor]:
    found = Executor(server, config, loop=asyncio.get_running_loop(), clock=MonotonicClock())
    await found.open()
    try:
        yield found
    finally:
        await found.close()


async def test_requests_go_out_depth_first_and_as_many_at_once_as_the_width() -> None:
    server = FakeServer()
    jobs = [_job(text) for text in ("b/1", "a/2", "b/2", "a/1")]
    async with _running(server, ExecutionConfig(width=1)) as executor:
        for job in jobs:
            executor.submit(job)
        for job in jobs:
            await job.result.wait_async(10)
    assert [each.prompt.outline for each in server.seen.generated] == ["a/1", "a/2", "b/1", "b/2"]
    assert server.seen.most_at_once == 1


async def test_a_request_waits_for_the_results_in_its_prompt() -> None:
    server = FakeServer()
    first = _job("first")
    second = _job(f"then {hole(first.operation.operation_id)}")
    async with _running(server, ExecutionConfig()) as executor:
        executor.submit(second)
        executor.submit(first)
        answer = await second.result.wait_async(10)
    assert answer.texts
    assert server.seen.generated[1].prompt.outline == f"then {first.result.wait(0).texts[0]}"


async def test_a_failure_reaches_the_requests_that_need_the_result() -> None:
    server = FakeServer(failures=lambda _prompt: Unavailable("gone", retry_after_s=0.001))
    first = _job("first")
    second = _job(f"then {hole(first.operation.operation_id)}")
    async with _running(server, ExecutionConfig(max_attempts=2)) as executor:
        executor.submit(first)
        executor.submit(second)
        for job in (first, second):
            with pytest.raises(ProgramError, match=r"p\.py:7: gone"):
                await job.result.wait_async(10)
    assert len(server.seen.generated) == 2  # both attempts of the first


async def test_a_bug_of_the_planner_fails_its_requests_and_lets_no_program_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(executor_module, "plan", broken)
    job = _job("first")
    later = _job(f"then {hole(job.operation.operation_id)}")
    async with _running(FakeServer(), ExecutionConfig()) as executor:
        executor.submit(job)
        executor.submit(later)
        for each in (job, later):
            with pytest.raises(ZeroDivisionError):
                await each.result.wait_async(10)


async def test_leases_are_renewed_while_their_prefix_is_used_and_end_with_its_last_use() -> None:
    server = FakeServer(time_scale=0.5)
    jobs = [_job("shared words " * 60 + f"question {number}") for number in range(4)]
    async with _running(server, ExecutionConfig(lease_ttl_s=0.03)) as executor:
        for job in jobs:
            executor.submit(job)
        held: list[float] = []
        while not all(job.result.is_done for job in jobs):
            await asyncio.sleep(0.005)
            server.expire()
            held += [end for _, end in server.leases.values()]
        assert len(set(held)) > 1  # renewed
        for _ in range(200):
            if not server.leases:
                break
            await asyncio.sleep(0.01)
        assert not server.leases
    assert len(server.seen.leased) == 1
    assert not server.seen.prefilled, "the lease computes the prefix"


async def test_a_prefix_that_cannot_be_leased_is_computed_ahead_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_room(*_: object) -> None:
        """The worker is full, although its report says otherwise."""

    server = FakeServer()
    monkeypatch.setattr(server, "lease", no_room)
    jobs = [_job("shared words " * 60 + f"question {number}") for number in range(4)]
    async with _running(server, ExecutionConfig()) as executor:
        for job in jobs:
            executor.submit(job)
        for job in jobs:
            await job.result.wait_async(10)
    (warm,) = executor.report.warms
    assert warm.served is not None
    assert server.seen.prefilled == [warm.warm.prompt]
    assert "no room for a lease" in " ".join(executor.report.notes)


async def test_requests_of_an_ended_program_are_cancelled_and_no_others() -> None:
    server = FakeServer(time_scale=0.2)
    jobs = [_job(f"program {number}", program=number) for number in range(2)]
    async with _running(server, ExecutionConfig()) as executor:
        for job in jobs:
            executor.submit(job)
        while len(server.seen.generated) < 2:
            await asyncio.sleep(0.001)
        executor.cancel(1)
        await jobs[0].result.wait_async(10)
        with pytest.raises(ProgramError, match="the program has ended"):
            await jobs[1].result.wait_async(10)


async def test_a_prefix_is_leased_ahead_of_its_uses_or_after_the_first_one_and_until_the_last_one() -> None:
    for ahead in (True, False):
        server = FakeServer()
        leases = Leases(server, ttl_s=30)
        pin = Pin(prompt=Prompt("shared words " * 20), worker="prefill-0", num_tokens=65, until=(1, 2, 3))
        leases.hold(pin, unfinished=pin.until, ahead=ahead)
        await _settled()
        assert len(server.leases) == ahead
        leases.used(7)  # of another prefix
        leases.used(1)
        await _settled()
        assert len(server.leases) == 1
        assert leases.num_tokens == 65
        leases.used(2)
        leases.used(3)
        await _settled()
        assert not server.leases
        assert not leases.outlines
        await leases.close()
    leases = Leases(server, ttl_s=30)
    leases.hold(pin, unfinished=pin.until, ahead=False)
    await leases.close()
    assert len(server.seen.leased) == 1, "a lease whose prefix was never used is not taken"


async def _settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)
