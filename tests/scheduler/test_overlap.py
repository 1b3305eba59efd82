"""Planning a step while one is pending: tokens known in advance, late stops, and pages that are kept."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import pytest

from kvist.plan.batch import Batch
from kvist.plan.events import SampledTokens, StepFailed, StepFinished
from kvist.plan.plan import Plan
from kvist.request import EngineRequest, FinishReason, Outcome, Role
from kvist.simulation.cluster import SimCluster, sim_request
from kvist.simulation.device import EOS
from kvist.simulation.engine import small_config
from kvist.testing.specs import submit_full
from kvist.wire import Abort, Submit
from tests.scheduler.handoff_bench import Bench, ends


def overlapped(**config: Any) -> Bench:
    return Bench(Role.UNIFIED, overlap=True, **config)


def arrived(request: EngineRequest) -> Submit:
    return submit_full(request)


def finish(bench: Bench, batch: Batch, token_id: int = 5) -> Plan:
    sampled = SampledTokens(token_ids=[token_id for item in batch.items if item.samples])
    return bench.step(StepFinished(step_id=batch.step_id, sampled=sampled))


def begin(bench: Bench, *requests: EngineRequest) -> Batch:
    batch = bench.step(*map(arrived, requests)).batch
    assert batch is not None
    return batch


def follow(bench: Bench) -> Batch:
    """Plan the next batch while one is pending."""
    batch = bench.step().batch
    assert batch is not None
    return batch


def test_the_next_step_takes_the_token_that_the_pending_step_samples() -> None:
    bench = overlapped()
    first = begin(bench, sim_request("a", [1, 2, 3]))
    second = follow(bench)
    (item,) = second.items
    assert item.takes_sampled
    assert (item.token_ids, item.start, item.end) == ((), 3, 4)
    plan = finish(bench, first)
    assert [chunk.token_ids for chunk in plan.chunks] == [(5,)]
    assert plan.batch is not None
    assert plan.batch.items[0].takes_sampled
    assert plan.batch.items[0].start == 4


def test_without_overlap_the_next_step_is_planned_with_a_known_token() -> None:
    bench = Bench(Role.UNIFIED)
    first = begin(bench, sim_request("a", [1, 2, 3]))
    assert bench.step().batch is None
    plan = finish(bench, first)
    assert plan.batch is not None
    assert (plan.batch.items[0].token_ids, plan.batch.items[0].takes_sampled) == ((5,), False)


def test_at_most_two_steps_are_pending() -> None:
    bench = overlapped()
    begin(bench, sim_request("a", [1, 2, 3]))
    follow(bench)
    assert bench.step().batch is None


def test_the_second_chunk_of_a_prompt_is_planned_while_its_first_is_pending() -> None:
    bench = overlapped()
    first = begin(bench, sim_request("a", list(range(9))))
    second = follow(bench)
    assert [(item.start, item.end, item.samples) for item in first.items] == [(0, 6, False)]
    assert [(item.start, item.end, item.samples) for item in second.items] == [(6, 9, True)]


def test_a_request_whose_last_token_is_pending_is_not_planned_again() -> None:
    bench = overlapped()
    first = begin(bench, sim_request("a", [1, 2, 3], max_tokens=2))
    second = follow(bench)
    assert bench.step().batch is None
    assert finish(bench, first).batch is None
    plan = finish(bench, second)
    assert plan.chunks[0].finish_reason is FinishReason.LENGTH
    assert ends(plan) == [(Outcome.FINISHED, None)]
    assert bench.busy_pages == 0


def test_a_stop_token_is_noticed_one_step_late_and_the_token_after_it_is_dropped() -> None:
    bench = overlapped()
    first = begin(bench, sim_request("a", [1, 2, 3]))
    second = follow(bench)
    plan = finish(bench, first, token_id=EOS)
    assert [chunk.finish_reason for chunk in plan.chunks] == [FinishReason.STOP]
    assert ends(plan) == [(Outcome.FINISHED, None)]
    assert bench.busy_pages == 1, "the pending step still writes its page"
    plan = finish(bench, second)
    assert (plan.chunks, plan.ended) == ((), ())
    assert bench.busy_pages == 0
    assert bench.scheduler.status().totals["generation_tokens"] == 1


def test_min_tokens_counts_tokens_of_pending_steps() -> None:
    bench = overlapped()
    first = begin(bench, sim_request("a", [1, 2, 3], min_tokens=2))
    second = follow(bench)
    third = finish(bench, first).batch
    assert third is not None
    (start,) = first.started
    assert (start.suppressed_token_ids, start.suppress_until) == ((EOS,), 5)
    assert [batch.items[0].end for batch in (first, second, third)] == [3, 4, 5]


def test_pages_of_an_aborted_request_are_kept_until_both_steps_finish() -> None:
    bench = overlapped()
    first = begin(bench, sim_request("a", [1, 2, 3]))
    second = follow(bench)
    assert ends(bench.step(Abort(request_id=first.started[0].request_id))) == [(Outcome.ABORTED, None)]
    finish(bench, first)
    assert bench.busy_pages == 1
    finish(bench, second)
    assert bench.busy_pages == 0


def test_a_failed_step_fails_its_requests_and_the_next_report_frees_their_pages() -> None:
    bench = overlapped()
    first = begin(bench, sim_request("a", [1, 2, 3]))
    second = follow(bench)
    plan = bench.step(StepFailed(step_id=first.step_id, message="no"))
    assert ends(plan) == [(Outcome.FAILED, "step_failed")]
    assert bench.busy_pages == 1
    finish(bench, second)
    assert bench.busy_pages == 0


def test_a_victim_in_a_pending_step_skips_one_step_and_is_preempted_in_the_next() -> None:
    bench = overlapped(num_pages=4, max_running_requests=2)
    older = sim_request("a", [1, 2, 3, 4, 5, 6], max_tokens=9, ignore_eos=True)
    younger = sim_request("b", [2, 3, 4, 5], max_tokens=9, ignore_eos=True)
    under_way = deque([begin(bench, older), begin(bench, younger)])
    seen: list[list[str]] = []
    while not bench.scheduler.status().totals["preemptions"]:
        batch = finish(bench, under_way.popleft()).batch
        seen.append(list(map(str, bench.running)) if batch is not None else [])
        under_way.extend([batch] if batch is not None else [])
    assert ["a", "b"] in seen
    assert seen[-2:] == [[], ["a"]], "both wait while a step still writes the victim's pages; then the oldest continues"


@pytest.mark.parametrize("seed", range(12))
def test_overlap_changes_no_stream(seed: int) -> None:
    streams = []
    for overlap in (False, True):
        rng = random.Random(seed)
        world = SimCluster()
        config = small_config(max_queued_requests=20, overlap=overlap)
        engine = world.start("u", role=Role.UNIFIED, config=config, num_pages=rng.randint(7, 14))
        for index in range(12):
            prompt = [rng.randint(0, 2) for _ in range(rng.randint(1, 20))]
            request = sim_request(f"r{index}", prompt, max_tokens=rng.randint(1, 12), seed=index)
            world.submit(request, engine)
        world.settle()
        world.check_settled()
        streams.append({name: world.stream(name) for name in world.submitted})
    assert streams[0] == streams[1]


def test_the_step_after_a_row_of_several_tokens_computes_those_that_no_pending_step_computes() -> None:
    world = SimCluster()
    engine = world.start("u", role=Role.UNIFIED, config=small_config(overlap=True), row_tokens=7)
    engine.events.append(arrived(sim_request("r", [1, 2, 3], seed=2, max_tokens=30, ignore_eos=True)))
    tokens, end, num_chunks = [1, 2, 3], 0, 0
    while engine.scheduler.has_work() or engine.events:
        if len(engine.under_way) == 2 or engine.plan.batch is None:
            engine.finish_step()
        plan = engine.step()
        tokens += [token_id for chunk in plan.chunks for token_id in chunk.token_ids]
        if plan.batch is not None:
            [item] = plan.batch.items
            assert item.start == end, "each position is computed once"
            assert item.takes_sampled == (end == len(tokens))
            assert list(item.token_ids) == tokens[end:][:6]
            end = item.end
            num_chunks += end > 3 and item.num_tokens > 1
    assert len(tokens) == 33
    assert num_chunks > 3
    assert engine.scheduler.status().totals["computed_prompt_tokens"] == 3


@pytest.mark.parametrize("seed", range(12))
def test_rows_of_several_tokens_change_no_stream(seed: int) -> None:
    """Requests are preempted, end within a row, and grow by several pages at once."""
    streams, num_preemptions, longest_row = [], 0, 0
    for row_tokens, overlap in ((1, True), (7, False), (7, True)):
        rng = random.Random(seed)
        world = SimCluster()
        config = small_config(max_queued_requests=20, overlap=overlap)
        engine = world.start("u", role=Role.UNIFIED, config=config, num_pages=10, row_tokens=row_tokens)
        for index in range(12):
            prompt = [rng.randint(0, 2) for _ in range(rng.randint(1, 20))]
            min_tokens, max_tokens = rng.randint(0, 4), rng.randint(8, 18)
            request = sim_request(f"r{index}", prompt, seed=index, min_tokens=min_tokens, max_tokens=max_tokens)
            world.submit(request, engine)
        world.settle()
        world.check_settled()
        streams.append({name: world.stream(name) for name in world.submitted})
        chunks = [chunk for sent in world.chunks.values() for _, chunk in sent]
        totals = engine.scheduler.status().totals
        assert totals["generation_tokens"] == sum(len(chunk.token_ids) for chunk in chunks)
        num_preemptions += int(totals["preemptions"])
        longest_row = max(longest_row, *(len(chunk.token_ids) for chunk in chunks))
    assert streams[0] == streams[1] == streams[2]
    assert num_preemptions
    assert longest_row > engine.cache.page_size


@pytest.mark.parametrize("overlap", [False, True])
def test_the_time_of_each_step_is_counted_once_for_prompts_or_for_decodes(overlap: bool) -> None:
    world = SimCluster()
    engine = world.start("u", config=small_config(overlap=overlap))
    world.submit(sim_request("a", [1] * 5, max_tokens=6, ignore_eos=True), engine)
    world.deliver(("gateway", "u"))
    engine.step()
    while engine.scheduler.has_work() or engine.under_way:
        world.now_s += 0.5
        engine.finish_step()
        engine.step()
    totals = engine.scheduler.status().totals
    assert (totals["prompt_step_tokens"], totals["prompt_step_seconds"]) == (5, 0.5)
    assert totals["decode_step_seconds"] == totals["decode_steps"] * 0.5
    assert totals["decode_steps"] == totals["steps"] - 1 >= 5
