"""The gateway checks engine messages: a broken engine fails only its own requests."""

from __future__ import annotations

import asyncio
import math

import msgspec
import pytest

from kvist import wire
from kvist.errors import ConfigError, EngineError, Overloaded
from kvist.request import (
    FinishReason,
    Outcome,
    RequestId,
    SamplingParams,
    TokenLogprobs,
)
from kvist.router.config import RouterConfig
from kvist.router.registry import Registry, Worker
from kvist.testing.router_bench import RouterBench, settle
from kvist.testing.specs import make_load, make_request, make_spec

SPEC = make_spec()
REPORT = make_load(num_free_pages=4, totals={"steps": 1.0})


class World(RouterBench):
    """Two workers, and a gateway with a stream at each."""

    def __init__(self) -> None:
        super().__init__()
        self.workers = [self.engines.join(name, vocab_size=100) for name in ("a", "b")]

    async def stream(self, name: str) -> tuple[asyncio.Task[list[int]], Worker, RequestId]:
        task = await self.begin(make_request(name, max_tokens=3))
        worker, submit = self.engines.sent[-1]
        assert isinstance(submit, wire.Submit)
        return task, worker, submit.request.request_id


RIGHT = wire.TokenChunk(request_id=RequestId(""), position=0, token_ids=(7, 8, 9), finish_reason=FinishReason.LENGTH)
LOGPROBS = TokenLogprobs(logprob=-1.0, top_token_ids=(1,), top_logprobs=(-1.0,))


@pytest.mark.parametrize(
    "wrong",
    [
        {"position": -1},
        {"position": 1},  # beyond max_tokens
        {"position": 2**62},
        {"token_ids": (7, 8, 100)},
        {"token_ids": (7, -8, 9)},
        {"token_ids": (7, 8, 2**63)},
        {"token_ids": (7,) * 4},
        {"logprobs": (LOGPROBS,)},
        {"logprobs": (TokenLogprobs(logprob=-1.0, top_token_ids=(100,), top_logprobs=(-1.0,)),) * 3},
        {"logprobs": (TokenLogprobs(logprob=-1.0, top_token_ids=(1, 2), top_logprobs=(-1.0,)),) * 3},
    ],
)
async def test_an_impossible_chunk_fails_only_its_own_request(wrong: dict[str, object]) -> None:
    world = World()
    bad, worker, bad_id = await world.stream("bad")
    good, other, good_id = await world.stream("good")
    chunks = (
        msgspec.structs.replace(RIGHT, request_id=bad_id, **wrong),
        msgspec.structs.replace(RIGHT, request_id=RequestId("unknown"), **wrong),
    )
    world.dispatcher.on_outputs(worker, wire.StepOutputs(chunks=chunks))
    world.dispatcher.on_outputs(other, wire.StepOutputs(chunks=(msgspec.structs.replace(RIGHT, request_id=good_id),)))
    with pytest.raises(EngineError, match="this is a bug in the worker"):
        await bad
    assert await good == [7, 8, 9]
    assert (worker.num_rejected_messages, other.num_rejected_messages) == (1, 0)
    assert (worker, wire.Abort(request_id=bad_id)) in world.engines.sent


SCORE = TokenLogprobs(logprob=-1.0, rank=2, requested_logprobs=(-3.0,))
SCORES: dict[str, object] = {"prompt_position": 1, "prompt_logprobs": (SCORE,) * 2}  # of a prompt of four tokens
SCORED = SamplingParams(max_tokens=3, prompt_logprobs=0, logprob_token_ids=(5,))


@pytest.mark.parametrize(
    "wrong",
    [
        {**SCORES, "prompt_position": 0},
        {**SCORES, "prompt_position": 2},  # position 1 is missing
        {**SCORES, "prompt_logprobs": (SCORE,) * 4},  # beyond the prompt
        {**SCORES, "prompt_logprobs": (msgspec.structs.replace(SCORE, rank=None),)},
        {**SCORES, "prompt_logprobs": (msgspec.structs.replace(SCORE, requested_logprobs=()),)},
    ],
)
async def test_impossible_logprobs_of_a_prompt_fail_only_their_own_request(wrong: dict[str, object]) -> None:
    world = World()
    for fields, is_right in ((SCORES, True), (wrong, False)):
        request = msgspec.structs.replace(make_request("r", (1, 2, 3, 4)), sampling=SCORED)
        task = await world.begin(request)
        worker, submit = world.engines.sent[-1]
        assert isinstance(submit, wire.Submit)
        piece = msgspec.structs.replace(
            RIGHT, request_id=submit.request.request_id, token_ids=(), finish_reason=None, **fields
        )
        world.dispatcher.on_outputs(worker, wire.StepOutputs(chunks=(piece,)))
        assert worker.num_rejected_messages == (not is_right)
        if is_right:
            task.cancel()
        else:
            with pytest.raises(EngineError, match="this is a bug in the worker"):
                await task
        await settle()


