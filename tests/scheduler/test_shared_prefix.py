"""Requests with one prefix that arrive together: the prefix is computed once."""

from __future__ import annotations

from typing import Any

import pytest

from kvist.request import EngineRequest, HandoffId, Mode, Outcome, RequestId, Role
from kvist.scheduler import batching
from kvist.simulation.cluster import SimCluster, sim_request
from kvist.simulation.engine import SimEngine, small_config
from kvist.testing.specs import make_peer_spec, submit_full
from kvist.wire import Abort, Grant, Submit
from tests.scheduler.handoff_bench import PROMPT, Bench, D, P, pool

PREFIX = [number % 19 for number in range(3000)]
NUM_REQUESTS = 50


def large_engine(role: Role = Role.UNIFIED, **config: Any) -> SimEngine:
    limits: dict[str, Any] = {
        "max_running_requests": 64,
        "max_queued_requests": 64,
        "chunked_prefill_size": 512,
        "max_prefill_tokens": 512,
        "max_model_len": 8000,
        **config,
    }
    return SimCluster().start("u", role=role, config=small_config(**limits), num_pages=3000, page_size=16)


def with_prefix(name: str, number: int, **fields: Any) -> EngineRequest:
    return sim_request(name, [*PREFIX, *[number % 7 + 1] * 20], ignore_eos=True, **{"max_tokens": 4, **fields})


def submit(engine: SimEngine, *requests: EngineRequest) -> None:
    for request in requests:
        engine.world.submit(request, engine)
        engine.world.deliver(("gateway", engine.name))


def step(engine: SimEngine) -> None:
    engine.finish_step()
    engine.step()


def num_steps(*requests: EngineRequest, **config: Any) -> tuple[int, SimEngine]:
    """Run the requests, submitted at once; return the number of steps."""
    engine = large_engine(**config)
    submit(engine, *requests)
    engine.world.settle()
    engine.world.check_settled()  # every stream is that of an undisturbed engine
    return int(engine.scheduler.status().totals["steps"]), engine


def computed(engine: SimEngine) -> int:
    return int(engine.scheduler.status().totals["computed_prompt_tokens"])


@pytest.mark.parametrize("overlap", [False, True])
def test_fifty_requests_compute_their_common_prefix_once(overlap: bool) -> None:
    requests = [with_prefix(f"r{number}", number) for number in range(NUM_REQUESTS)]
    num_alone, _ = num_steps(requests[0], overlap=overlap)
    num_together, engine = num_steps(*requests, overlap=overlap)
    own = NUM_REQUESTS * (20 + 16)  # the rest of a page and the tokens after it are each request's own
    assert computed(engine) <= len(PREFIX) + own
    queue = -(-own // 512)  # steps that compute the own tokens of all requests
    assert num_together <= 1.15 * num_alone + queue


def test_a_request_with_another_salt_or_prefix_does_not_wait() -> None:
    engine = large_engine(max_prefill_tokens=8000, chunked_prefill_size=8000)
    other = sim_request("other", [5, *PREFIX], max_tokens=1)
    submit(engine, with_prefix("a", 1), with_prefix("salted", 2, cache_salt="s"), other)
    engine.step()
    assert engine.running == ["a", "salted", "other"]


def test_a_short_common_prefix_is_not_worth_a_wait() -> None:
    engine = large_engine(max_prefill_tokens=2048)
    first, second = ([*PREFIX[:48], *[own] * 100] for own in (20, 21))
    submit(engine, sim_request("a", first, max_tokens=1), sim_request("b", second, max_tokens=1))
    engine.step()
    assert engine.running == ["a", "b"]


def test_a_request_waits_until_its_part_of_the_prefix_is_there() -> None:
    engine = large_engine(max_prefill_tokens=4096)
    submit(engine, with_prefix("a", 1), sim_request("b", [*PREFIX[:600], *[20] * 50], max_tokens=1))
    num_waiting = []
    for _ in range(3):
        step(engine)
        num_waiting.append(len(engine.scheduler.requests.awaiting_pages))
    assert num_waiting == [1, 0, 0]
    assert computed(engine) == len(PREFIX) + 20 + 650 - 592


@pytest.mark.parametrize("ends_by", ["abort", "failed step"])
def test_another_request_goes_on_from_where_the_first_one_ended(ends_by: str) -> None:
    engine = large_engine()
    submit(engine, *(with_prefix(f"r{number}", number) for number in range(3)))
    for _ in range(3):
        step(engine)
    if ends_by == "abort":
        engine.world.abort("r0")
    else:
        engine.fail_next_step = True
    engine.world.settle()
    engine.world.check_settled()
    assert engine.world.outcome("r1", engine) is Outcome.FINISHED
    assert engine.world.outcome("r2", engine) is Outcome.FINISHED
    assert computed(engine) <= len(PREFIX) + 512 + 3 * 36, "at most the step of the lost request is repeated"


def prefill_submit(request: EngineRequest) -> Submit:
    return Submit(request=request, mode=Mode.PREFILL, handoff_id=HandoffId(request.request_id), target_epoch=D)


def grant(name: str, num_pages: int) -> Grant:
    return Grant(
        handoff_id=HandoffId(name),
        request_id=RequestId(name),
        target_epoch=D,
        source_epoch=P,
        target=make_peer_spec(pool(D)),
        first_page=0,
        page_ids=tuple(range(num_pages)),
    )


def test_a_request_does_not_wait_for_a_prompt_without_a_grant() -> None:
    bench = Bench(Role.UNIFIED, chunked_prefill_size=12, max_prefill_tokens=12, overlap=True)
    bench.step(prefill_submit(sim_request("ungranted", PROMPT)))
    assert bench.running == ["ungranted"]
    bench.step(submit_full(sim_request("full", PROMPT)))
    assert bench.running == ["full"]


def test_a_prompt_waits_for_an_ungranted_one_only_until_it_is_granted() -> None:
    bench = Bench(Role.PREFILL, chunked_prefill_size=12, max_prefill_tokens=12, overlap=True)
    bench.step(*(prefill_submit(sim_request(name, PROMPT)) for name in ("a", "b")))
    assert (bench.running, bench.scheduler.status().num_waiting) == (["a"], 1)
    bench.step(grant("b", 3))
    assert bench.running == ["b"]
    assert bench.scheduler.status().totals["shared_prefix_waits"] == 1


def test_a_request_is_queued_again_in_the_step_that_preempts_its_leader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "MAX_STEP_LOGPROBS", 8)  # chunks of the scored leader leave room for its follower
    bench = Bench(Role.UNIFIED, chunked_prefill_size=16, max_prefill_tokens=16)
    bench.step(prefill_submit(sim_request("granted", range(20, 36))), grant("granted", 4))
    bench.finish()  # its pages wait for the peer's Ack
    scored = sim_request("leader", PROMPT, prompt_logprobs=1)
    bench.step(prefill_submit(scored), prefill_submit(sim_request("follower", PROMPT)))
    requests = bench.scheduler.requests
    assert [each.request_id for each in requests.awaiting_pages] == ["follower"]
    bench.finish(submit_full(sim_request("full", range(60, 94))))  # preempts the leader, and still has too few pages
    assert bench.scheduler.status().totals["preemptions"] == 1
    assert (bench.plan.batch, len(requests.running), len(requests.awaiting_pages)) == (None, 0, 0)
    bench.step(Abort(request_id=RequestId("full")))
    assert bench.running == ["follower"]


