"""Reports on workers that join, leave and die: SGLang #13894, #12355, sglang-router in NeMo-RL #3613,
llm-d #2433, vLLM #23587.

There, affinity kept choosing a dead worker, all circuits were open although workers were healthy, and a pair of workers
that did not match hung or crashed with its first request.
"""

from __future__ import annotations

import pytest

from kvist.errors import ConfigError, KvistError, Overloaded, Unavailable
from kvist.flags import Sources, read_settings
from kvist.kv.keys import page_digests
from kvist.request import FinishReason, Outcome, Role
from kvist.router.config import RouterConfig, RoutingOptions
from kvist.router.registry import Worker
from kvist.settings import ServeSettings
from kvist.testing.page_events import joined
from kvist.testing.router_bench import RouterBench, read_all, settle
from kvist.testing.specs import make_request, make_roomy_spec
from kvist.wire import Welcome

PROMPT = tuple(range(160))


def remember_prompt(bench: RouterBench, worker: Worker) -> None:
    """Let the worker report that it has the whole prompt cached."""
    assert worker.spec is not None
    pages = page_digests(PROMPT, worker.spec.page_size, worker.spec.namespace, "")
    bench.registry.index.store(worker.worker_id, "device", joined(*pages))


async def served_by(bench: RouterBench) -> Worker:
    """Send one request; return the worker that got it, after it has answered."""
    num_sent = len(bench.engines.sent)
    task = await bench.begin(make_request("r", PROMPT))
    (worker,) = {worker for worker, _ in bench.engines.sent[num_sent:]}
    bench.engines.emit(worker, 0, 7, finish=FinishReason.STOP)
    bench.engines.end(worker)
    assert await task == [7]
    return worker


async def test_affinity_does_not_choose_a_dead_worker_and_forgets_what_it_had() -> None:
    bench = RouterBench()
    favourite, other = bench.engines.join("a"), bench.engines.join("b")
    remember_prompt(bench, favourite)
    assert await served_by(bench) is favourite
    bench.engines.lose(favourite)
    for _ in range(5):
        assert await served_by(bench) is other
    bench.registry.on_welcome(favourite, Welcome(spec=make_roomy_spec(worker_id="a", epoch="second")), 1.0)
    remember_prompt(bench, other)
    for _ in range(5):
        assert await served_by(bench) is other, "the pages of the dead process are gone"


async def test_affinity_does_not_choose_a_removed_worker() -> None:
    bench = RouterBench()
    favourite, other = bench.engines.join("a"), bench.engines.join("b")
    remember_prompt(bench, favourite)
    bench.registry.leave(favourite)
    assert await served_by(bench) is other


async def test_refusals_and_failures_of_requests_do_not_take_healthy_workers_out_of_the_routing() -> None:
    bench = RouterBench()
    workers = [bench.engines.join("a"), bench.engines.join("b")]
    for code in ("overloaded", "engine_error", "timeout", "invalid_request") * 10:
        task = await bench.begin(make_request("r", PROMPT))
        while not task.done():  # a retryable error is tried on the other worker
            worker = next(worker for worker, message in reversed(bench.engines.sent) if worker.in_flight)
            bench.engines.end(worker, Outcome.FAILED, error_code=code, message="refused")
            await settle()
        with pytest.raises(KvistError) as caught:
            await task
        assert caught.value.code == code, "the client sees the worker's own answer"
    assert all(worker.alive for worker in bench.dispatcher.snapshot().workers)
    assert {await served_by(bench), await served_by(bench)} <= set(workers)


async def test_a_fleet_whose_queues_are_full_is_overloaded_and_not_unavailable() -> None:
    bench = RouterBench()
    worker = bench.engines.join("a", max_running_requests=1, max_queued_requests=1)
    tasks = [await bench.begin(make_request(f"r{number}", PROMPT)) for number in range(2)]
    with pytest.raises(Overloaded):
        await read_all(bench.dispatcher.generate(make_request("r", PROMPT)))
    bench.engines.lose(worker)
    await bench.pass_time(5.0)
    for task in tasks:
        with pytest.raises(KvistError):
            await task


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"model_fingerprint": "other-weights"}, ["other-weights", "f"]),
        ({"dtype": "bfloat16"}, ["bfloat16", "float32"]),
        ({"page_size": 32}, ["32", "16"]),
    ],
)
async def test_a_pair_that_does_not_match_is_refused_at_joining_with_both_values(
    changes: dict[str, object], values: list[str]
) -> None:
    bench = RouterBench(RouterConfig(routing=RoutingOptions(aggregate="never")))
    bench.engines.join("p", role=Role.PREFILL, model_fingerprint="f", dtype="float32", page_size=16)
    spec = {"model_fingerprint": "f", "dtype": "float32", "page_size": 16, **changes}
    with pytest.raises(ConfigError) as refused:
        bench.engines.join("d", role=Role.DECODE, **spec)  # type: ignore[arg-type]
    assert all(value in refused.value.message for value in values)
    with pytest.raises(Unavailable) as caught:  # at once, instead of a hang
        await read_all(bench.dispatcher.generate(make_request("r", PROMPT)))
    assert refused.value.message in caught.value.message
    assert bench.engines.sent == []


@pytest.mark.parametrize("policy", ["cache_aware", "cost"])
async def test_a_worker_that_claims_pages_which_it_lacks_gets_no_more_than_it_can_queue(policy: str) -> None:
    bench = RouterBench(RouterConfig(routing=RoutingOptions(policy=policy)))
    liar = bench.engines.join("a", max_running_requests=8, max_queued_requests=8)
    honest = bench.engines.join("b", max_running_requests=64, max_queued_requests=64)
    remember_prompt(bench, liar)  # the worker would have to compute the prompt, and its queue grows
    tasks = [await bench.begin(make_request(f"r{number}", PROMPT)) for number in range(60)]
    counts = [len(bench.engines.submits(worker)) for worker in (liar, honest)]
    assert sum(counts) == 60, "no request is refused"
    assert counts[0] <= 16, "a lie gains one queue"
    for worker in (liar, honest):
        bench.engines.lose(worker)
    await bench.pass_time(5.0)
    for task in tasks:
        with pytest.raises(KvistError):
            await task


def test_an_unknown_transport_is_refused_at_the_start_with_the_known_names() -> None:
    argv = ("--disaggregation-transfer-backend", "carrier-pigeon")
    with pytest.raises(ConfigError) as refused:
        read_settings(ServeSettings, Sources(argv=argv, environ={}))
    for word in ("--disaggregation-transfer-backend", "carrier-pigeon", "shm", "mooncake"):
        assert word in refused.value.message
