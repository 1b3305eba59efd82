from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from kvist.errors import Overloaded, RequestError
from kvist.http.work import BodyBudget, WorkPool

ANN, BOB = ("", "ann", "1"), ("", "bob", "1")


async def test_jobs_run_on_a_few_threads_and_their_exceptions_reach_the_caller() -> None:
    pool = WorkPool(num_threads=2, max_waiting=100)
    names = await asyncio.gather(*(pool.run(ANN, lambda: threading.current_thread().name) for _ in range(20)))
    assert len(set(names)) <= 2
    assert threading.current_thread().name not in names

    def fail() -> None:
        raise RequestError("wrong")

    with pytest.raises(RequestError, match="wrong"):
        await pool.run(ANN, fail)
    assert pool.num_waiting == 0


class Busy:
    """A pool with one thread, which is busy until `go` is set; jobs record the order of their runs."""

    def __init__(self, max_waiting: int) -> None:
        self.pool, self.go = WorkPool(num_threads=1, max_waiting=max_waiting), threading.Event()
        self.order: list[str] = []
        self.tasks: list[asyncio.Task[Any]] = [asyncio.create_task(self.pool.run(ANN, lambda: self.go.wait(30)))]

    async def ask(self, caller: tuple[str, str, str], name: str) -> asyncio.Task[None]:
        self.tasks.append(asyncio.create_task(self.pool.run(caller, lambda: self.order.append(name))))
        await asyncio.sleep(0)
        return self.tasks[-1]

    async def finish(self) -> list[object]:
        self.go.set()
        return await asyncio.gather(*self.tasks, return_exceptions=True)


async def test_the_work_pool_serves_callers_in_turn() -> None:
    busy = Busy(max_waiting=10)
    for name in ("a1", "a2", "a3"):
        await busy.ask(ANN, name)
    await busy.ask(BOB, "b1")
    await busy.finish()
    assert busy.order == ["a1", "b1", "a2", "a3"]


async def test_a_full_work_pool_refuses_the_newest_job_of_the_busiest_caller() -> None:
    busy = Busy(max_waiting=2)
    await busy.ask(ANN, "a1")
    loser = await busy.ask(ANN, "a2")
    with pytest.raises(Overloaded, match="--tokenizer-threads"):
        await busy.pool.run(ANN, int)
    await busy.ask(BOB, "b1")
    with pytest.raises(Overloaded):
        await loser
    await busy.finish()
    assert busy.order == ["a1", "b1"]


async def test_work_of_admitted_requests_is_never_refused() -> None:
    busy = Busy(max_waiting=1)
    await busy.ask(ANN, "a1")
    needed = asyncio.create_task(busy.pool.run_admitted(ANN, lambda: "written"))
    await busy.finish()
    assert await needed == "written"


async def test_the_waiting_job_of_a_disconnected_client_is_removed() -> None:
    busy = Busy(max_waiting=1)
    gone = await busy.ask(ANN, "gone")
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    assert busy.pool.num_waiting == 0
    await busy.ask(ANN, "next")
    await busy.finish()
    assert busy.order == ["next"]


def test_the_body_budget_counts_bytes_beyond_the_free_part_of_each_body() -> None:
    budget = BodyBudget(limit_bytes=100, free_bytes=10)
    with budget.open() as first, budget.open() as second:
        first.reserve_up_to(70)
        first.reserve_up_to(60)  # below the declared size
        second.reserve_up_to(50)
        assert budget.num_bytes == 100
        with pytest.raises(Overloaded, match="--max-total-body-bytes"):
            second.reserve_up_to(51)
        with budget.open() as small:
            small.reserve_up_to(10)
    assert budget.num_bytes == 0
