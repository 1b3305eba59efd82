"""A request may ask for a worker, a role or the workers of its group; it is served elsewhere while they cannot."""

from __future__ import annotations

import asyncio

import pytest

from kvist.request import FinishReason, Role
from kvist.router.config import RouterConfig, RoutingOptions
from kvist.router.placement import Placement
from kvist.router.registry import Worker
from kvist.testing.router_bench import RouterBench, read_all, settle
from kvist.testing.specs import make_pool, make_request

POOL = make_pool(num_pages=1 << 16)
PROMPT = range(100)


def pairs_and_a_unified_worker(policy: str = "cost") -> tuple[RouterBench, dict[str, Worker]]:
    bench = RouterBench(RouterConfig(routing=RoutingOptions(policy=policy)))
    roles = {"p": Role.PREFILL, "q": Role.PREFILL, "d": Role.DECODE, "e": Role.DECODE, "u": Role.UNIFIED}
    return bench, {name: bench.engines.join(name, role=role, transports=(POOL,)) for name, role in roles.items()}


async def served(bench: RouterBench, placement: Placement, max_tokens: int = 100) -> set[str]:
    """Return the workers that get a request with this placement, and end it."""
    sent = len(bench.engines.sent)
    request = make_request("r", PROMPT, max_tokens=max_tokens)
    task = asyncio.create_task(read_all(bench.dispatcher.generate(request, placement)))
    await settle()
    workers = {worker for worker, _ in bench.engines.sent[sent:]}
    task.cancel()
    await settle()
    for worker in workers:
        bench.engines.end(worker)
    return {worker.url for worker in workers}


@pytest.mark.parametrize("policy", ["cache_aware", "cost", "least_loaded", "round_robin"])
@pytest.mark.parametrize("name", ["p", "q", "d", "e", "u"])
async def test_the_named_worker_serves_the_request(policy: str, name: str) -> None:
    bench, workers = pairs_and_a_unified_worker(policy)
    for max_tokens in (0, 1, 8, 100):
        found = await served(bench, Placement(worker=name), max_tokens)
        assert name in found
        assert len({workers[each].role for each in found}) == len(found)
        if max_tokens <= 1:
            assert found == {name}


@pytest.mark.parametrize("role", Role)
async def test_workers_of_the_named_role_serve_the_request(role: Role) -> None:
    bench, workers = pairs_and_a_unified_worker()
    prompt_alone = await served(bench, Placement(role=role), 0)
    assert [workers[each].role for each in prompt_alone] == [role]
    whole = {workers[each].role for each in await served(bench, Placement(role=role))}
    assert whole == ({Role.PREFILL, Role.DECODE} if role is Role.PREFILL else {role})


@pytest.mark.parametrize("policy", ["cache_aware", "cost", "least_loaded", "round_robin"])
async def test_a_group_stays_on_the_worker_of_its_first_request(policy: str) -> None:
    bench, _ = pairs_and_a_unified_worker(policy)
    first = await served(bench, Placement(group="g"), 0)
    for _ in range(3):
        await served(bench, Placement(), 0)
        assert await served(bench, Placement(group="g"), 0) == first


async def test_a_prompt_alone_never_takes_a_decode_worker_while_another_is_ready() -> None:
    bench, workers = pairs_and_a_unified_worker()
    for _ in range(4):
        (name,) = await served(bench, Placement(), 0)
        assert workers[name].role is not Role.DECODE
    for name in ("p", "q", "u"):
        bench.engines.lose(workers[name])
    (name,) = await served(bench, Placement(), 0)
    assert workers[name].role is Role.DECODE


@pytest.mark.parametrize("asked", ["worker", "group", "role"])
async def test_a_request_is_served_elsewhere_while_its_place_cannot(asked: str) -> None:
    bench, workers = pairs_and_a_unified_worker()
    placement = {"worker": Placement(worker="u"), "group": Placement(group="g"), "role": Placement(role=Role.UNIFIED)}[
        asked
    ]
    if asked == "group":
        (first,) = await served(bench, placement, 0)
        bench.engines.lose(workers[first])
        (second,) = await served(bench, placement, 0)
        assert second != first
        assert await served(bench, placement, 0) == {second}, "the group follows its first request that moved"
    else:
        bench.engines.lose(workers["u"])
        assert await served(bench, placement)
    assert await served(bench, Placement(worker="unknown"))


async def test_a_stream_goes_on_at_the_workers_of_its_placement() -> None:
    bench, workers = pairs_and_a_unified_worker()
    task = asyncio.create_task(
        read_all(bench.dispatcher.generate(make_request("r", PROMPT, max_tokens=100), Placement(role=Role.PREFILL)))
    )
    await settle()
    (source,) = {worker for worker, _ in bench.engines.sent if worker.role is Role.PREFILL}
    bench.engines.lose(source)
    await bench.pass_time(0.5)
    latest = {worker.role for worker, _ in bench.engines.sent[-2:]}
    assert latest == {Role.PREFILL, Role.DECODE}
    assert workers["u"] not in {worker for worker, _ in bench.engines.sent}
    target = next(worker for worker, _ in bench.engines.sent[-2:] if worker.role is Role.DECODE)
    bench.engines.emit(target, 0, 1, 2, 3, finish=FinishReason.LENGTH)
    assert await task == [1, 2, 3]
