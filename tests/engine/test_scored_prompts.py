"""Logprobs of prompts equal those of a plain forward pass in fp32, whichever engines compute them, and how."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from kvist.models.decoder import CausalLM
from kvist.request import RequestId, Role
from kvist.testing.memory_cluster import MemoryCluster, Stream
from kvist.testing.specs import RequestFields
from tests.engine.conftest import request_of
from tests.runner.scoring import SCORED, assert_scores, plain_logprobs

ASKED: dict[str, Any] = {"prompt_logprobs": 3, "logprob_token_ids": SCORED.logprob_token_ids}


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    dice = random.Random(1000 * seed + length)
    return tuple(dice.randrange(3, 128) for _ in range(length))


def check(stream: Stream, model: CausalLM, token_ids: tuple[int, ...], start: int = 1) -> None:
    """Compare the scored positions with the plain forward pass."""
    assert list(stream.prompt_logprobs) == list(range(start, len(token_ids)))
    assert_scores(list(stream.prompt_logprobs.values()), plain_logprobs(model, token_ids), token_ids, 1e-4)


@pytest.mark.parametrize("length", [1, 2, 4, 5, 8, 9, 16, 33])
def test_one_engine_and_a_pair_score_a_prompt_alike(world: MemoryCluster, tiny_model: CausalLM, length: int) -> None:
    each = prompt(length)
    alone, prefill, decode = (world.start(role=role) for role in Role)
    whole = world.answer(alone, request_of("whole", each, **ASKED))
    check(whole, tiny_model, each)
    pair = world.submit_pair(prefill, decode, request_of("pair", each, **ASKED))
    world.run()
    check(pair, tiny_model, each)
    assert pair.token_ids == whole.token_ids == world.answer(alone, request_of("plain", each)).token_ids
    world.check_ledgers()


def test_a_cached_prompt_is_scored_as_a_new_one(world: MemoryCluster, tiny_model: CausalLM) -> None:
    each = prompt(33)
    alone, prefill, decode = (world.start(role=role, num_host_pages=16) for role in Role)
    world.answer(alone, request_of("before", each))
    world.submit_pair(prefill, decode, request_of("pair before", each))
    world.run()
    for start in (0, 1, 2, 17, 32):
        scored = {**ASKED, "prompt_logprobs_start": start}
        stream = world.answer(alone, request_of(f"from {start}", each, **scored))
        check(stream, tiny_model, each, max(1, start))
        assert stream.cached == max(0, start - 1) // 4 * 4
        pair = world.submit_pair(prefill, decode, request_of(f"pair from {start}", each, **scored))
        world.run()
        check(pair, tiny_model, each, max(1, start))


def test_concurrent_and_preempted_requests_are_scored_once(world: MemoryCluster, tiny_model: CausalLM) -> None:
    prompts = [prompt(length, seed=5) for length in (9, 12, 30, 33, 34)]
    small = world.start(num_pages=20)
    streams = [
        world.submit_full(small, request_of(str(number), each, **ASKED, max_tokens=20))
        for number, each in enumerate(prompts)
    ]
    world.run()
    assert small.scheduler.status().totals["preemptions"] > 0
    for stream, each in zip(streams, prompts, strict=True):
        check(stream, tiny_model, each)


def test_an_answer_that_another_engine_continues_is_not_scored_again(world: MemoryCluster) -> None:
    request = request_of("whole", prompt(10), **ASKED)
    whole = world.answer(world.start(), request)
    rest = msgspec.structs.replace(request, request_id=RequestId("rest"), output_token_ids=tuple(whole.token_ids[:5]))
    stream = world.submit_full(world.start(), rest)
    world.run()
    assert stream.prompt_logprobs == {}
    assert [*whole.token_ids[:5], *(stream.tokens[position] for position in sorted(stream.tokens))] == whole.token_ids


def test_named_tokens_have_logprobs_beside_every_sampled_token(world: MemoryCluster, tiny_model: CausalLM) -> None:
    each = prompt(9)
    fields: RequestFields = {"num_logprobs": 0, "logprob_token_ids": (9, 2)}
    alone, prefill, decode = (world.start(role=role) for role in Role)
    whole = world.answer(alone, request_of("whole", each, **fields))
    pair = world.submit_pair(prefill, decode, request_of("pair", each, **fields))
    world.run()
    expected = plain_logprobs(tiny_model, [*each, *whole.token_ids])
    for stream in (whole, pair):
        assert sorted(stream.logprobs) == list(range(12))
        for position, found in stream.logprobs.items():
            row = expected[len(each) + position - 1]
            assert found.requested_logprobs == pytest.approx([float(row[9]), float(row[2])], abs=1e-4)


@pytest.mark.parametrize("length", [1, 8, 33])
def test_max_tokens_0_computes_the_prompt_alone(world: MemoryCluster, tiny_model: CausalLM, length: int) -> None:
    each = prompt(length)
    for role in (Role.UNIFIED, Role.PREFILL):
        engine = world.start(role=role)
        stream = world.answer(engine, request_of(str(role), each, **ASKED, max_tokens=0))
        check(stream, tiny_model, each)
        assert stream.token_ids == []
        assert stream.finish is not None
        assert world.answer(engine, request_of(f"{role} again", each, max_tokens=0)).cached == (length - 1) // 4 * 4


def test_continuations_of_one_prompt_are_scored_exactly_over_its_pages(
    world: MemoryCluster, tiny_model: CausalLM
) -> None:
    shared = prompt(18, seed=7)
    rows = [(*shared, *prompt(length, seed=length)) for length in (1, 2, 7, 9)]
    engine = world.start(role=Role.PREFILL)
    asked: dict[str, Any] = {**ASKED, "max_tokens": 0, "prompt_logprobs_start": 18, "num_shared_tokens": 18}
    for turn in ("new", "cached"):
        before = engine.scheduler.status().totals["computed_prompt_tokens"]
        streams = [
            world.submit_full(engine, request_of(f"{turn} {number}", row, **asked)) for number, row in enumerate(rows)
        ]
        world.run()
        for stream, row in zip(streams, rows, strict=True):
            check(stream, tiny_model, row, 18)
        # pages have 4 tokens: each row computes the last 2 of the prompt again
        computed = engine.scheduler.status().totals["computed_prompt_tokens"] - before
        assert computed == 19 + 4 * 2 + (16 if turn == "new" else 0)
    assert engine.scheduler.status().pages.cached == 16 // 4
    world.check_ledgers()
