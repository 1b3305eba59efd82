from __future__ import annotations

import asyncio
import threading

import pytest

from kvist.errors import Overloaded, RequestError
from kvist.server.work import BodyBudget, WorkPool


async def test_jobs_run_on_a_few_threads_and_what_they_raise_arrives() -> None:
    pool = WorkPool(num_threads=2, max_jobs=100)
    names = await asyncio.gather(*(pool.run(lambda: threading.current_thread().name) for _ in range(20)))
    assert len(set(names)) <= 2
    assert threading.current_thread().name not in names

    def fail() -> None:
        raise RequestError("wrong")

    with pytest.raises(RequestError, match="wrong"):
        await pool.run(fail)
    assert pool.num_jobs == 0


async def test_more_jobs_than_may_wait_are_refused_but_not_what_an_answer_needs() -> None:
    pool, go = WorkPool(num_threads=1, max_jobs=2), threading.Event()
    waiting = [asyncio.create_task(pool.run(lambda: go.wait(30))) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="--tokenizer-threads"):
        await pool.run(int)
    needed = asyncio.create_task(pool.finish(lambda: "written"))
    go.set()
    assert await asyncio.gather(*waiting) == [True, True]
    assert await needed == "written"
    assert await pool.run(lambda: 1) == 1


async def test_a_client_that_leaves_takes_its_waiting_job_along() -> None:
    pool, go = WorkPool(num_threads=1, max_jobs=2), threading.Event()
    ran: list[str] = []
    first = asyncio.create_task(pool.run(lambda: go.wait(30)))
    second = asyncio.create_task(pool.run(lambda: ran.append("second")))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    assert pool.num_jobs == 1
    go.set()
    await first
    await pool.run(lambda: ran.append("third"))
    assert ran == ["third"]


def test_a_budget_counts_what_is_beyond_the_free_part_of_each_body() -> None:
    budget = BodyBudget(limit_bytes=100, free_bytes=10)
    with budget.open() as first, budget.open() as second:
        first.grow_to(70)
        first.grow_to(60)  # what it said to have
        second.grow_to(50)
        assert budget.num_bytes == 100
        with pytest.raises(Overloaded, match="--max-total-body-bytes"):
            second.grow_to(51)
        with budget.open() as small:
            small.grow_to(10)
    assert budget.num_bytes == 0
