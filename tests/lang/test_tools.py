"""Tools: functions that a program calls between generations."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import kvist.lang as kv
from kvist.execution.fake_server import FakeServer

MakeEndpoint = Callable[[FakeServer], kv.Endpoint]


@kv.tool
def weather(city: str) -> str:
    """Return the weather."""
    return f"rain in {city}"


@kv.function
def plan_day(s: kv.State) -> None:
    s += kv.user("Which city? " + "Think about it. " * 30)
    s += kv.assistant(kv.gen("city", max_tokens=2))
    s += kv.user("The weather: " + weather(str(s["city"])))
    s += kv.assistant(kv.gen("advice"))


def test_a_tool_is_a_plain_function_outside_of_programs() -> None:
    assert weather("Ghent") == "rain in Ghent"
    assert weather.__doc__ == "Return the weather."


def test_a_tool_is_an_operation_of_the_program(endpoint: kv.Endpoint) -> None:
    state = plan_day.run(backend=endpoint)
    assert f"rain in {state['city']}" in state.text()
    rows = {row.what: row for row in state.explain().rows}
    assert rows["Tool weather"].work == "tool"
    assert rows["Tool weather"].place.startswith("test_tools.py:")


def test_the_known_part_of_the_next_turn_is_computed_while_a_tool_runs(endpoint_for: MakeEndpoint) -> None:
    server = FakeServer()
    seen: list[int] = []

    @kv.tool
    def slow() -> str:
        deadline_s = time.monotonic() + 60
        while not server.seen.prefilled and time.monotonic() < deadline_s:
            time.sleep(0.001)
        seen.append(len(server.seen.prefilled))
        return "done"

    @kv.function
    def waits_between(s: kv.State) -> None:
        s += kv.user("Go. " * 50)
        s += kv.assistant(kv.gen("x", max_tokens=12))
        s["x"]
        s += kv.user_begin() + "A long text that is known before the tool has its result. " * 10
        s += slow() + kv.user_end()
        s += kv.assistant(kv.gen("y"))

    waits_between.run(backend=endpoint_for(server))
    assert seen == [1]
    (prompt,) = server.seen.prefilled
    assert prompt.open_role == "user"
    assert prompt.is_known
    assert "is known before the tool" in prompt.outline


def test_async_tools_run_in_async_and_in_plain_programs(endpoint: kv.Endpoint) -> None:
    @kv.tool(timeout_s=10)
    async def double(number: int) -> int:
        await asyncio.sleep(0)
        return 2 * number

    @kv.function
    async def in_coroutine(s: kv.State) -> None:
        s += f"Twice 2 is {await double(2)}. " + kv.gen("x")
        assert await s.get("x") == s["x"]

    async def both() -> None:
        assert "is 4" in (await in_coroutine.run_async(backend=endpoint)).text()

    asyncio.run(both())
    assert "is 4" in in_coroutine.run(backend=endpoint).text()
    assert asyncio.run(double(3)) == 6


def test_a_tool_runs_in_a_thread_of_its_own(endpoint: kv.Endpoint) -> None:
    names: list[str] = []

    @kv.tool
    def note() -> str:
        names.append(threading.current_thread().name)
        return ""

    @kv.function
    def program(s: kv.State) -> None:
        s += "x" + note()

    program.run(backend=endpoint)
    assert names == ["kvist-tool-note"]
