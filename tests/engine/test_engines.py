"""Answers do not depend on the engines that compute them: real schedulers, runner, pools and shared-memory transport.

The model is a tiny one in fp32. A stream is a function of prompt, parameters, seed and position; therefore every way to
compute it must give the same tokens.
"""

from __future__ import annotations

import random

import msgspec
import pytest

from kvist.request import Constraint, FinishReason, Outcome, RequestId, Role
from kvist.testing.memory_cluster import MemoryCluster
from kvist.testing.memory_engine import MemoryEngine
from kvist.testing.specs import RequestFields
from tests.budget import budget
from tests.engine.conftest import request_of

GREEDY: RequestFields = {"temperature": 0.0}
SEEDED: RequestFields = {"temperature": 1.3, "top_k": 50, "top_p": 0.95, "min_p": 0.001, "seed": 12345}
SHAPED: RequestFields = {
    "temperature": 0.7,
    "seed": 5,
    "top_p": 0.9,
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.4,
    "presence_penalty": 0.3,
    "logit_bias": ((3, 2.0), (4, 2.0), (5, -3.0)),
    "allowed_token_ids": tuple(range(2, 40)),
    "bad_words": ((7,), (3, 4), (4, 3), (4, 4)),
}
# With a bad word that is longer than the runner's tables hold, each token must be known before the next is chosen.
LONG_WORD: RequestFields = {
    "temperature": 0.0,
    "logit_bias": ((3, 4.0), (4, 3.9)),
    "bad_words": ((3,) * 9, (3, 4), (4, 4)),
}
# Each token must be known, and the matcher follows the whole answer, which it does not allow to end.
CONSTRAINED: RequestFields = {
    "temperature": 1.4,
    "seed": 7,
    "repetition_penalty": 1.1,
    "bad_words": ((67, 16), (68,)),  # d1, e
    "constraint": Constraint(kind="regex", text="([a-f][0-9]|[x-z]{2,3}!){40,}"),
}
# Most tokens are forced by the ones before.
FORCED: RequestFields = {
    "temperature": 1.2,
    "seed": 9,
    "constraint": Constraint(kind="regex", text="(name=[a-f]{1,3};|count:[0-9]{2}!){60,}"),
}
SAMPLING = pytest.mark.parametrize(
    "sampling",
    [GREEDY, SEEDED, SHAPED, LONG_WORD, CONSTRAINED, FORCED],
    ids=["greedy", "seeded", "shaped", "long word", "constrained", "forced"],
)
# page size 4, prompt chunks of 8: lengths on both sides of each edge
LENGTHS = (1, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 32, 33)[:: budget(3, long=1)]


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    draw = random.Random(1000 * seed + length)
    return tuple(draw.randrange(3, 128) for _ in range(length))


_answers_alone: dict[tuple[str, tuple[int, ...]], list[int]] = {}  # by sampling and prompt; the same in all tests


