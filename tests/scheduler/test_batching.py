"""Which requests run, in which order, on which pages: events in, plan out."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

from kvist.errors import ConfigError
from kvist.plan.events import Event, SampledTokens, StepFinished
from kvist.plan.plan import Plan
from kvist.request import EngineRequest, FinishReason, Mode, Outcome, RequestId, Role, SamplingParams
from kvist.scheduler import SchedulerConfig
from kvist.simulation.cluster import SimCluster, sim_request
from kvist.simulation.device import EOS, reference_stream
from kvist.simulation.engine import SimEngine, small_config
from kvist.testing.specs import submit_full
from kvist.wire import Abort, FlushCache, Submit


def unified(num_pages: int = 12, **config: Any) -> SimEngine:
    return SimCluster().start("u", role=Role.UNIFIED, config=small_config(**config), num_pages=num_pages)


def arrived(request_id: str, num_tokens: int = 5, **fields: Any) -> Submit:
    prompt = [(index * 7 + sum(map(ord, request_id))) % 20 for index in range(num_tokens)]
    return submit_full(sim_request(request_id, prompt, ignore_eos=True, **fields))


def step(engine: SimEngine, *events: Event) -> Plan:
    engine.finish_step()
    engine.events.extend(events)
    return engine.step()


def items(engine: SimEngine) -> list[tuple[str, int, int]]:
    """Return (request, start, end) of each item of the newest plan."""
    assert engine.plan.batch is not None
    each = zip(engine.running, engine.plan.batch.items, strict=True)
    return [(request_id, item.start, item.end) for request_id, item in each]


def step_items(engine: SimEngine, *events: Event) -> list[tuple[str, int, int]]:
    step(engine, *events)
    return items(engine)


def run_out(engine: SimEngine) -> None:
    engine.world.settle()
    engine.world.check_settled()


def test_a_long_prompt_runs_in_chunks_and_only_the_last_chunk_samples() -> None:
    engine = unified(chunked_prefill_size=6)
    plans = [step(engine, arrived("a", 14))]
    assert items(engine) == [("a", 0, 6)]
    plans.append(step(engine))
    assert items(engine) == [("a", 6, 12)]
    plans.append(step(engine))
    assert items(engine) == [("a", 12, 14)]
    assert [plan.batch.items[0].samples for plan in plans if plan.batch] == [False, False, True]
    assert not any(plan.chunks for plan in plans)
    assert step(engine).chunks[0].position == 0


def test_decodes_come_first_then_prompt_chunks_share_the_budget_oldest_first() -> None:
    engine = unified(chunked_prefill_size=10)
    step(engine, arrived("a", 3))
    assert step_items(engine, arrived("b", 5), arrived("c", 9)) == [("a", 3, 4), ("b", 0, 5), ("c", 0, 4)]
    assert step_items(engine) == [("a", 4, 5), ("b", 5, 6), ("c", 4, 9)]


def two_streams(**config: Any) -> SimEngine:
    """Return an engine that decodes "a" and "b" in steps of the usual size."""
    engine = unified(chunked_prefill_size=8, max_running_requests=3, **config)
    step(engine, arrived("a", 3), arrived("b", 3))
    assert [name for name, _, _ in step_items(engine)] == ["a", "b"]
    return engine


def test_a_prompt_alone_takes_the_largest_step_and_with_streams_the_usual_one() -> None:
    alone = unified(chunked_prefill_size=8, max_prefill_tokens=16)
    assert step_items(alone, arrived("c", 20)) == [("c", 0, 16)]
    beside = step_items(two_streams(max_prefill_tokens=16), arrived("c", 20))
    assert beside[2:] == [("c", 0, 6)]


def test_a_prompt_slightly_above_the_budget_is_finished_in_one_step() -> None:
    assert step_items(two_streams(max_prefill_tokens=16), arrived("c", 7))[2:] == [("c", 0, 7)]
    assert step_items(two_streams(max_prefill_tokens=8), arrived("c", 7))[2:] == [("c", 0, 6)], (
        "a chunk is above the limit"
    )


def test_running_and_waiting_prompts_together_enlarge_a_step() -> None:
    def chunk_of_c(*others: Submit) -> int:
        engine = two_streams(max_prefill_tokens=256, num_pages=600, max_model_len=1000)
        step(engine, arrived("c", 900))
        _, start, end = step_items(engine, *others)[2]
        return end - start

    waiting = [arrived(name, 600) for name in ("dd", "ee", "ff")]  # 1,800 tokens; a step takes 1/16 of all
    assert chunk_of_c() == 6
    assert chunk_of_c(*waiting) == 126
    assert chunk_of_c(*waiting[:1]) == 6


def test_without_overlap_no_batch_is_planned_while_one_is_pending() -> None:
    engine = unified()
    assert step(engine, arrived("a")).batch is not None
    engine.events.append(arrived("b"))
    assert engine.step().batch is None


def test_the_head_of_the_queue_is_never_overtaken() -> None:
    engine = unified(num_pages=6, max_model_len=24, chunked_prefill_size=20, max_prefill_tokens=20)
    step(engine, arrived("a", 9, max_tokens=8))  # 3 pages of 6
    step(engine, arrived("big", 16), arrived("tiny", 2))
    assert engine.running == ["a"]
    while not engine.world.ended["a", engine.epoch]:
        step(engine)
    assert set(engine.running) == {"big", "tiny"}


def test_only_the_chunk_of_position_0_reports_the_cached_tokens() -> None:
    engine = unified()
    engine.world.submit(sim_request("a", list(range(9))), engine)
    run_out(engine)
    engine.world.submit(sim_request("b", list(range(9))), engine)
    run_out(engine)
    cached = [chunk.num_cached_tokens for _, chunk in engine.world.chunks["b"]]
    assert cached[0] == 8
    assert set(cached[1:]) <= {None}
    totals = engine.scheduler.status().totals
    assert (totals["prompt_tokens"], totals["cached_prompt_tokens"], totals["computed_prompt_tokens"]) == (18, 8, 10)


def test_the_ceiling_counts_evicted_tokens_once_per_request_by_the_rule_of_hits() -> None:
    engine = unified(num_pages=4, max_model_len=16)
    for name, first in (("a", 0), ("b", 100), ("c", 0)):  # two pages and a token each; b evicts the pages of a
        engine.world.submit(sim_request(name, list(range(first, first + 9)), max_tokens=4), engine)
        run_out(engine)
    engine.world.submit(sim_request("d", list(range(8)), max_tokens=1), engine)  # its last page must be computed
    run_out(engine)
    totals = engine.scheduler.status().totals
    assert (totals["prompt_tokens"], totals["ceiling_prompt_tokens"]) == (35, 8 + 4)
    assert totals["cached_prompt_tokens"] == 4 + 4  # one of the two pages of c was still cached


def test_hits_and_ceiling_exclude_output_tokens_of_a_resumed_request() -> None:
    engine = unified()
    for name in "ab":
        engine.world.submit(
            sim_request(name, list(range(5)), output_token_ids=tuple(range(30, 35)), max_tokens=7), engine
        )
        run_out(engine)
    totals = engine.scheduler.status().totals
    assert (totals["cached_prompt_tokens"], totals["ceiling_prompt_tokens"]) == (5, 5)


def test_a_prompt_that_is_cached_to_its_end_still_computes_its_last_page() -> None:
    engine = unified()
    engine.world.submit(sim_request("a", list(range(8)), max_tokens=1), engine)
    run_out(engine)
    request = sim_request("b", list(range(8)), max_tokens=1)
    assert step_items(engine, submit_full(request)) == [("b", 4, 8)]


def test_prompts_with_another_salt_share_nothing() -> None:
    engine = unified()
    engine.world.submit(sim_request("a", list(range(9))), engine)
    run_out(engine)
    request = sim_request("b", list(range(9)), cache_salt="mine")
    assert step_items(engine, submit_full(request))[0][1] == 0


def test_the_youngest_request_is_preempted_and_its_stream_is_unchanged() -> None:
    engine = unified(num_pages=6, max_model_len=24)
    world = engine.world
    for index, name in enumerate("ab"):
        world.submit(sim_request(name, [index] * 7, max_tokens=12, ignore_eos=True, seed=index), engine)
    run_out(engine)
    assert engine.scheduler.status().totals["preemptions"] >= 1
    assert world.ended["a", engine.epoch][0].outcome is Outcome.FINISHED
    for index, name in enumerate("ab"):
        request = sim_request(name, [index] * 7, max_tokens=12, ignore_eos=True, seed=index)
        assert world.stream(name) == reference_stream(request, engine.config, engine.context_len)


def test_the_oldest_request_is_never_preempted() -> None:
    engine = unified(num_pages=6, max_model_len=24)
    for name in ("a", "b", "c"):
        engine.world.submit(sim_request(name, [ord(name)] * 4, max_tokens=14, ignore_eos=True), engine)
    order: list[str] = []
    for _ in range(200):
        for wire in list(engine.world.wires):
            engine.world.deliver(wire)
        engine.finish_step()
        order += [ended.request_id for ended in engine.step().ended]
    assert order[0] == "a"
    assert sorted(order) == ["a", "b", "c"]
    positions = [chunk.position for _, chunk in engine.world.chunks["a"]]
    assert positions == list(range(14))


def test_a_full_queue_refuses_as_overloaded_with_a_retry_after() -> None:
    engine = unified(max_running_requests=1, max_queued_requests=2)
    step(engine, arrived("a"))
    plan = step(engine, arrived("b"), arrived("c"), arrived("d"))
    (ended,) = plan.ended
    assert (ended.request_id, ended.outcome, ended.error_code) == ("d", Outcome.FAILED, "overloaded")
    assert ended.retry_after_s == 1.0, "no request has ended yet"
    engine.world.now_s = 24.0
    while not step(engine).ended:
        pass
    (ended,) = step(engine, arrived("e"), arrived("f")).ended
    assert ended.retry_after_s == 48.0, "two requests wait, and each recent request took 24 s, one at a time"


def test_a_burst_at_an_idle_worker_is_not_refused_because_the_request_before_was_slow() -> None:
    engine = unified(num_pages=64, max_running_requests=10, max_queued_requests=64)
    step(engine, arrived("slow"))
    engine.world.now_s = 30.0
    while not step(engine).ended:
        pass
    assert step(engine, *(arrived(f"r{number}") for number in range(50))).ended == ()


def test_the_wait_of_a_queue_is_unknown_while_places_are_free_and_nothing_was_measured() -> None:
    """By the time of the request before, the first of these would wait for 30 s."""
    engine = unified(num_pages=64, max_running_requests=10, max_queued_requests=64, max_prefill_tokens=16)
    step(engine, arrived("slow"))
    engine.world.now_s = 30.0
    while not step(engine).ended:
        pass
    step(engine, *(arrived(f"r{number}", 16) for number in range(9)))
    status = engine.scheduler.status()
    assert status.num_waiting > 0
    assert status.queue_wait_s is None


@pytest.mark.parametrize("num_tokens", [16, 40])
def test_a_prompt_that_can_never_fit_fails_at_once(num_tokens: int) -> None:
    engine = unified(num_pages=4)  # 16 tokens
    (ended,) = step(engine, arrived("a", num_tokens)).ended
    assert (ended.outcome, ended.error_code) == (Outcome.FAILED, "context_length_exceeded")


@pytest.mark.parametrize(
    ("num_pages", "limit"), [(4, r"16 .*page pool \(--max-total-tokens\)"), (12, r"40 .*length \(--context-length\)")]
)
def test_an_answer_that_cannot_fit_is_refused_and_never_shortened(num_pages: int, limit: str) -> None:
    engine = unified(num_pages=num_pages)
    (ended,) = step(engine, arrived("a", 13, max_tokens=100)).ended
    assert ended.error_code == "context_length_exceeded"
    assert re.search(f"needs 113 tokens; this worker holds at most {limit}", ended.message)


@pytest.mark.parametrize(
    ("request_", "mode", "role", "code"),
    [
        (sim_request("a", []), Mode.FULL, Role.UNIFIED, "invalid_request"),
        (sim_request("a", [1], max_tokens=2, output_token_ids=(3, 4)), Mode.FULL, Role.UNIFIED, "invalid_request"),
        (sim_request("a", [1]), Mode.PREFILL, Role.UNIFIED, "invalid_request"),  # no handoff_id
        (sim_request("a", [1]), Mode.DECODE, Role.UNIFIED, "unavailable"),
        (sim_request("a", [1]), Mode.DECODE, Role.PREFILL, "unavailable"),
        (sim_request("a", [1]), Mode.PREFILL, Role.DECODE, "unavailable"),
        (sim_request("a", [1]), Mode.DECODE, Role.DECODE, "invalid_request"),  # no handoff_id, no prefill worker
    ],
)
def test_each_role_refuses_the_modes_it_does_not_serve(
    request_: EngineRequest, mode: Mode, role: Role, code: str
) -> None:
    engine = SimCluster().start("e", role=role, config=small_config())
    (ended,) = step(engine, Submit(request=request_, mode=mode)).ended
    assert (ended.outcome, ended.error_code) == (Outcome.FAILED, code)
    assert not engine.scheduler.has_work()


@pytest.mark.parametrize("fields", [{}, {"ignore_eos": True}, {"min_tokens": 0}, {"allowed_token_ids": (EOS, 3)}])
def test_allowed_tokens_that_all_end_the_answer_contradict_min_tokens(fields: dict[str, Any]) -> None:
    engine = unified()
    request = sim_request("a", [1])
    asked = {"allowed_token_ids": (EOS, 5), "stop_token_ids": (5,), "min_tokens": 1, **fields}
    sampling = msgspec.structs.replace(request.sampling, **asked)
    submit = submit_full(msgspec.structs.replace(request, sampling=sampling))
    ended = step(engine, submit).ended
    assert len(ended) == (not fields)
    for one in ended:
        assert (one.outcome, one.error_code) == (Outcome.FAILED, "invalid_request")
        assert "leaves no token" in one.message


@pytest.mark.parametrize(("role", "max_tokens"), [(Role.PREFILL, 20), (Role.DECODE, 20)])
def test_a_worker_of_a_pair_answers_whole_requests(role: Role, max_tokens: int) -> None:
    world = SimCluster()
    engine = world.start("e", role=role, config=small_config())
    world.submit(sim_request("a", [1] * 14, max_tokens=max_tokens), engine)
    world.settle()
    world.check_settled()
    assert world.outcome("a", engine) is Outcome.FINISHED


def test_a_prefill_worker_answers_a_whole_request_of_one_token() -> None:
    engine = SimCluster().start("p", role=Role.PREFILL, config=small_config())
    engine.world.submit(sim_request("a", [1, 2, 3], max_tokens=1), engine)
    run_out(engine)
    assert len(engine.world.stream("a")[0]) == 1


def sampled(plan: Plan, token_id: int) -> StepFinished:
    assert plan.batch is not None
    return StepFinished(
        step_id=plan.batch.step_id,
        sampled=SampledTokens(token_ids=[token_id for item in plan.batch.items if item.samples]),
    )


@pytest.mark.parametrize(
    ("sampling", "tokens", "reason"),
    [
        (SamplingParams(max_tokens=9), [1, EOS], FinishReason.STOP),
        (SamplingParams(max_tokens=9, stop_token_ids=(5,)), [1, 5], FinishReason.STOP),
        (SamplingParams(max_tokens=3, ignore_eos=True), [EOS, EOS, EOS], FinishReason.LENGTH),
        (SamplingParams(max_tokens=1), [EOS], FinishReason.STOP),
        (SamplingParams(max_tokens=2), [1, 1], FinishReason.LENGTH),
    ],
)
def test_the_chunk_of_the_last_token_carries_the_finish_reason(
    sampling: SamplingParams, tokens: list[int], reason: FinishReason
) -> None:
    engine = unified()
    request = sim_request("a", [1, 2, 3])
    request = msgspec.structs.replace(request, sampling=sampling)
    plan = engine.scheduler.step(0.0, [submit_full(request)])
    sent = []
    for token_id in tokens:
        plan = engine.scheduler.step(0.0, [sampled(plan, token_id)])
        sent += [(chunk.token_ids[0], chunk.finish_reason) for chunk in plan.chunks]
    assert sent == [*((token_id, None) for token_id in tokens[:-1]), (tokens[-1], reason)]
    assert [ended.outcome for ended in plan.ended] == [Outcome.FINISHED]
    assert plan.batch is None


def test_stop_tokens_are_suppressed_before_min_tokens() -> None:
    engine = unified()
    plan = step(engine, submit_full(sim_request("a", [1, 2], min_tokens=2, stop_token_ids=(3,))))
    assert plan.batch is not None
    (start,) = plan.batch.started
    assert start.suppressed_token_ids == (3, EOS)
    suppressed = []
    for _ in range(3):
        assert plan.batch is not None
        suppressed.append(plan.batch.items[0].end < start.suppress_until)
        plan = step(engine)
    assert suppressed == [True, True, False]


def test_a_resumed_stream_gives_the_same_tokens() -> None:
    engine = unified()
    whole = sim_request("whole", [4, 5, 6, 1, 2], max_tokens=10, ignore_eos=True)
    expected, _ = reference_stream(whole, engine.config, engine.context_len)
    rest = sim_request("rest", [4, 5, 6, 1, 2], max_tokens=10, ignore_eos=True, output_token_ids=tuple(expected[:4]))
    engine.world.submit(rest, engine)
    run_out(engine)
    assert engine.world.stream("rest")[0] == expected
    assert [chunk.position for _, chunk in engine.world.chunks["rest"]] == list(range(4, 10))


def test_an_abort_during_a_step_keeps_the_pages_until_the_step_is_over() -> None:
    engine = unified()
    step(engine, arrived("a"))
    engine.events.append(Abort(request_id=RequestId("a")))
    plan = engine.step()
    assert [ended.outcome for ended in plan.ended] == [Outcome.ABORTED]
    assert engine.scheduler.status().pages.owned == 2
    plan = step(engine)
    assert not plan.chunks
    assert engine.scheduler.status().pages.owned == 0


def test_an_abort_of_a_request_that_waits_or_is_unknown_is_harmless() -> None:
    engine = unified(max_running_requests=1)
    plan = step(
        engine, arrived("a"), arrived("b"), Abort(request_id=RequestId("b")), Abort(request_id=RequestId("ghost"))
    )
    assert [(ended.request_id, ended.outcome) for ended in plan.ended] == [("b", Outcome.ABORTED)]
    assert engine.scheduler.status().num_waiting == 0


def test_a_failed_step_fails_its_requests_and_caches_nothing_it_wrote() -> None:
    engine = unified(chunked_prefill_size=18, max_prefill_tokens=18)
    engine.fail_next_step = True
    step(engine, arrived("a", 9), arrived("b", 9))
    plan = step(engine, arrived("c", 3))
    assert {(ended.request_id, ended.error_code) for ended in plan.ended} == {
        ("a", "step_failed"),
        ("b", "step_failed"),
    }
    assert engine.scheduler.status().pages.cached == 0
    run_out(engine)


def test_a_request_not_admitted_within_the_queue_timeout_ends_as_timeout() -> None:
    engine = unified(max_running_requests=1, queue_timeout_s=2.0)
    step(engine, arrived("a", max_tokens=30))
    plan = step(engine, arrived("b"))
    assert plan.wake_at_s == 2.0
    engine.world.now_s = 2.0
    (ended,) = step(engine).ended
    assert (ended.request_id, ended.error_code) == ("b", "timeout")


def test_a_second_submit_of_a_live_request_is_ignored() -> None:
    engine = unified()
    step(engine, arrived("a"), arrived("a"))
    engine.world.settle()
    assert len(engine.world.chunks["a"]) == 6
    assert len(engine.world.ended["a", engine.epoch]) == 1


def test_flush_frees_unused_pages_and_reports_their_number() -> None:
    engine = unified()
    engine.world.submit(sim_request("a", list(range(9)), max_tokens=1), engine)
    run_out(engine)
    plan = step(engine, FlushCache(call_id="c"))
    assert [(flush.call_id, flush.num_pages) for flush in plan.flushes] == [("c", 2)]
    (event,) = plan.changed_pages
    assert (event.tier, event.stored, len(event.removed)) == ("device", (), 2)


def test_a_budget_below_one_token_a_request_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="--max-prefill-tokens 7 is below --max-running-requests 8"):
        SchedulerConfig(max_running_requests=8, chunked_prefill_size=4, max_prefill_tokens=7)
