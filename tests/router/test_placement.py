"""A request may ask for a worker, a role or the workers of its group; it is served elsewhere while they cannot."""

from __future__ import annotations

import asyncio

import pytest

from kvist import wire
from kvist.request import FinishReason, RequestId, Role
from kvist.router.config import RouterConfig, RoutingOptions
from kvist.router.placement import Placement
from kvist.router.registry import Worker
from kvist.router.sent_together import MOST_TOKENS_TOGETHER, Message, sent_together, submits_of
from kvist.testing.router_bench import RouterBench, read_all, settle
from kvist.testing.specs import make_pool, make_request, submit_full

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


@pytest.mark.parametrize(("name", "role"), [("e", Role.DECODE), ("q", Role.PREFILL), ("u", Role.UNIFIED)])
async def test_a_named_worker_of_the_named_role_serves_as_that_role_does(name: str, role: Role) -> None:
    bench, workers = pairs_and_a_unified_worker()
    found = await served(bench, Placement(worker=name, role=role))
    assert name in found
    assert {workers[each].role for each in found} == ({Role.PREFILL, Role.DECODE} if name == "q" else {role})


async def test_a_worker_that_is_not_of_the_named_role_serves_the_request() -> None:
    bench, _ = pairs_and_a_unified_worker()
    assert "p" in await served(bench, Placement(worker="p", role=Role.DECODE))


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


async def test_the_requests_of_a_group_are_sent_in_one_message() -> None:
    bench = RouterBench()
    new, old = bench.engines.join("new"), bench.engines.join("old", protocol_version=5)
    for worker in (new, old):
        placement = Placement(group=worker.url, worker=worker.url)
        requests = [make_request(f"r{number}", PROMPT, max_tokens=0, num_shared_tokens=90) for number in range(3)]
        tasks = [asyncio.create_task(read_all(bench.dispatcher.generate(each, placement))) for each in requests]
        await settle()
        assert len(bench.engines.submits(worker)) == 3
        messages = [message for to, message in bench.engines.sent if to is worker]
        assert [len(submits_of(message)) for message in messages] == ([3] if worker is new else [1, 1, 1])
        for task in tasks:
            task.cancel()
        await settle()
        assert len(bench.engines.aborts(worker)) == 3


def test_requests_that_share_tokens_are_joined_up_to_a_limit_and_before_their_aborts() -> None:
    bench = RouterBench()
    first, second = bench.engines.join("a"), bench.engines.join("b")

    def submit(name: str, num_tokens: int, shared: int = 1) -> wire.Submit:
        return submit_full(make_request(name, [1] * num_tokens, num_shared_tokens=shared))

    submits = [submit(f"r{number}", MOST_TOKENS_TOGETHER // 2) for number in range(5)]
    long, alone, abort = (
        submit("long", MOST_TOKENS_TOGETHER + 1),
        submit("alone", 3, 0),
        wire.Abort(request_id=RequestId("r0")),
    )
    sends: list[tuple[Worker, Message]] = [
        (first, submits[0]),
        (first, abort),
        (second, alone),
        *((first, each) for each in submits[1:]),
    ]
    sends += [(first, long), (second, submits[0])]
    found = list(sent_together(sends))
    assert [(worker.url, [each.request.request_id for each in submits_of(message)]) for worker, message in found] == [
        ("a", ["r0", "r1"]),
        ("a", ["r2", "r3"]),
        ("a", ["r4"]),
        ("a", ["long"]),
        ("b", ["r0"]),
        ("a", []),  # the Abort
        ("b", ["alone"]),
    ]


async def test_a_group_that_cannot_be_sent_goes_elsewhere() -> None:
    bench = RouterBench()
    gone, other = bench.engines.join("gone"), bench.engines.join("other")
    bench.engines.unreachable.add(gone)
    requests = [make_request(f"r{number}", PROMPT, max_tokens=0, num_shared_tokens=90) for number in range(3)]
    placement = Placement(group="g", worker="gone")
    tasks = [asyncio.create_task(read_all(bench.dispatcher.generate(each, placement))) for each in requests]
    await bench.pass_time(0.5)
    assert len(bench.engines.submits(other)) == 3
    for task in tasks:
        task.cancel()
    await settle()
