"""How soon a worker that is gone is out of the routing: at once when its socket closes, within 3 s of silence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import httpx
import msgspec
import pytest

from kvist import wire
from kvist.channel import ChannelConfig
from kvist.request import Role, WorkerId
from kvist.router.config import LinkOptions, RouterConfig
from kvist.router.discovery import SUSPENDED_S
from kvist.router.dispatch import Dispatcher
from kvist.router.fleet import ASK_S, Fleet
from kvist.router.membership import NamedWorker
from kvist.router.registry import Registry, WorkerState
from kvist.testing.clocks import FakeClock
from kvist.testing.fake_engine import CLUSTER_KEY, FakeEngine
from kvist.testing.specs import make_roomy_spec
from kvist.testing.waits import until
from tests.router.conftest import StartEngine

STEP_S = 0.05
NOTICED_S = 3.0


class World:
    """One engine that a gateway knows, at a time that the test moves. `health` is what its worker answers."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.clock = FakeClock()
        self.health: wire.EngineHealth | None = wire.EngineHealth()  # None: the worker does not answer
        config = RouterConfig(links=LinkOptions(keepalive_s=STEP_S))
        self.registry = Registry(config)
        fleet = Fleet(
            registry=self.registry,
            config=config,
            channel=ChannelConfig(cluster_key=CLUSTER_KEY),
            clock=self.clock,
            transport=httpx.MockTransport(self._answer),
        )
        fleet.join(NamedWorker(url="http://w:1"))
        self.dispatcher = Dispatcher(config=config, registry=self.registry, engines=fleet, clock=self.clock)

    def _answer(self, _request: httpx.Request) -> httpx.Response:
        if self.health is None:
            raise httpx.ReadTimeout("no answer")
        info = {"engine": self.engine.spec, "engine_health": self.health}
        return httpx.Response(200, content=msgspec.json.encode(info))

    def is_routed_to(self) -> bool:
        return bool(self.registry.ready(Role.UNIFIED))

    async def seconds_until_lost(
        self, health_at: Callable[[float], wire.EngineHealth | None], at_most_s: float
    ) -> float:
        """Move the clock until the worker gets no more requests; return how far, or `at_most_s`."""
        began_s = self.clock.now_s()
        while self.is_routed_to() and self.clock.now_s() - began_s < at_most_s:
            self.clock.advance(STEP_S)
            self.health = health_at(self.clock.now_s() - began_s)
            await asyncio.sleep(1.5 * STEP_S)  # the fleet looks once in a step
        return self.clock.now_s() - began_s


@pytest.fixture
async def world(start_engine: StartEngine) -> AsyncIterator[World]:
    made = World(start_engine(spec=make_roomy_spec(worker_id=WorkerId("w"))))
    await made.dispatcher.start()
    await until(made.is_routed_to)
    yield made
    await made.dispatcher.close()


async def test_a_worker_whose_socket_closes_is_out_of_the_routing_without_any_wait(world: World) -> None:
    world.engine.stop()  # the clock stands still
    async with asyncio.timeout(60):
        while world.is_routed_to():
            await asyncio.sleep(0.001)


async def test_a_worker_that_is_silent_and_does_not_answer_is_out_of_the_routing_within_three_seconds(
    world: World,
) -> None:
    world.engine.silent = True
    lost_s = await world.seconds_until_lost(lambda _now_s: None, 10.0)
    assert LinkOptions().worker_silence_s < lost_s
    assert lost_s + ASK_S <= NOTICED_S, "also if the question for its state takes as long as it may"


async def test_a_suspended_engine_is_out_of_the_routing_within_three_seconds_as_its_worker_says(world: World) -> None:
    world.engine.silent = True
    old_s = 0.5  # the worker looks for heartbeats twice a second
    lost_s = await world.seconds_until_lost(
        lambda now_s: wire.EngineHealth(silent_s=now_s - old_s, stalled_s=now_s - old_s, turn_s=now_s - old_s), 10.0
    )
    assert SUSPENDED_S < lost_s <= NOTICED_S
    assert "suspended" in world.registry.workers[0].problem


async def test_an_engine_in_a_long_step_is_not_lost_even_on_a_gpu_where_progress_cannot_be_seen(world: World) -> None:
    world.engine.silent = True
    at_most_s = NOTICED_S + 0.5
    lost_s = await world.seconds_until_lost(lambda now_s: wire.EngineHealth(turn_s=now_s, stalled_s=now_s), at_most_s)
    assert world.is_routed_to()
    assert lost_s >= at_most_s


async def test_a_message_that_comes_while_the_worker_is_asked_counts(world: World) -> None:
    world.engine.silent = True

    def speak(now_s: float) -> None:
        if now_s > LinkOptions().worker_silence_s - 2 * STEP_S:
            world.engine.silent = False

    await world.seconds_until_lost(speak, 3.0)
    assert world.registry.workers[0].state is WorkerState.READY
