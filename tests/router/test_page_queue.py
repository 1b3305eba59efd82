"""Page events are applied one message a turn, between the index's own slices of work."""

from __future__ import annotations

import asyncio

from kvist.request import EpochId, WorkerId
from kvist.router.config import RouterConfig
from kvist.router.page_queue import MAX_WAITING, PageQueue
from kvist.router.registry import Registry, Worker
from kvist.testing.specs import make_roomy_spec
from kvist.wire import PageEvents, Welcome


class World:
    def __init__(self) -> None:
        self.registry = Registry(RouterConfig())
        self.queue = PageQueue(self.registry.index, self._apply)
        self.applied: list[tuple[str, int]] = []

    def _apply(self, worker: Worker, events: PageEvents) -> None:
        self.applied.append((worker.url, events.sequence))

    def join(self, url: str, epoch: str = "first") -> Worker:
        worker = self.registry.find(url) or self.registry.add(url, None, 0.0)
        spec = make_roomy_spec(worker_id=WorkerId(url), epoch=EpochId(f"{epoch} of {url}"))
        self.registry.on_welcome(worker, Welcome(spec=spec), 0.0)
        return worker


async def test_each_turn_of_the_event_loop_applies_one_message_in_order() -> None:
    world = World()
    a, b = world.join("http://a"), world.join("http://b")
    for sequence in range(3):
        assert world.queue.put(a, PageEvents(sequence=sequence))
        assert world.queue.put(b, PageEvents(sequence=sequence))
    assert world.applied == []
    for number in range(6):
        assert len(world.applied) == number
        await asyncio.sleep(0)
    assert world.applied == [(url, sequence) for sequence in range(3) for url in ("http://a", "http://b")]


async def test_the_index_works_between_two_messages_and_after_the_last() -> None:
    world = World()
    a, b = world.join("http://a"), world.join("http://b")
    world.registry.index.store(a.worker_id, "device", bytes(range(160)))
    world.registry.on_lost(a, "gone")
    assert world.registry.index.has_work
    world.queue.put(b, PageEvents(sequence=0))
    for _ in range(5):
        await asyncio.sleep(0)
    assert world.applied == [("http://b", 0)]
    assert not world.registry.index.has_work
    assert world.registry.index.num_entries == 0


async def test_a_worker_that_floods_the_queue_loses_messages_and_others_do_not() -> None:
    world = World()
    a, b = world.join("http://a"), world.join("http://b")
    accepted = [world.queue.put(a, PageEvents(sequence=sequence)) for sequence in range(MAX_WAITING + 5)]
    assert accepted == [True] * MAX_WAITING + [False] * 5
    assert world.queue.put(b, PageEvents(sequence=0))
    await asyncio.sleep(0)
    assert world.queue.put(a, PageEvents(sequence=99)), "one was applied"


async def test_events_of_a_process_that_is_gone_are_dropped() -> None:
    world = World()
    a = world.join("http://a")
    world.queue.put(a, PageEvents(sequence=0))
    world.registry.on_lost(a, "gone")
    assert not world.queue.put(a, PageEvents(sequence=1))
    world.join("http://a", "second")
    world.queue.put(a, PageEvents(sequence=2))
    for _ in range(5):
        await asyncio.sleep(0)
    assert world.applied == [("http://a", 2)]


async def test_a_closed_queue_applies_nothing() -> None:
    world = World()
    world.queue.put(world.join("http://a"), PageEvents(sequence=0))
    world.queue.close()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert world.applied == []