def expected(world: MemoryCluster, sampling: RequestFields, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    """Answer each prompt alone, in a fresh engine, unless another test has done so."""
    answers = []
    for number, each in enumerate(prompts):
        key = repr(sorted(sampling.items())), each
        if key not in _answers_alone:
            alone = world.start(overlap=False)
            _answers_alone[key] = world.answer(alone, request_of(f"alone-{number}", each, **sampling)).token_ids
            world.kill(alone)
        answers.append(_answers_alone[key])
    return answers


@SAMPLING
def test_separate_prefill_and_decode_give_the_tokens_of_one_engine(
    world: MemoryCluster, sampling: RequestFields
) -> None:
    prompts = [prompt(length) for length in LENGTHS]
    answers = expected(world, sampling, prompts)
    prefill, decode = world.start(role=Role.PREFILL, num_pages=256), world.start(role=Role.DECODE, num_pages=256)
    for number, each in enumerate(prompts):
        stream = world.submit_pair(prefill, decode, request_of(f"pair-{number}", each, **sampling))
        world.run()
        assert stream.token_ids == answers[number], f"prompt of {len(each)} tokens"
        assert [ended.outcome for ended in stream.ended] == [Outcome.FINISHED] * 2
        assert stream.finish is FinishReason.LENGTH
        assert stream.handoff is not None
        assert stream.handoff.num_pages + stream.handoff.num_pages_reused == -(-len(each) // 4)
    world.check_ledgers()


@SAMPLING
def test_concurrent_requests_get_the_tokens_of_each_alone(world: MemoryCluster, sampling: RequestFields) -> None:
    prompts = [prompt(length, seed=1) for length in LENGTHS]
    answers = expected(world, sampling, prompts)
    unified = world.start(num_pages=256)
    prefill, decode = world.start(role=Role.PREFILL, num_pages=256), world.start(role=Role.DECODE, num_pages=256)
    streams = []
    for number, each in enumerate(prompts):
        streams.append(world.submit_full(unified, request_of(f"full-{number}", each, **sampling)))
        streams.append(world.submit_pair(prefill, decode, request_of(f"pair-{number}", each, **sampling)))
        if number % 3 == 0:
            world.step()
    world.run()
    for number, stream in enumerate(streams):
        assert stream.token_ids == answers[number // 2]
    world.check_ledgers()


@SAMPLING
def test_a_prompt_found_in_the_cache_gives_the_same_tokens(world: MemoryCluster, sampling: RequestFields) -> None:
    prefill, decode = world.start(role=Role.PREFILL, num_pages=256), world.start(role=Role.DECODE, num_pages=256)
    unified = world.start(num_pages=256)
    for length in (5, 8, 9, 17, 33)[1 :: budget(2, long=1)]:
        each = prompt(length, seed=2)
        cold = world.answer(unified, request_of(f"cold-{length}", each, **sampling))
        warm = world.answer(unified, request_of(f"warm-{length}", each, **sampling))
        assert cold.cached == 0
        assert warm.cached == (length - 1) // 4 * 4
        assert warm.token_ids == cold.token_ids
        for turn in ("first", "second"):
            stream = world.submit_pair(prefill, decode, request_of(f"{turn}-{length}", each, **sampling))
            world.run()
            assert stream.token_ids == cold.token_ids
        assert stream.handoff is not None
        assert stream.handoff.num_pages_reused >= (length - 1) // 4
    world.check_ledgers()


@SAMPLING
def test_a_second_turn_transfers_only_the_pages_that_decode_lacks(
    world: MemoryCluster, sampling: RequestFields
) -> None:
    prefill, decode = world.start(role=Role.PREFILL), world.start(role=Role.DECODE)
    first_prompt = prompt(18, seed=3)
    first = world.submit_pair(prefill, decode, request_of("one", first_prompt, **sampling))
    world.run()
    second_prompt = first_prompt + tuple(first.token_ids) + prompt(7, seed=4)
    second = world.submit_pair(prefill, decode, request_of("two", second_prompt, **sampling))
    world.run()
    [answer] = expected(world, sampling, [second_prompt])
    assert second.token_ids == answer
    assert second.handoff is not None
    # decode wrote the K/V of prompt and answer except the last token: (18 + 11) // 4 pages
    # The forced tokens that end an answer have no K/V.
    num_reused = 6 if sampling is FORCED else 7
    assert second.handoff.num_pages_reused == num_reused
    assert second.handoff.num_pages == -(-len(second_prompt) // 4) - num_reused
    world.check_ledgers()


@SAMPLING
@pytest.mark.parametrize("apart", [False, True], ids=["unified", "apart"])
def test_preempted_requests_resume_with_the_same_tokens(
    world: MemoryCluster, sampling: RequestFields, apart: bool
) -> None:
    sampling = {**sampling, "max_tokens": 16}
    prompts = [prompt(length, seed=5) for length in (9, 12, 14, 17, 20)]
    answers = expected(world, sampling, prompts)
    if apart:
        prefill, small = world.start(role=Role.PREFILL, num_pages=64), world.start(role=Role.DECODE, num_pages=20)
        streams = [
            world.submit_pair(prefill, small, request_of(f"r{number}", each, **sampling))
            for number, each in enumerate(prompts)
        ]
    else:
        small = world.start(num_pages=16)
        streams = [
            world.submit_full(small, request_of(f"r{number}", each, **sampling)) for number, each in enumerate(prompts)
        ]
    world.run()
    assert small.scheduler.status().totals["preemptions"] > 0, "the pool was large enough: this tests nothing"
    assert [stream.token_ids for stream in streams] == answers
    world.check_ledgers()


def test_a_request_whose_bans_leave_no_token_fails_alone(world: MemoryCluster) -> None:
    """The second token may be neither 5, which would complete a bad word, nor any other token."""
    engine = world.start()
    stuck = request_of("stuck", prompt(6), temperature=0.0, allowed_token_ids=(5,), bad_words=((5, 5),))
    streams = [world.submit_full(engine, each) for each in (stuck, request_of("free", prompt(9), **GREEDY))]
    world.run()
    assert streams[0].token_ids == [5]
    assert [(ended.outcome, ended.error_code) for ended in streams[0].ended] == [(Outcome.FAILED, "invalid_request")]
    assert "`bad_words`" in streams[0].ended[0].message
    assert [ended.outcome for ended in streams[1].ended] == [Outcome.FINISHED]
    world.check_ledgers()


@SAMPLING
def test_a_stream_resumes_in_a_fresh_engine_from_any_token(world: MemoryCluster, sampling: RequestFields) -> None:
    request = request_of("whole", prompt(10, seed=6), **sampling)
    whole = world.answer(world.start(), request).token_ids
    for num_known in range(1, len(whole), budget(3, long=1)):
        fresh = world.start()
        rest = msgspec.structs.replace(
            request, request_id=RequestId(f"rest-{num_known}"), output_token_ids=tuple(whole[:num_known])
        )
        stream = world.answer(fresh, rest)
        assert sorted(stream.tokens) == list(range(num_known, len(whole)))
        assert [stream.tokens[position] for position in range(num_known, len(whole))] == whole[num_known:]
        world.kill(fresh)


def test_a_stream_resumes_on_a_prefill_and_decode_pair_from_any_token(world: MemoryCluster) -> None:
    request = request_of("whole", prompt(10, seed=6), **SEEDED)
    whole = world.answer(world.start(), request).token_ids
    prefill, decode = world.start(role=Role.PREFILL), world.start(role=Role.DECODE)
    for num_known in (1, 2, 5, 6, 7, 11):
        rest = msgspec.structs.replace(
            request, request_id=RequestId(f"rest-{num_known}"), output_token_ids=tuple(whole[:num_known])
        )
        stream = world.submit_pair(prefill, decode, rest)
        world.run()
        assert sorted(stream.tokens) == list(range(num_known, len(whole)))
        assert [stream.tokens[position] for position in range(num_known, len(whole))] == whole[num_known:]
    world.check_ledgers()


def test_logprobs_do_not_depend_on_how_the_work_was_split(world: MemoryCluster) -> None:
    prefill, decode, unified = world.start(role=Role.PREFILL), world.start(role=Role.DECODE), world.start()
    sampling: RequestFields = {**SEEDED, "num_logprobs": 3}
    for length in (3, 8, 13, 21):
        one = world.answer(unified, request_of(f"one-{length}", prompt(length, seed=7), **sampling))
        two = world.submit_pair(prefill, decode, request_of(f"two-{length}", prompt(length, seed=7), **sampling))
        world.run()
        assert sorted(one.logprobs) == sorted(two.logprobs) == list(range(12))
        for position, mine in one.logprobs.items():
            other = two.logprobs[position]
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert mine.top_token_ids == other.top_token_ids
            assert mine.top_logprobs == pytest.approx(other.top_logprobs, abs=1e-4)


def test_an_answer_of_one_token_needs_no_decode_step(world: MemoryCluster) -> None:
    prefill, decode, unified = world.start(role=Role.PREFILL), world.start(role=Role.DECODE), world.start()
    one = world.answer(unified, request_of("one", prompt(9), max_tokens=1))
    two = world.submit_pair(prefill, decode, request_of("two", prompt(9), max_tokens=1))
    world.run()
    assert two.token_ids == one.token_ids
    assert two.finish is FinishReason.LENGTH
    assert [ended.outcome for ended in two.ended] == [Outcome.FINISHED] * 2
    assert decode.scheduler.status().totals["steps"] == 0
    world.check_ledgers()


def test_stop_tokens_end_unified_and_split_requests_at_the_same_token(world: MemoryCluster) -> None:
    prefill, decode, unified = world.start(role=Role.PREFILL), world.start(role=Role.DECODE), world.start()
    free = world.answer(unified, request_of("free", prompt(9, seed=8), **SEEDED)).token_ids
    for position in (0, 3, 11):
        sampling: RequestFields = {**SEEDED, "stop_token_ids": (free[position],), "ignore_eos": False}
        one = world.answer(unified, request_of(f"one-{position}", prompt(9, seed=8), **sampling))
        two = world.submit_pair(prefill, decode, request_of(f"two-{position}", prompt(9, seed=8), **sampling))
        world.run()
        assert one.token_ids == two.token_ids
        assert one.finish is two.finish is FinishReason.STOP
    world.check_ledgers()


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_engines_that_die_and_restart_leave_no_page_held_at_their_peers(world: MemoryCluster, role: Role) -> None:
    draw = random.Random(role.value)
    pair = {
        Role.PREFILL: world.start(role=Role.PREFILL, num_pages=40),
        Role.DECODE: world.start(role=Role.DECODE, num_pages=40),
    }
    for number in range(24):
        request = request_of(
            f"r{number}", prompt(draw.randrange(20, 60), seed=number), max_tokens=draw.randrange(1, 20)
        )
        world.submit_pair(pair[Role.PREFILL], pair[Role.DECODE], request)
        for _ in range(draw.randrange(8)):
            world.step()
        if number % 6 == 5:
            world.kill(pair[role])
            pair[role] = world.start(role=role, num_pages=40)
            world.clock.advance(draw.choice((0.0, 1.0)))
    last = world.submit_pair(pair[Role.PREFILL], pair[Role.DECODE], request_of("last", prompt(30), max_tokens=5))
    world.clock.advance(1.0)
    world.run(step_s=0.02)  # the survivors wait for messages of the dead engine
    assert [ended.outcome for ended in last.ended] == [Outcome.FINISHED] * 2
    outcomes = {ended.outcome for stream in world.streams.values() for ended in stream.ended}
    assert outcomes == {Outcome.FINISHED, Outcome.FAILED}
    world.check_ledgers()


@pytest.mark.parametrize("seed", range(budget(2, long=20)))
def test_aborts_at_any_moment_end_each_request_once_and_leak_no_page(world: MemoryCluster, seed: int) -> None:
    draw = random.Random(seed)
    prefill, decode = world.start(role=Role.PREFILL, num_pages=40), world.start(role=Role.DECODE, num_pages=40)
    unified = world.start(num_pages=40)
    open_ids: list[str] = []
    for number in range(30):
        request = request_of(
            f"r{number}", prompt(draw.randrange(1, 60), seed=number % 4), max_tokens=draw.randrange(1, 20)
        )
        if draw.random() < 0.7:
            world.submit_pair(prefill, decode, request)
        else:
            world.submit_full(unified, request)
        open_ids.append(request.request_id)
        for _ in range(draw.randrange(6)):
            world.step()
        if open_ids and draw.random() < 0.6:
            world.abort(open_ids.pop(draw.randrange(len(open_ids))))
    world.run()
    for request_id, stream in world.streams.items():
        assert len(stream.ended) == stream.num_submits, request_id
        assert all(ended.outcome is not Outcome.FAILED for ended in stream.ended), stream.ended
    world.check_ledgers()


def test_a_prefill_engine_that_dies_fails_its_handoffs_and_frees_their_pages(world: MemoryCluster) -> None:
    prefill, decode = world.start(role=Role.PREFILL), world.start(role=Role.DECODE)
    stream = world.submit_pair(prefill, decode, request_of("r", prompt(60)))
    world.step_until(lambda: decode.scheduler.status().pages.in_flight)
    world.kill(prefill)
    world.clock.advance(1.0)
    world.run()
    assert [(ended.outcome, ended.error_code) for ended in stream.ended] in (
        [(Outcome.FAILED, "worker_lost")],
        [(Outcome.FAILED, "handoff_failed")],
    )
    world.check_ledgers()


def test_a_decode_engine_that_dies_leaves_prefill_without_held_pages(world: MemoryCluster) -> None:
    prefill, decode = world.start(role=Role.PREFILL), world.start(role=Role.DECODE)
    world.submit_pair(prefill, decode, request_of("r", prompt(60)))
    world.step_until(lambda: decode.scheduler.status().pages.in_flight)
    world.step()
    world.kill(decode)
    world.clock.advance(1.0)
    world.run()
    world.check_ledgers()


def fill(world: MemoryCluster, engine: MemoryEngine, seed: int) -> None:
    """Evict all pages from the device pool by other requests."""
    for number in range(2):
        each = prompt(44, 10 * seed + number)
        world.answer(engine, request_of(f"{engine.channel.epoch}-fill-{seed}-{number}", each, max_tokens=1))


@SAMPLING
def test_pages_from_the_host_tier_give_the_tokens_of_recomputing(world: MemoryCluster, sampling: RequestFields) -> None:
    prompts = [prompt(length, seed=4) for length in (8, 17, 32, 33)]
    answers = expected(world, sampling, prompts)
    engine = world.start(num_pages=16, num_host_pages=400)
    num_turns = budget(2, long=3)
    for turn in range(num_turns):
        for number, each in enumerate(prompts):
            stream = world.answer(engine, request_of(f"{turn}-{number}", each, **sampling))
            assert stream.token_ids == answers[number], f"prompt of {len(each)} tokens, turn {turn}"
            assert stream.cached == (0 if turn == 0 else (len(each) - 1) // 4 * 4)
        fill(world, engine, seed=20 + turn)
    world.check_ledgers()
    assert engine.scheduler.status().totals["host_loaded_pages"] == (num_turns - 1) * (1 + 4 + 7 + 8)


@SAMPLING
def test_a_pair_whose_pages_come_from_both_host_tiers_gives_the_same_tokens(
    world: MemoryCluster, sampling: RequestFields
) -> None:
    prompts = [prompt(length, seed=5) for length in (8, 17, 32, 33)]
    answers = expected(world, sampling, prompts)
    prefill = world.start(role=Role.PREFILL, num_pages=16, num_host_pages=400)
    decode = world.start(role=Role.DECODE, num_pages=16, num_host_pages=400)
    for turn in range(2):
        for number, each in enumerate([*prompts, prompt(44, seed=30 + turn)]):
            stream = world.submit_pair(prefill, decode, request_of(f"{turn}-{number}", each, **sampling))
            world.run()
            if number < len(prompts):
                assert stream.token_ids == answers[number], f"prompt of {len(each)} tokens, turn {turn}"
    world.check_ledgers()
    for engine in (prefill, decode):
        assert engine.scheduler.status().totals["host_loaded_pages"] >= 8
