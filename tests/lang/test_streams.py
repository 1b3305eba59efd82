"""Streams, coroutines, and explanations after a run."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest

import kvist.lang as kv
from kvist.errors import KvistError, ProgramError, Unavailable
from kvist.execution.fake_server import FakeServer
from kvist.planning.prompt import Prompt

MakeEndpoint = Callable[[FakeServer], kv.Endpoint]


@kv.function
def story(s: kv.State, topic: str) -> None:
    s += kv.user(f"A story about {topic}. ")
    s += kv.assistant("Once, " + kv.gen("story", max_tokens=12) + " The end. " + kv.gen("moral", max_tokens=12))


def test_a_variable_is_streamed_in_the_pieces_of_its_text(endpoint: kv.Endpoint) -> None:
    state = story.run(topic="cats", backend=endpoint, stream=True, seed=1)
    pieces = list(state.text_iter("story"))
    assert "".join(pieces) == state["story"]
    assert len(pieces) > 1
    assert "".join(state.text_iter("story")) == state["story"]
    assert story.run(topic="cats", backend=endpoint, seed=1)["story"] == state["story"]


def test_a_whole_state_is_streamed_with_its_constants(endpoint: kv.Endpoint) -> None:
    state = story.run(topic="cats", backend=endpoint, stream=True)
    text = "".join(state.text_iter())
    assert text == f"user: A story about cats. \nassistant: Once, {state['story']} The end. {state['moral']}"


def test_a_chat_is_streamed_as_its_text(endpoint: kv.Endpoint) -> None:
    @kv.function
    def chat(s: kv.State) -> None:
        s += kv.system("Be short.") + kv.user("Q") + kv.assistant("So " + kv.gen("a"))
        s["a"]
        s += kv.user("More") + kv.assistant(kv.gen("b"))

    state = chat.run(backend=endpoint, stream=True)
    assert "".join(state.text_iter()) == state.text()


def test_a_stream_that_is_sent_again_repeats_no_piece(endpoint_for: MakeEndpoint) -> None:
    class Breaking(FakeServer):
        num_broken = 0

        async def generate(self, request: Any, push: Any) -> Any:
            self.num_broken += 1
            if self.num_broken == 1:
                answer = await super().generate(request, None)
                push(answer.texts[0][:3])
                raise Unavailable("the worker died", retry_after_s=0.001)
            return await super().generate(request, push)

    server = Breaking()
    state = story.run(topic="dogs", backend=endpoint_for(server), stream=True)
    assert "".join(state.text_iter("story")) == state["story"]
    assert state["moral"]
    assert server.num_broken == 3


def test_an_error_reaches_the_reader_of_a_stream(endpoint_for: MakeEndpoint) -> None:
    def fail(prompt: Prompt) -> KvistError | None:
        return KvistError("broken") if "The end" in prompt.outline else None

    state = story.run(topic="x", backend=endpoint_for(FakeServer(failures=fail)), stream=True)
    with pytest.raises(ProgramError, match="broken"):
        list(state.text_iter())
    with pytest.raises(ProgramError, match="broken"):
        list(state.text_iter("other"))


def test_a_program_whose_backend_is_closed_fails_at_once(endpoint_for: MakeEndpoint) -> None:
    class Silent(FakeServer):
        asked = threading.Event()

        async def generate(self, *_: Any) -> Any:
            self.asked.set()
            await asyncio.Event().wait()

    @kv.function
    def program(s: kv.State) -> None:
        s += "Tell: " + kv.gen("first") + " and " + kv.gen("second")
        s["first"]

    server = Silent()
    endpoint = endpoint_for(server)
    state = program.run(backend=endpoint, stream=True)
    assert server.asked.wait(60)
    endpoint.close()
    for name in ("first", "second"):
        with pytest.raises(ProgramError, match=r"test_streams\.py:\d+"):
            state[name]
    with pytest.raises(ProgramError):
        list(state.text_iter())


async def test_programs_run_in_coroutines(endpoint: kv.Endpoint) -> None:
    state = await story.run_async(topic="cats", backend=endpoint, seed=5)
    assert state["story"] == (await asyncio.to_thread(story.run, topic="cats", backend=endpoint, seed=5))["story"]
    streamed = story.run(topic="cats", backend=endpoint, seed=5, stream=True)
    assert "".join([piece async for piece in streamed.text_async_iter("story")]) == state["story"]
    assert await state.messages_async() == state.messages()
    assert str(await story.explain_async(topic="cats", backend=endpoint)) == str(
        story.explain("cats", backend=endpoint)
    )
    states = await story.run_batch_async([{"topic": "a"}, {"topic": "b"}], backend=endpoint, num_threads=2)
    assert [each["moral"] is not None for each in states] == [True, True]


async def test_a_wrong_argument_of_a_twin_is_an_error_with_the_callers_line(endpoint: kv.Endpoint) -> None:
    for call in (story.run_batch_async([{"subject": "a"}], backend=endpoint), story.explain_async(subject="a")):
        with pytest.raises(ProgramError, match=r"test_streams\.py:\d+: story has no argument 'subject'"):
            await call


async def test_a_coroutine_program_reads_without_blocking_the_loop(endpoint_for: MakeEndpoint) -> None:
    ticks = 0

    @kv.function
    async def program(s: kv.State) -> None:
        s += "Q" + kv.gen("x", max_tokens=8)
        first = await s.get("x")
        forks = s.fork(2)
        forks += "A" + kv.gen("y", temperature=1.0)
        forks.join()
        assert first
        assert len(await s.get("y")) == 2  # type: ignore[arg-type]
        s += " And? " + kv.gen("z", max_tokens=4)
        assert (await s.get_meta_info_async("z"))["completion_tokens"]
        assert (await s.text_async()).startswith(f"Q{first} And? ")
        await s.sync_async()

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    task = asyncio.create_task(tick())
    await program.run_async(backend=endpoint_for(FakeServer(time_scale=0.2)))
    task.cancel()
    assert ticks > 3


async def test_cancelling_a_run_ends_its_requests(endpoint_for: MakeEndpoint) -> None:
    server = FakeServer(time_scale=1000.0)
    task = asyncio.create_task(story.run_async(topic="x", backend=endpoint_for(server)))
    while not server.seen.generated:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not server.leases


def test_an_explanation_after_a_run_shows_what_happened(endpoint_for: MakeEndpoint) -> None:
    @kv.function
    def branches(s: kv.State) -> None:
        s += kv.user("shared words " * 60)
        forks = s.fork(3)
        for index, branch in enumerate(forks):
            branch += kv.user(f"branch {index}") + kv.assistant(kv.gen("x", max_tokens=32))
        forks.join()

    state = branches.run(backend=endpoint_for(FakeServer()))
    explanation = state.explain()
    assert explanation.happened
    generated = [row for row in explanation.rows if row.what.startswith("Generate")]
    assert len(generated) == 3
    assert all(row.took_ms is not None and row.worker == "prefill-0 > decode-0" for row in generated)
    assert sum(row.num_cached_tokens or 0 for row in generated) > 3 * 180
    assert state.report.num_computed_tokens < 1.2 * 195
    (took, cpu) = re.findall(r"planning took ([\d.]+) ms an operation, ([\d.]+) ms of it", str(explanation))[0]
    assert 0 < float(cpu) <= float(took) + 0.01
    (said,) = re.findall(r"(\d+) prompt tokens were computed; the plan expected (\d+)", str(explanation))
    assert int(said[0]) == state.report.num_computed_tokens
    assert int(said[1]) == pytest.approx(int(said[0]), rel=0.2)
    assert "took ms" in explanation.html()