async def test_logprobs_of_a_prompt_that_were_not_asked_for_fail_the_request() -> None:
    world = World()
    task, worker, request_id = await world.stream("r")
    piece = msgspec.structs.replace(RIGHT, request_id=request_id, token_ids=(), finish_reason=None, **SCORES)
    world.dispatcher.on_outputs(worker, wire.StepOutputs(chunks=(piece,)))
    with pytest.raises(EngineError, match="not asked for"):
        await task


async def test_chunks_of_a_request_that_runs_on_another_worker_are_ignored() -> None:
    world = World()
    task, worker, request_id = await world.stream("r")
    (other,) = set(world.workers) - {worker}
    stolen = msgspec.structs.replace(RIGHT, request_id=request_id, token_ids=(1, 1, 1))
    ended = wire.Ended(request_id=request_id, outcome=Outcome.FAILED, message="because")
    world.dispatcher.on_outputs(other, wire.StepOutputs(chunks=(stolen,), ended=(ended,)))
    world.dispatcher.on_outputs(
        worker, wire.StepOutputs(chunks=(msgspec.structs.replace(RIGHT, request_id=request_id),))
    )
    assert await task == [7, 8, 9]


@pytest.mark.parametrize(
    ("reported_s", "taken_s"), [(math.nan, 1.0), (math.inf, 1.0), (-5.0, 0.0), (1e300, 3600.0), (2.0, 2.0)]
)
async def test_retry_after_of_an_engine_is_limited_to_a_valid_header_value(reported_s: float, taken_s: float) -> None:
    world = World()
    task, worker, request_id = await world.stream("r")
    ended = wire.Ended(
        request_id=request_id, outcome=Outcome.FAILED, error_code="overloaded", message="full", retry_after_s=reported_s
    )
    world.dispatcher.on_outputs(worker, wire.StepOutputs(ended=(ended,)))
    await settle()
    other, retried = world.engines.sent[-1]  # the request is retried once, on another worker
    assert isinstance(retried, wire.Submit)
    again = msgspec.structs.replace(ended, request_id=retried.request.request_id)
    world.dispatcher.on_outputs(other, wire.StepOutputs(ended=(again,)))
    with pytest.raises(Overloaded) as caught:
        await task
    assert caught.value.retry_after_s == taken_s


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_free_pages": -1},
        {"num_running": -(2**63)},
        {"num_host_pages": {"free": -1}},
        {"totals": {"steps total": 1.0}},
        {"totals": {"": 1.0}},
        {"totals": {"x\n": 1.0}},
        {"totals": {f"t{number}": 1.0 for number in range(1000)}},
    ],
)
def test_an_impossible_load_report_is_dropped_and_counted(wrong: dict[str, object]) -> None:
    world = World()
    worker = world.workers[0]
    world.registry.on_report(worker, REPORT, 1.0)
    world.registry.on_report(worker, msgspec.structs.replace(REPORT, **wrong), 2.0)
    assert worker.load == REPORT
    assert worker.num_rejected_messages == 1


def test_page_events_with_more_digests_than_a_piece_are_not_decoded() -> None:
    digests = bytes(wire.DIGEST_BYTES * (wire.MAX_DIGESTS + 1))
    payload = wire.encode(wire.PageEvents(sequence=0, changes=(wire.TierChanges(tier="device", stored=digests),)))
    with pytest.raises(ConfigError, match="cannot decode"):
        wire.Decoder(wire.EngineToGateway).decode(payload)


@pytest.mark.parametrize(
    "changes",
    [(wire.TierChanges(tier="device", removed=b"x" * 17),), (wire.TierChanges(tier="host"),) * 20],
)
def test_impossible_page_events_are_dropped_and_counted(changes: tuple[wire.TierChanges, ...]) -> None:
    world = World()
    worker = world.workers[0]
    assert world.registry.on_page_events(worker, wire.PageEvents(sequence=0, changes=changes), 1.0) is None
    assert worker.num_rejected_messages == 1


@pytest.mark.parametrize("name", ["vocab_size", "max_model_len", "page_size", "num_pages", "tp_size"])
def test_an_engine_with_impossible_numbers_does_not_join(name: str) -> None:
    registry = Registry(RouterConfig())
    worker = registry.add("a", None, 0.0)
    spec = msgspec.structs.replace(SPEC, **{name: 0})
    with pytest.raises(ConfigError, match=f"reports a {name} of 0"):
        registry.on_welcome(worker, wire.Welcome(spec=spec), 0.0)
    assert registry.reference() is None
