"""Fair queues: a flood of one client leaves room for others, and a stream that has begun never waits in a queue."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest

from kvist.errors import ConfigError, Overloaded
from kvist.fairness import caller_path, weight_of
from kvist.kv.cache import PageCache
from kvist.plan.batch import Batch
from kvist.plan.events import Event, SampledTokens, StepFinished
from kvist.plan.plan import Plan
from kvist.request import EngineRequest, EpochId, HandoffId, Mode, RequestId, Role, SamplingParams, WorkerId
from kvist.router.config import RouterConfig
from kvist.router.registry import Registry
from kvist.router.route import Router
from kvist.scheduler import Scheduler, SchedulerConfig, build_scheduler
from kvist.server.config import ServerConfig
from kvist.testing.gateway_bench import GatewayBench
from kvist.testing.specs import make_load, make_peer_spec, make_spec, submit_full
from kvist.wire import Grant, PoolAddress, PrefillPeer, Submit, Welcome
from tests.server.conftest import MakeBench

POOL = PoolAddress(transport="t", location="x", num_pages=4096, page_bytes=64, layout="l")
PREFILL, DECODE = EpochId("prefill"), EpochId("decode")


class Engine:
    """A scheduler with a device that computes each step at once."""

    def __init__(self, role: Role = Role.UNIFIED, **limits: object) -> None:
        config = SchedulerConfig(
            **{"max_running_requests": 4, "chunked_prefill_size": 64, "max_prefill_tokens": 64, **limits}  # type: ignore[arg-type]
        )
        cache = PageCache(num_pages=4096, page_size=4, namespace="t")
        epoch = DECODE if role is Role.DECODE else PREFILL
        self.scheduler: Scheduler = build_scheduler(role, config, cache, epoch, make_peer_spec(POOL))
        self.now_s = 0.0
        self.batch: Batch | None = None

    def step(self, *events: Event) -> Plan:
        done: list[Event] = []
        if self.batch is not None:
            sampled = [1 for item in self.batch.items if item.samples]
            done = [StepFinished(step_id=self.batch.step_id, sampled=SampledTokens(token_ids=sampled))]
        plan = self.scheduler.step(self.now_s, [*done, *events])
        self.batch = plan.batch
        return plan


def whole(name: str, client: str = "", max_tokens: int = 4) -> Submit:
    return submit_full(_request(name, client, max_tokens))


def _request(name: str, client: str, max_tokens: int = 4) -> EngineRequest:
    prompt = tuple(name.encode())
    sampling = SamplingParams(max_tokens=max_tokens)
    asked = EngineRequest(request_id=RequestId(name), prompt_token_ids=prompt, sampling=sampling)
    return msgspec.structs.replace(asked, client=client) if client else asked


@pytest.mark.case("burst-on-idle")
def test_a_burst_on_an_idle_scheduler_fills_all_running_places_and_the_queue() -> None:
    engine = Engine(max_queued_requests=6)
    plan = engine.step(*(whole(f"r{index}") for index in range(11)))
    assert [ended.request_id for ended in plan.ended] == ["r10"]
    assert plan.batch is not None
    assert len(plan.batch.items) == 4


@pytest.mark.case("fairness")
@pytest.mark.parametrize("flood_from", ["one connection", "many connections", "another host of the same key"])
def test_the_scheduler_serves_a_new_caller_before_the_queue_of_another(flood_from: str) -> None:
    flooder = {
        "one connection": lambda _: "k/h/1",
        "many connections": lambda index: f"k/h/{index}",
        "another host of the same key": lambda index: f"l/i/{index}",
    }[flood_from]
    engine = Engine(max_queued_requests=600)
    engine.step(*(whole(f"flood{index}", flooder(index)) for index in range(600)))
    engine.step()
    plan = engine.step(whole("other", "l/h/1"))
    turns: list[str] = []
    while "other" not in turns:
        assert plan.batch is not None
        turns += [start.request_id for start in plan.batch.started]
        plan = engine.step()
    assert len(turns) <= 1 + 4, "at most the other requests of one step run first"


@pytest.mark.case("fairness")
def test_a_full_queue_displaces_the_newest_request_of_the_busiest_caller() -> None:
    engine = Engine(max_queued_requests=6)
    engine.step(*(whole(f"flood{index}", "k/h/1") for index in range(10)))
    plan = engine.step(whole("other", "l/i/1"), whole("flood10", "k/h/2"))
    assert [(ended.request_id, ended.error_code) for ended in plan.ended] == [
        ("flood9", "overloaded"),
        ("flood8", "overloaded"),  # displaced by another connection of its own key
    ]
    assert all(ended.retry_after_s is not None for ended in plan.ended)
    assert engine.scheduler.status().num_waiting == 6
    assert engine.scheduler.status().totals["requests_displaced"] == 2


@pytest.mark.case("fairness")
def test_prefill_sends_no_token_before_decode_has_a_place_for_the_stream() -> None:
    prefill, decode = Engine(Role.PREFILL), Engine(Role.DECODE, max_running_requests=1, queue_timeout_s=60.0)
    streamed: list[str] = []
    peer = PrefillPeer(worker_id=WorkerId("p"), endpoint="tcp://p", epoch=PREFILL)
    first_grants = decode.step(*(_decode_side(name, peer) for name in ("first", "second"))).messages
    plan = prefill.step(*(_prefill_side(name) for name in ("first", "second")), *(m.message for m in first_grants))
    for _ in range(3):
        streamed += [chunk.request_id for chunk in plan.chunks]
        plan = prefill.step()
    assert [m.message.handoff_id for m in first_grants if isinstance(m.message, Grant)] == ["first"]
    assert streamed == ["first"], "decode has one place"
    decode.now_s = 60.0
    (ended,) = decode.step().ended
    assert (ended.request_id, ended.error_code) == ("second", "timeout"), "its client has received no token"


def _prefill_side(name: str) -> Submit:
    return Submit(request=_request(name, ""), mode=Mode.PREFILL, handoff_id=HandoffId(name), target_epoch=DECODE)


def _decode_side(name: str, peer: PrefillPeer) -> Submit:
    return Submit(request=_request(name, ""), mode=Mode.DECODE, handoff_id=HandoffId(name), prefill=peer)


def _requests_of(bench: GatewayBench, num: int, key: str, host: str) -> list[asyncio.Task[httpx.Response]]:
    transport = httpx.ASGITransport(bench.app, client=(host, 40_000))
    client = httpx.AsyncClient(
        transport=transport, base_url="http://127.0.0.1", headers={"content-type": "application/json"}
    )
    headers = {"Authorization": f"Bearer {key}"}
    body = msgspec.json.encode({"prompt": "a", "max_tokens": 2})
    return [asyncio.create_task(client.post("/v1/completions", content=body, headers=headers)) for _ in range(num)]


@pytest.mark.case("fairness")
@pytest.mark.parametrize("other", [("k2", "10.0.0.1"), ("k1", "10.0.0.2")])
async def test_the_gateway_reserves_places_for_other_callers_and_tags_requests_by_caller(
    make_bench: MakeBench, other: tuple[str, str]
) -> None:
    bench = make_bench(max_concurrent_requests=16, api_key=("k1", "k2"))
    bench.dispatcher.hold = asyncio.Event()
    flood = _requests_of(bench, 20, "k1", "10.0.0.1")
    await _until(lambda: sum(task.done() for task in flood) == 6)
    refused = [task.result() for task in flood if task.done()]
    assert {response.status_code for response in refused} == {429}
    assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
    (let_in,) = _requests_of(bench, 1, *other)
    await _until(lambda: len(bench.dispatcher.requests) == 15)
    bench.dispatcher.hold.set()
    assert (await let_in).status_code == 200
    await asyncio.gather(*flood)
    paths = {caller_path(request.client) for request in bench.dispatcher.requests}
    assert len(paths) == 2, "one tag per caller"
    assert not any(secret in request.client for request in bench.dispatcher.requests for secret in ("k1", "10.0.0"))


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0)


@pytest.mark.case("fairness")
async def test_the_router_sends_a_request_to_a_full_worker_that_can_displace_another_callers() -> None:
    registry = Registry(RouterConfig())
    worker = registry.add("http://w", None, 0.0)
    spec = make_spec(endpoint="tcp://w", vocab_size=300, page_size=4, num_pages=64, max_queued_requests=12)
    registry.on_welcome(worker, Welcome(spec=spec), 0.0)
    router = Router(RouterConfig(), registry)
    for index in range(16):
        worker.take(RequestId(f"flood{index}"), 10, ("k", "h", "1"))
    with pytest.raises(Overloaded) as refused:
        router.choose(_request("more", "k/h/1"))
    assert refused.value.retry_after_s == 1.0
    for index in range(2):  # 1/8 more requests than places may be under way
        assert router.choose(_request("other", "l/h/1")).prefill is worker
        worker.take(RequestId(f"other{index}"), 10, ("l", "h", "1"))
    with pytest.raises(Overloaded):
        router.choose(_request("other", "l/h/1"))
    load = make_load(num_running=4, num_waiting=12, num_owned_pages=64, service_s=10.0)
    registry.on_report(worker, load, 1.0)
    with pytest.raises(Overloaded) as later:
        router.choose(_request("more", "k/h/1"))
    assert later.value.retry_after_s == 35.0, "14 requests wait for 4 places of 10 s each"


@pytest.mark.case("fairness")
async def test_a_key_over_its_limit_gets_a_429_that_names_the_limit_and_other_keys_are_served(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(max_inflight_per_key=3, api_key=("k1", "k2"))
    bench.dispatcher.hold = asyncio.Event()
    flood = _requests_of(bench, 3, "k1", "10.0.0.1") + _requests_of(bench, 2, "k1", "10.0.0.2")
    await _until(lambda: sum(task.done() for task in flood) == 2)
    refused = [task.result() for task in flood if task.done()]
    assert {response.status_code for response in refused} == {429}
    assert all("limit of 3 for one key (--max-inflight-per-key)" in response.text for response in refused)
    assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
    others = _requests_of(bench, 3, "k2", "10.0.0.1")
    await _until(lambda: len(bench.dispatcher.requests) == 6)
    bench.dispatcher.hold.set()
    assert {(await task).status_code for task in others} == {200}
    await asyncio.gather(*flood)
    (again,) = _requests_of(bench, 1, "k1", "10.0.0.1")
    assert (await again).status_code == 200, "the places of the key are free again"


@pytest.mark.case("fairness")
async def test_the_weight_of_an_api_key_travels_with_its_requests(make_bench: MakeBench) -> None:
    bench = make_bench(api_key=("k1", "k2"), api_key_weights=(4, 1))
    for key in ("k1", "k2"):
        (task,) = _requests_of(bench, 1, key, "10.0.0.1")
        assert (await task).status_code == 200
    assert [weight_of(caller_path(request.client)[0]) for request in bench.dispatcher.requests] == [4, 1]


@pytest.mark.case("fairness")
@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_inflight_per_key": 3}, "--max-inflight-per-key needs API keys"),
        ({"api_key": ("k1", "k2"), "api_key_weights": (2,)}, "1 weights for 2 API keys"),
        ({"api_key_weights": (2,)}, "1 weights for 0 API keys"),
    ],
)
def test_limits_and_weights_of_keys_without_their_keys_are_refused_at_start(
    options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        ServerConfig(**options)
