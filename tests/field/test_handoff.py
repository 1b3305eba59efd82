"""Reports on handoffs and cancelled requests, each as a pair of engines in this process.

Wrong answers: vLLM #52234 (a stale reference gave the previous prompt's answer), SGLang #12157, #11648 and #30609 (a
pair answered otherwise than one engine), SGLang #30233 (prefill refused a long prompt, decode wrote garbage), SGLang
#40298 and vLLM #27449 (logprobs were missing), vllm-ascend #13165 (a failure of decode was an empty success). Pages and
requests that stayed: vLLM #46283 and #41269 (pages of a dead peer), SGLang #10613 and #8177 (cancelled requests).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvist.engine.loop import LIVENESS_INTERVAL_S
from kvist.errors import KvistError
from kvist.models.decoder import CausalLM
from kvist.request import Outcome, Role
from kvist.router.config import RouterConfig, RoutingOptions
from kvist.testing.memory_cluster import MemoryCluster, Stream
from kvist.testing.memory_engine import GATEWAY, MemoryEngine
from kvist.testing.router_bench import RouterBench, read_all
from kvist.testing.specs import RequestFields, make_request
from kvist.wire import FlushCache
from tests.engine.conftest import request_of, tiny_model, tiny_model_path

__all__ = ["tiny_model", "tiny_model_path"]
PAGE = 4
CANCELLED_WITHIN_S = 0.1


@pytest.fixture
def world(tiny_model: CausalLM, tmp_path: Path) -> Iterator[MemoryCluster]:
    made = MemoryCluster(tiny_model, tmp_path.resolve(), overlap=True)
    yield made
    made.close()


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    dice = random.Random(1000 * seed + length)
    return tuple(dice.randrange(3, 128) for _ in range(length))


def start_pair(world: MemoryCluster) -> tuple[MemoryEngine, MemoryEngine]:
    return world.start(role=Role.PREFILL), world.start(role=Role.DECODE)


def outcomes(stream: Stream) -> list[Outcome]:
    return [ended.outcome for ended in stream.ended]


# ---------------------------------------------------------------- answers


def test_vllm_52234_a_repeated_handoff_id_is_refused_and_other_ids_give_their_own_answers(world: MemoryCluster) -> None:
    alone = world.start()
    prefill, decode = start_pair(world)
    first = world.submit_pair(prefill, decode, request_of("same id", prompt(21)))
    world.run()
    assert outcomes(first) == [Outcome.FINISHED] * 2
    stale = world.submit_pair(prefill, decode, request_of("same id", prompt(21, seed=1)))
    world.run()
    assert (outcomes(stale), stale.tokens) == ([Outcome.FAILED] * 2, {})
    assert "was used before" in "".join(ended.message for ended in stale.ended)
    expected = world.answer(alone, request_of("alone", prompt(21, seed=1)))
    own = world.submit_pair(prefill, decode, request_of("own id", prompt(21, seed=1)))
    world.run()
    assert own.token_ids == expected.token_ids
    world.check_ledgers()


def test_vllm_52234_pages_of_another_prompt_are_computed_again(world: MemoryCluster) -> None:
    alone = world.start()
    prefill, decode = start_pair(world)
    expected = world.answer(alone, request_of("alone", prompt(21))).token_ids
    decode.change_next_arrival()
    stream = world.submit_pair(prefill, decode, request_of("pair", prompt(21)))
    world.run()
    assert stream.token_ids == expected
    assert stream.handoff is not None
    assert stream.handoff.num_pages_recomputed > 0
    world.check_ledgers()


def test_sglang_12157_11648_30609_a_pair_answers_as_one_engine_for_every_length_and_hit(world: MemoryCluster) -> None:
    alone = world.start()
    prefill, decode = start_pair(world)
    for length in (1, 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 4 * PAGE + 1, 33):
        sampled: RequestFields = {"temperature": 0.8, "seed": length}
        expected = world.answer(alone, request_of(f"alone {length}", prompt(length), **sampled)).token_ids
        for hits in ("none", "both", "decode", "prefill"):
            for engine, keeps in ((prefill, hits in ("both", "prefill")), (decode, hits in ("both", "decode"))):
                if not keeps:
                    engine.channel.waiting.append((GATEWAY, FlushCache(call_id="flush")))
            stream = world.submit_pair(prefill, decode, request_of(f"{length} {hits}", prompt(length), **sampled))
            world.run()
            assert stream.token_ids == expected, (length, hits)
    world.check_ledgers()


def test_sglang_40298_vllm_27449_a_pair_reports_the_logprobs_of_the_prompt_and_of_each_token(
    world: MemoryCluster,
) -> None:
    alone = world.start()
    prefill, decode = start_pair(world)
    asked: RequestFields = {"prompt_logprobs": 2, "num_logprobs": 2}
    whole = world.answer(alone, request_of("alone", prompt(19), **asked))
    pair = world.submit_pair(prefill, decode, request_of("pair", prompt(19), **asked))
    world.run()
    assert sorted(pair.prompt_logprobs) == list(range(1, 19))
    assert sorted(pair.logprobs) == list(range(len(whole.token_ids))), "the first token comes from prefill"
    for found, expected in ((pair.prompt_logprobs, whole.prompt_logprobs), (pair.logprobs, whole.logprobs)):
        assert found.keys() == expected.keys()
        for position, entry in expected.items():
            assert found[position].logprob == pytest.approx(entry.logprob, abs=1e-4)


def test_sglang_30233_a_prompt_too_long_for_prefill_is_an_error_of_the_client_at_both_engines(
    world: MemoryCluster,
) -> None:
    prefill, decode = world.start(role=Role.PREFILL, num_pages=8), world.start(role=Role.DECODE)
    stream = world.submit_pair(prefill, decode, request_of("long", prompt(50)))
    world.run()
    assert outcomes(stream) == [Outcome.FAILED] * 2
    assert {ended.error_code for ended in stream.ended} == {"context_length_exceeded"}
    assert not stream.tokens
    world.check_ledgers()


@pytest.mark.parametrize(("aggregate", "decode_len"), [("never", 1000), ("auto", 150)])
async def test_sglang_30233_a_prompt_that_no_worker_holds_is_refused_with_400(aggregate: str, decode_len: int) -> None:
    """Without aggregation it is enough that no prefill worker holds the prompt."""
    bench = RouterBench(RouterConfig(routing=RoutingOptions(aggregate=aggregate)))
    bench.engines.join("p", role=Role.PREFILL, max_model_len=100)
    bench.engines.join("d", role=Role.DECODE, max_model_len=decode_len)
    with pytest.raises(KvistError) as caught:
        await read_all(bench.dispatcher.generate(make_request("long", prompt(200))))
    assert (caught.value.http_status, bench.engines.sent) == (400, [])


@pytest.mark.parametrize("after_tokens", [0, 1])
async def test_vllm_ascend_13165_a_failure_of_decode_is_an_error_and_no_empty_answer(after_tokens: int) -> None:
    bench = RouterBench()
    prefill, decode = bench.engines.join("p", role=Role.PREFILL), bench.engines.join("d", role=Role.DECODE)
    answer = await bench.begin(make_request("r", prompt(200)))
    if after_tokens:
        bench.engines.emit(prefill, 0, 7)
    bench.engines.end(decode, Outcome.FAILED, error_code="engine_error", message="the device is on fire")
    with pytest.raises(KvistError) as caught:
        await answer
    assert caught.value.http_status >= 500
    assert bench.engines.aborts(prefill), "nothing computes for nobody"


# ---------------------------------------------------------------- pages and requests that stay


@pytest.mark.parametrize("victim", ["prefill", "decode"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 6])
def test_vllm_46283_41269_pages_are_reclaimed_within_a_second_of_the_death_of_a_peer(
    world: MemoryCluster, victim: str, num_steps: int
) -> None:
    prefill, decode = start_pair(world)
    stream = world.submit_pair(prefill, decode, request_of("r", prompt(60)))
    for _ in range(num_steps):
        world.step()
    dead, left = (prefill, decode) if victim == "prefill" else (decode, prefill)
    world.kill(dead)
    died_s = world.clock.now_s()
    world.run()
    assert world.clock.now_s() - died_s < LIVENESS_INTERVAL_S + 0.1, "the notice comes with the next look at the peers"
    assert not stream.waits_for
    pages = left.scheduler.status().pages
    assert (pages.owned, pages.in_flight) == (0, 0)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 4, 5, 6, 8])
def test_sglang_10613_8177_a_cancelled_request_leaves_every_stage_within_100_ms(
    world: MemoryCluster, num_steps: int
) -> None:
    prefill, decode = start_pair(world)
    streams = [
        world.submit_pair(prefill, decode, request_of(f"r{number}", prompt(60, number), max_tokens=60))
        for number in range(6)  # more than run at once: some wait in the queue
    ]
    for _ in range(num_steps):
        world.step()
    for number in range(6):
        world.abort(f"r{number}")
    cancelled_s = world.clock.now_s()
    world.run()
    assert world.clock.now_s() - cancelled_s < CANCELLED_WITHIN_S
    assert all(set(outcomes(stream)) <= {Outcome.ABORTED, Outcome.FINISHED} for stream in streams)
    for engine in (prefill, decode):
        status = engine.scheduler.status()
        assert (status.num_running, status.num_waiting) == (0, 0)
    world.check_ledgers()
