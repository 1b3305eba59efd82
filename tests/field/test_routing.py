"""Reports on routing by cached pages: SGLang #14305 and #32195, production-stack #1035, vLLM Router #294.

There, new prompts went to the worker with the smallest cache although it was overloaded; affinity was switched off
while loads differed; every request with a popular prefix went to the one worker that had it; and the router matched
texts, got no signal of evictions and knew nothing at first.
"""

from __future__ import annotations

import pytest

from kvist.kv.keys import page_digests
from kvist.router.config import RouterConfig, RoutingOptions
from kvist.router.registry import Worker
from kvist.testing.page_events import joined
from kvist.testing.router_bench import RouterBench
from kvist.testing.specs import make_request
from kvist.wire import ListedPages, PageEvents, TierChanges

PREFIX = tuple(range(3200))
NAMES = ("a", "b", "c", "d")
BY_CACHE = pytest.mark.parametrize("policy", ["cache_aware", "cost"])


def fleet(policy: str, num_workers: int = 4) -> tuple[RouterBench, list[Worker]]:
    bench = RouterBench(RouterConfig(routing=RoutingOptions(policy=policy)))
    return bench, [bench.engines.join(name) for name in NAMES[:num_workers]]


def pages_of(worker: Worker, token_ids: tuple[int, ...], salt: str = "") -> bytes:
    assert worker.spec is not None
    return joined(*page_digests(token_ids, worker.spec.page_size, worker.spec.namespace, salt))


def store(bench: RouterBench, worker: Worker, token_ids: tuple[int, ...]) -> None:
    """Let the index know that the worker has these pages."""
    bench.registry.index.store(worker.worker_id, "device", pages_of(worker, token_ids))


def prompt(number: int, num_own: int = 160, prefix: tuple[int, ...] = PREFIX) -> tuple[int, ...]:
    return *prefix, *([5000 + number] * num_own)


async def send(bench: RouterBench, name: str, token_ids: tuple[int, ...], salt: str = "") -> Worker:
    """Send a request that stays open; return its worker."""
    num_sent = len(bench.engines.sent)
    await bench.begin(make_request(name, token_ids, cache_salt=salt))
    ((worker, _),) = bench.engines.sent[num_sent:]
    return worker


async def end_all(bench: RouterBench, workers: list[Worker]) -> None:
    """Let every worker die, so that no reader waits any longer."""
    await bench.dispatcher.close()
    for worker in workers:
        bench.engines.lose(worker)


@BY_CACHE
async def test_sglang_14305_a_new_prompt_goes_to_an_idle_worker_and_not_to_a_smaller_cache(
    policy: str,
) -> None:
    bench, (busy,) = fleet(policy, 1)
    for number in range(3):
        await send(bench, f"old {number}", (number,) * 1600)
    idle = bench.engines.join("idle")
    store(bench, idle, PREFIX)  # a large cache, of no use for the next prompt
    assert await send(bench, "new", (77,) * 1600) is idle
    await end_all(bench, [busy, idle])


@BY_CACHE
async def test_sglang_32195_affinity_holds_while_another_worker_is_overloaded(policy: str) -> None:
    bench, (overloaded,) = fleet(policy, 1)
    for number in range(60):
        await send(bench, f"old {number}", (600 + number,) * 160)
    holder = bench.engines.join("holder")
    for number in range(3):
        assert await send(bench, f"new {number}", (700 + number,) * 160) is holder
    store(bench, holder, PREFIX)
    idle = bench.engines.join("idle")
    assert await send(bench, "turn", prompt(0)) is holder
    await end_all(bench, [overloaded, holder, idle])


@BY_CACHE
async def test_production_stack_1035_a_popular_prefix_does_not_pile_up_at_its_holder(policy: str) -> None:
    bench, workers = fleet(policy)
    store(bench, workers[0], PREFIX)
    first = await send(bench, "r", prompt(0, 1600))
    assert first is workers[0]
    for number in range(1, 80):
        await send(bench, f"r{number}", prompt(number, 1600))
    counts = [len(bench.engines.submits(worker)) for worker in workers]
    assert sum(counts) == 80
    assert max(counts) <= 2 * 80 / len(workers), counts
    await end_all(bench, workers)


@BY_CACHE
async def test_vllm_router_294_pages_count_and_not_texts(policy: str) -> None:
    bench, workers = fleet(policy)
    store(bench, workers[2], PREFIX)
    assert await send(bench, "same", prompt(1)) is workers[2]
    shifted = bench.registry.index.match([pages_of(workers[2], (1, *PREFIX))])
    assert shifted == {}, "one token more at the front: no page is the same"
    assert bench.registry.index.match([pages_of(workers[2], PREFIX, "salt")]) == {}
    await end_all(bench, workers)


@BY_CACHE
async def test_vllm_router_294_an_evicted_prefix_attracts_no_request(policy: str) -> None:
    bench, workers = fleet(policy)
    cold, holder = workers[0], workers[3]
    assert holder.pages is not None
    holder.pages.request(0.0)
    listed = ListedPages(tier="device", digests=pages_of(holder, PREFIX), first_piece=0)
    bench.registry.on_page_events(holder, PageEvents(sequence=0, listed=(listed,)), 0.0)
    assert await send(bench, "first", prompt(0)) is holder, "the first request of this gateway is not blind"
    bench.engines.end(holder)
    evicted = TierChanges(tier="device", removed=pages_of(holder, PREFIX))
    bench.registry.on_page_events(holder, PageEvents(sequence=1, changes=(evicted,)), 0.0)
    assert await send(bench, "second", prompt(1)) is cold
    await end_all(bench, workers)