def test_a_request_waits_for_pages_whose_own_request_ended_while_they_were_loaded() -> None:
    engine = SimCluster().start("u", role=Role.UNIFIED, num_host_pages=12, num_pages=12)
    submit(engine, sim_request("first", PROMPT, max_tokens=1))
    engine.world.settle()
    engine.world.forget(engine, host=False)
    submit(engine, sim_request("ends", PROMPT, max_tokens=1))
    engine.step()
    engine.world.abort("ends")
    engine.world.deliver(("gateway", engine.name))
    submit(engine, sim_request("waits", PROMPT, max_tokens=1))
    engine.step()
    assert [each.request_id for each in engine.scheduler.requests.awaiting_pages] == ["waits"]
    engine.world.settle()
    engine.world.check_settled()
    assert engine.world.outcome("waits", engine) is Outcome.FINISHED


def sharing(name: str, own: int, num_shared: int, **fields: Any) -> EngineRequest:
    """Return a request whose first `num_shared` tokens others have too, and which generates nothing."""
    tokens = [*PREFIX[:num_shared], *[own] * 20]
    return sim_request(name, tokens, ignore_eos=True, max_tokens=0, num_shared_tokens=num_shared, **fields)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_shared", [16, 40, 700])
def test_requests_that_share_tokens_compute_even_few_of_them_once(num_shared: int, overlap: bool) -> None:
    engine = large_engine(overlap=overlap)
    submit(engine, *(sharing(f"r{number}", number + 1, num_shared) for number in range(8)))
    engine.world.settle()
    engine.world.check_settled()
    assert computed(engine) == num_shared + 20 + 7 * (num_shared % 16 + 20)


def test_requests_that_share_cached_tokens_are_computed_in_one_step() -> None:
    engine = large_engine()
    submit(engine, sim_request("before", PREFIX[:640], max_tokens=0))
    engine.world.settle()
    num_before = engine.scheduler.status().totals["steps"]
    submit(engine, *(sharing(f"r{number}", number + 1, 640) for number in range(8)))
    engine.world.settle()
    assert engine.scheduler.status().totals["steps"] == num_before + 1
    assert computed(engine) == 640 + 8 * 20


def test_pages_behind_the_shared_tokens_do_not_stay_cached() -> None:
    engine = large_engine()
    submit(engine, *(sharing(f"r{number}", number + 1, 40) for number in range(8)))
    engine.world.settle()
    assert engine.scheduler.status().pages.cached == 40 // 16
