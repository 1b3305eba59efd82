"""The dispatcher with engines in memory, so that tests control the order of messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Unpack

import msgspec
import pytest

from kvist import wire
from kvist.errors import (
    EngineError,
    KvistError,
    Overloaded,
    PromptTooLong,
    RequestError,
    Timeout,
    Unavailable,
    WorkerLost,
)
from kvist.kv.keys import chained_digests, page_digests
from kvist.options import compose
from kvist.page_index import prompt_digests
from kvist.plan.compat import peer_spec
from kvist.request import EpochId, FinishReason, Mode, Outcome, Role, SamplingParams, TokenLogprobs, WorkerId
from kvist.router.config import RouterConfig, RoutingOptions
from kvist.router.policy import Reason
from kvist.router.registry import Worker
from kvist.router.stream import StreamPart
from kvist.router.streams import END_TIMEOUT_S, MAX_WAITING_LOGPROBS
from kvist.testing.page_events import joined
from kvist.testing.router_bench import RouterBench, read_all, settle
from kvist.testing.specs import RequestFields, make_request, make_roomy_spec

PROMPT = tuple(range(100))


class World(RouterBench):
    """A dispatcher over engines in memory, and a request of 100 tokens."""

    def __init__(self, **config: Any) -> None:
        super().__init__(compose(RouterConfig, config))

    def pair(self) -> tuple[Worker, Worker]:
        return self.engines.join("p", role=Role.PREFILL), self.engines.join("d", role=Role.DECODE)

    def generate(self, **fields: Unpack[RequestFields]) -> AsyncGenerator[StreamPart, None]:
        return self.dispatcher.generate(make_request("r", PROMPT, **fields))

    async def ask(self, prompt: Sequence[int] = PROMPT, **fields: Unpack[RequestFields]) -> asyncio.Task[list[int]]:
        """Start a reader whose request has been submitted."""
        return await self.begin(make_request("r", prompt, **fields))


async def read_parts(stream: AsyncGenerator[StreamPart, None]) -> list[StreamPart]:
    return [part async for part in stream]


# ---------------------------------------------------------------- routing without faults


async def test_a_unified_worker_serves_the_whole_request() -> None:
    world = World()
    worker = world.engines.join("u", role=Role.UNIFIED)
    task = await world.ask()
    (submit,) = world.engines.submits(worker)
    assert (submit.mode, submit.handoff_id, submit.request.prompt_token_ids) == (Mode.FULL, None, PROMPT)
    world.engines.emit(worker, 0, 7)
    world.engines.emit(worker, 1, 8, 9, finish=FinishReason.STOP)
    assert await task == [7, 8, 9]
    assert not world.idle(), "the worker has not sent Ended"
    world.engines.end(worker)
    assert world.idle()
    assert world.engines.aborts(worker) == []


async def test_a_pair_gets_one_handoff_id_and_its_chunks_are_merged() -> None:
    world = World()
    prefill, decode = world.pair()
    stream = world.generate()
    first = asyncio.create_task(anext(stream))
    await settle()
    (ask_prefill,), (ask_decode,) = world.engines.submits(prefill), world.engines.submits(decode)
    assert (ask_prefill.mode, ask_decode.mode) == (Mode.PREFILL, Mode.DECODE)
    assert ask_prefill.handoff_id == ask_decode.handoff_id is not None
    assert prefill.spec is not None
    assert ask_decode.prefill == wire.PrefillPeer(
        worker_id=WorkerId("p"), endpoint="tcp://p", epoch=EpochId("epoch-p"), spec=peer_spec(prefill.spec)
    )
    world.engines.emit(decode, 1, 8)  # before the chunk of prefill
    await settle()
    assert not first.done()
    world.engines.emit(prefill, 0, 7)
    part = await first
    assert part.chunk.token_ids == (7, 8)
    assert part.chunk.request_id == "r"
    assert (part.prefill_worker, part.decode_worker) == ("p", "d")
    world.engines.end(prefill)
    world.engines.emit(decode, 2, 9, finish=FinishReason.STOP)
    world.engines.end(decode)
    assert await read_all(stream) == [9]
    assert world.idle()


async def test_chunks_that_wait_for_a_slow_reader_are_merged_into_one_part() -> None:
    world = World()
    worker = world.engines.join("u", role=Role.UNIFIED)
    stream = world.generate()
    first = asyncio.create_task(anext(stream))
    await settle()
    for position in range(3):
        world.engines.emit(worker, position, position)
    assert (await first).chunk.token_ids == (0, 1, 2)
    await stream.aclose()


async def test_a_request_for_one_token_runs_on_a_prefill_worker_alone() -> None:
    world = World()
    prefill, decode = world.pair()
    task = await world.ask(max_tokens=1)
    assert world.engines.submits(prefill)[0].mode is Mode.FULL
    assert world.engines.submits(decode) == []
    world.engines.emit(prefill, 0, 7, finish=FinishReason.LENGTH)
    assert await task == [7]


async def test_a_first_token_that_ends_the_answer_does_not_wait_for_decode() -> None:
    world = World()
    prefill, decode = world.pair()
    task = await world.ask()
    world.engines.end(decode)
    world.engines.emit(prefill, 0, 7, finish=FinishReason.STOP)
    world.engines.end(prefill)
    assert await task == [7]
    assert world.idle()


async def test_a_continued_request_starts_at_the_position_after_its_output_tokens() -> None:
    world = World()
    worker = world.engines.join("u", role=Role.UNIFIED)
    task = await world.ask(output_token_ids=(1, 2))
    world.engines.emit(worker, 2, 3, finish=FinishReason.LENGTH)
    assert await task == [3]


async def test_a_prompt_goes_to_the_worker_that_caches_its_pages_under_the_same_salt() -> None:
    world = World()
    cold, warm = world.engines.join("a", role=Role.UNIFIED), world.engines.join("b", role=Role.UNIFIED)
    digests = page_digests(PROMPT, 16, "n", "salt")
    world.engines.registry.index.store(warm.worker_id, "device", joined(*digests))
    first = await world.ask(cache_salt="salt")
    second = await world.ask()
    assert len(world.engines.submits(warm)) == len(world.engines.submits(cold)) == 1
    assert world.engines.submits(warm)[0].request.cache_salt == "salt"
    first.cancel()
    second.cancel()


# ---------------------------------------------------------------- disconnects and time limits


@pytest.mark.parametrize("how", ["aclose", "cancel"])
async def test_a_reader_that_disconnects_aborts_both_engines_at_once(how: str) -> None:
    world = World()
    prefill, decode = world.pair()
    if how == "cancel":
        task = await world.ask()
        task.cancel()
        await settle()
    else:
        stream = world.generate()
        first = asyncio.create_task(anext(stream))
        await settle()
        world.engines.emit(prefill, 0, 7)
        await first
        await stream.aclose()
    (request_id,) = world.engines.aborts(prefill)
    assert world.engines.aborts(decode) == [request_id]
    world.engines.end(prefill, Outcome.ABORTED)
    world.clock.advance(0.3)
    assert world.dispatcher.snapshot().cancelled.num_held == 1, "decode has not sent Ended"
    world.engines.emit(decode, 1, 8)  # sent before the Abort arrived: ignored
    world.engines.end(decode, Outcome.ABORTED)
    assert world.idle()
    cancelled = world.dispatcher.snapshot().cancelled
    samples = {sample.name: sample.value for sample in cancelled.release_s.family("release", "").samples}
    assert cancelled.num_held == 0
    assert (samples["kvist:release_count"], samples["kvist:release_sum"]) == (1, 0.3)


async def test_a_request_over_the_time_limit_fails_with_timeout_and_is_aborted() -> None:
    world = World()
    prefill, decode = world.pair()
    task = await world.ask()
    world.clock.advance(world.config.links.request_timeout_s - 0.1)
    world.dispatcher.on_time()
    await settle()
    assert not task.done()
    world.clock.advance(0.1)
    world.dispatcher.on_time()
    with pytest.raises(Timeout):
        await task
    assert len(world.engines.aborts(prefill)) == len(world.engines.aborts(decode)) == 1


async def test_a_request_whose_engine_never_sends_ended_is_given_up() -> None:
    world = World()
    worker = world.engines.join("u", role=Role.UNIFIED)
    task = await world.ask()
    world.engines.emit(worker, 0, 7, finish=FinishReason.STOP)
    await task
    world.dispatcher.on_time()
    assert not world.idle(), "Ended may still arrive"
    world.clock.advance(END_TIMEOUT_S + 1)
    world.dispatcher.on_time()
    assert world.idle()
    assert len(world.engines.aborts(worker)) == 1


async def test_close_ends_every_request() -> None:
    world = World()
    worker = world.engines.join("u", role=Role.UNIFIED)
    task = await world.ask()
    await world.dispatcher.close()
    with pytest.raises(Unavailable, match="shutting down"):
        await task
    assert len(world.engines.aborts(worker)) == 1


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("refuser", ["p", "d"])
async def test_a_refusal_by_one_engine_reaches_the_client_and_aborts_the_other(refuser: str) -> None:
    world = World()
    workers = dict(zip("pd", world.pair(), strict=True))
    task = await world.ask()
    world.engines.end(workers.pop(refuser), Outcome.FAILED, error_code="context_length_exceeded", message="too long")
    with pytest.raises(PromptTooLong, match="too long"):
        await task
    (other,) = workers.values()
    assert len(world.engines.aborts(other)) == 1
    world.engines.end(other, Outcome.ABORTED)
    assert world.idle()


async def test_tokens_received_before_a_failure_are_delivered_before_the_error() -> None:
    world = World()
    prefill, decode = world.pair()
    stream = world.generate()
    first = asyncio.create_task(anext(stream))
    await settle()
    world.engines.emit(prefill, 0, 7)
    world.engines.end(decode, Outcome.FAILED, error_code="engine_error", message="broken")
    assert (await first).chunk.token_ids == (7,)
    with pytest.raises(EngineError, match="broken"):
        await anext(stream)


async def test_a_prefill_failure_after_decode_began_is_ignored() -> None:
    world = World()
    prefill, decode = world.pair()
    task = await world.ask()
    world.engines.emit(prefill, 0, 7)
    world.engines.emit(decode, 1, 8)
    world.engines.lose(prefill)
    world.engines.emit(decode, 2, 9, finish=FinishReason.STOP)
    world.engines.end(decode)
    assert await task == [7, 8, 9]
    assert world.idle()


async def test_ended_without_a_last_token_fails_the_request_as_an_engine_error() -> None:
    world = World()
    worker = world.engines.join("u", role=Role.UNIFIED)
    task = await world.ask()
    world.engines.emit(worker, 0, 7)
    world.engines.end(worker)
    with pytest.raises(EngineError, match="before its last token arrived"):
        await task


async def test_a_request_that_its_worker_aborted_goes_on_elsewhere() -> None:
    world = World(policy="round_robin")
    first, second = world.engines.join("a", role=Role.UNIFIED), world.engines.join("b", role=Role.UNIFIED)
    task = await world.ask()
    world.engines.emit(first, 0, 7)
    world.engines.end(first, Outcome.ABORTED, message="gateway silent")
    assert world.engines.submits(second)[0].request.output_token_ids == (7,)
    world.engines.emit(second, 1, 8, finish=FinishReason.STOP)
    assert await task == [7, 8]


async def test_a_request_is_retried_when_its_worker_is_lost_after_scoring_the_prompt() -> None:
    world = World()
    first = world.engines.join("u", role=Role.UNIFIED)
    scored = SamplingParams(max_tokens=3, prompt_logprobs=0, prompt_logprobs_start=98)
    request = msgspec.structs.replace(make_request("r", PROMPT), sampling=scored)
    parts = asyncio.create_task(read_parts(world.dispatcher.generate(request)))
    await settle()
    score = TokenLogprobs(logprob=-1.0, rank=1)
    world.engines.emit_scores(first, 98, score)
    second = world.engines.join("v", role=Role.UNIFIED)
    world.engines.lose(first)
    await settle()
    world.engines.emit_scores(second, 98, score)
    world.engines.emit_scores(second, 99, score)
    world.engines.emit(second, 0, 7, 8, 9, finish=FinishReason.LENGTH)
    (part,) = await parts
    assert part.chunk.prompt_logprobs == (score, score)
    assert part.chunk.token_ids == (7, 8, 9)


async def test_a_request_refused_by_a_full_engine_is_retried_on_another() -> None:
    world = World(policy="round_robin")
    full, free = world.engines.join("a", role=Role.UNIFIED), world.engines.join("b", role=Role.UNIFIED)
    task = await world.ask()
    world.engines.end(full, Outcome.FAILED, error_code="overloaded", message="queue full")
    await settle()
    world.engines.emit(free, 0, 7, finish=FinishReason.STOP)
    assert await task == [7]


async def test_a_request_error_is_not_retried() -> None:
    world = World(policy="round_robin")
    first, second = world.engines.join("a", role=Role.UNIFIED), world.engines.join("b", role=Role.UNIFIED)
    task = await world.ask()
    world.engines.end(first, Outcome.FAILED, error_code="invalid_request", message="no")
    with pytest.raises(KvistError, match="no"):
        await task
    assert world.engines.submits(second) == []


async def test_an_unreachable_decode_worker_aborts_the_prefill_request() -> None:
    world = World(aggregate="never")
    prefill, decode = world.pair()
    world.engines.unreachable.add(decode)
    task = await world.ask()
    assert len(world.engines.aborts(prefill)) == 1
    await world.pass_time(5.0)
    with pytest.raises(WorkerLost, match="cannot be reached"):
        await task


# ---------------------------------------------------------------- missing and full workers


async def test_a_missing_role_is_named_with_the_command_that_starts_it() -> None:
    world = World()
    with pytest.raises(Unavailable, match="kvist serve"):
        await read_all(world.generate())
    old = world.engines.join("old", role=Role.PREFILL, writes_alone=False)
    with pytest.raises(Unavailable, match=r"no decode worker is ready.*--decode-only"):
        await read_all(world.generate(max_tokens=20))
    world.engines.lose(old)
    decode = world.engines.join("d", role=Role.DECODE)
    task = await world.ask()
    assert [submit.mode for submit in world.engines.submits(decode)] == [Mode.FULL], "decode serves it alone"
    assert world.dispatcher.snapshot().num_routes[Reason.NO_PREFILL] == 1
    task.cancel()


async def test_with_routing_aggregate_never_decode_does_not_serve_alone() -> None:
    world = RouterBench(RouterConfig(routing=RoutingOptions(aggregate="never")))
    prefill = world.engines.join("p", role=Role.PREFILL)
    world.engines.join("d", role=Role.DECODE)
    world.engines.lose(prefill)
    assert not world.dispatcher.ready()
    with pytest.raises(Unavailable, match=r"no prefill worker is ready.*p is lost \(it died\)"):
        await read_all(world.dispatcher.generate(make_request("r", (1, 2, 3), max_tokens=9)))


async def test_requests_with_one_prefix_at_once_go_to_the_worker_that_computes_it() -> None:
    world = RouterBench(RouterConfig(routing=RoutingOptions(policy="cost")))
    workers = [world.engines.join(name) for name in ("u1", "u2", "u3")]
    prefix = tuple(range(3000))
    tasks = [await world.begin(make_request(f"r{n}", (*prefix, n), max_tokens=20)) for n in range(20)]
    assert sorted(len(world.engines.submits(worker)) for worker in workers) == [0, 0, 20]
    (busy,) = (worker for worker in workers if worker.in_flight)
    assert busy.num_pending_tokens <= len(prefix) + 20 * 16
    first, *others = [submit.num_uncomputed_tokens for submit in world.engines.submits(busy)]
    assert first == len(prefix) + 1
    assert len(others) == 19
    assert all(number is not None and 1 <= number <= 16 for number in others)
    for task in tasks:
        task.cancel()


async def test_the_router_is_ready_with_a_pair_or_a_unified_worker() -> None:
    world = World(aggregate="never")
    assert not world.dispatcher.ready()
    world.engines.join("p", role=Role.PREFILL)
    assert not world.dispatcher.ready()
    decode = world.engines.join("d", role=Role.DECODE)
    assert world.dispatcher.ready()
    world.engines.lose(decode)
    assert not world.dispatcher.ready()
    world.engines.join("u", role=Role.UNIFIED)
    assert world.dispatcher.ready()
    assert world.dispatcher.model() is not None


@pytest.mark.parametrize("full_role", [Role.PREFILL, Role.DECODE])
async def test_full_workers_refuse_before_anything_is_sent(full_role: Role) -> None:
    world = World(retry_after_s=2.5)
    places = dict.fromkeys(Role, 1 << 16) | {full_role: 1}
    prefill, decode = (
        world.engines.join(role.value, role=role, max_running_requests=places[role], max_queued_requests=places[role])
        for role in (Role.PREFILL, Role.DECODE)
    )
    tasks = [await world.ask() for _ in range(2)]
    with pytest.raises(Overloaded) as caught:
        await read_all(world.generate())
    assert caught.value.retry_after_s == 1.0, "no request has ended yet"
    assert len(world.engines.submits(prefill)) == len(world.engines.submits(decode)) == 2
    world.engines.end(prefill)
    world.engines.end(decode)
    again = await world.ask()
    assert len(world.engines.submits(decode)) == 3
    for task in (*tasks, again):
        task.cancel()


async def test_a_full_unified_worker_refuses_before_anything_is_sent() -> None:
    world = World()
    worker = world.engines.join("u", role=Role.UNIFIED, max_running_requests=1, max_queued_requests=0)
    task = await world.ask()
    with pytest.raises(Overloaded):
        await read_all(world.generate())
    assert len(world.engines.submits(worker)) == 1
    task.cancel()


async def test_prompt_tokens_are_pending_at_prefill_until_the_first_token() -> None:
    world = World()
    prefill, decode = world.pair()
    task = await world.ask()
    assert (prefill.num_pending_tokens, decode.num_pending_tokens) == (len(PROMPT), 0)
    sent = [world.engines.submits(worker)[0].num_uncomputed_tokens for worker in (prefill, decode)]
    assert sent == [len(PROMPT), 0]
    world.engines.emit(prefill, 0, 7)
    assert prefill.num_pending_tokens == 0
    task.cancel()


async def test_a_unified_worker_serves_the_request_when_the_pair_is_incomplete() -> None:
    world = World()
    world.engines.join("p", role=Role.PREFILL)
    unified = world.engines.join("u", role=Role.UNIFIED)
    task = await world.ask()
    assert world.engines.submits(unified)[0].mode is Mode.FULL
    task.cancel()


async def test_a_unified_worker_named_for_prefill_is_paired() -> None:
    world = World()
    worker = world.engines.registry.add("http://u", Role.PREFILL, 0.0)
    world.engines.registry.on_welcome(worker, wire.Welcome(spec=make_roomy_spec(worker_id=WorkerId("u"))), 0.0)
    world.engines.join("d", role=Role.DECODE)
    task = await world.ask()
    assert world.engines.submits(worker)[0].mode is Mode.PREFILL
    task.cancel()


# ---------------------------------------------------------------- flush


async def test_flush_reaches_every_worker_and_returns_pages_by_worker() -> None:
    world = World()
    prefill, decode = world.pair()
    task = asyncio.create_task(world.dispatcher.ask_workers(wire.FlushCache(call_id="", tier="host"), wire.Flushed))
    await settle()
    for pages, worker in enumerate((prefill, decode)):
        (call,) = [m for to, m in world.engines.sent if to is worker and isinstance(m, wire.FlushCache)]
        assert call.tier == "host"
        world.dispatcher.on_answer(worker, wire.Flushed(call_id=call.call_id, num_pages=pages))
    assert {name: flushed.num_pages for name, flushed in (await task).items()} == {"p": 0, "d": 1}


async def test_a_worker_that_does_not_answer_a_flush_is_named() -> None:
    world = World(flush_timeout_s=0.01)
    prefill, _ = world.pair()
    task = asyncio.create_task(world.dispatcher.ask_workers(wire.FlushCache(call_id=""), wire.Flushed))
    asyncio.get_running_loop().call_soon(world.engines.lose, prefill)  # runs before any timer, even on a slow machine
    with pytest.raises(Timeout, match=r"^d did not answer"):
        await task
    with pytest.raises(Unavailable, match="no worker is ready"):
        await World().dispatcher.ask_workers(wire.FlushCache(call_id=""), wire.Flushed)


async def test_a_storage_command_returns_the_answer_or_error_of_every_worker() -> None:
    world = World()
    prefill, decode = world.pair()
    ask = wire.StorageCommand(call_id="", action="attach", store=wire.AttachStore(options={"size": 2.0}))
    task = asyncio.create_task(world.dispatcher.ask_workers(ask, wire.StorageAnswer))
    await settle()
    answers = []
    for worker in (prefill, decode):
        (call,) = [m for to, m in world.engines.sent if to is worker and isinstance(m, wire.StorageCommand)]
        assert (call.action, call.store) == (ask.action, ask.store)
        answers.append(wire.StorageAnswer(call_id=call.call_id, error_code="conflict", message=worker.worker_id))
        world.dispatcher.on_answer(worker, answers[-1])
        world.dispatcher.on_answer(worker, wire.StorageAnswer(call_id="another", message="late"))
    assert await task == {"p": answers[0], "d": answers[1]}


async def test_a_worker_that_does_not_answer_a_storage_command_is_named() -> None:
    world = World(storage_timeout_s=0.01)
    world.pair()
    with pytest.raises(Timeout, match="d, p did not answer"):
        await world.dispatcher.ask_workers(wire.StorageCommand(call_id="", action="status"), wire.StorageAnswer)


async def test_logprobs_that_wait_for_a_client_that_does_not_read_are_bounded() -> None:
    world = World()
    worker = world.engines.join("w", role=Role.UNIFIED)
    stream = world.generate(max_tokens=10_000)
    first = asyncio.create_task(anext(stream))
    await settle()
    logprobs = TokenLogprobs(logprob=-1.0, top_token_ids=tuple(range(20)), top_logprobs=(-1.0,) * 20)
    request_id = world.engines.submits(worker)[-1].request.request_id
    for position in range(0, 4000, 100):
        chunk = wire.TokenChunk(
            request_id=request_id, position=position, token_ids=(1,) * 100, logprobs=(logprobs,) * 100
        )
        world.engines.events.on_outputs(worker, wire.StepOutputs(chunks=(chunk,)))
        if position == 0:
            await first  # the reader reads no further part
    assert world.engines.aborts(worker) == [request_id]
    waited = await anext(stream)
    assert len(waited.chunk.token_ids) * 21 < MAX_WAITING_LOGPROBS + 100 * 21
    with pytest.raises(RequestError, match="Read faster"):
        await anext(stream)


async def test_the_page_digests_of_a_prompt_with_many_answers_are_computed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    worker = world.engines.join("w", role=Role.UNIFIED)
    world.engines.registry.index.store(worker.worker_id, "device", joined(b"some page"))
    num_digested = 0

    def count(digest: bytes, encoded: bytes, page_size: int) -> list[bytes]:
        nonlocal num_digested
        num_digested += 1
        return chained_digests(digest, encoded, page_size)

    monkeypatch.setattr(prompt_digests, "chained_digests", count)
    prompt = tuple(range(200))
    for _ in range(3):
        await world.ask(prompt=prompt)
    assert num_digested == 1
    await world.ask(prompt=prompt, cache_salt="s")
    assert num_digested == 2
