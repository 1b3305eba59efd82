"""The way of a handoff: directly or through the store; and the life of a request that goes through the store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest

from kvist import wire
from kvist.flight.handoff_report import StoredPages
from kvist.options import compose
from kvist.plan.compat import TransportChoice
from kvist.request import FinishReason, Mode, Outcome, Role
from kvist.router.config import HANDOFFS, RouterConfig, RoutingOptions
from kvist.router.handoff_ways import Way, WayCause, choose_way
from kvist.router.registry import Worker
from kvist.router.stream import StreamPart
from kvist.testing.router_bench import RouterBench, read_all, settle
from kvist.testing.specs import make_load, make_pool, make_request

COMMON = TransportChoice(name="shm", reason="shm: near")
NONE = TransportChoice(name=None, reason="shm: far away")
OTHER_PAGES = TransportChoice(name=None, reason="another model", compatible=False)
STORED = StoredPages(num_pages=25, num_stored=25, duration_s=0.004)
PROMPT = tuple(range(100))


def status(location: str = "file:/pages", state: str = "attached", breaker: str = "closed") -> wire.StorageStatus:
    return wire.StorageStatus(
        backend="file",
        options={},
        prefetch_policy="timeout",
        state=state,
        breaker=breaker,
        num_quarantined_pages=0,
        stored_bytes=0,
        errors={},
        location=location,
    )


class World(RouterBench):
    """A dispatcher that hands over through the store, a prefill and two decode workers."""

    def __init__(self, handoff: str = "store", **decode: Any) -> None:
        super().__init__(compose(RouterConfig, {"handoff": handoff}))
        self.prefill = self.join("p", Role.PREFILL)
        self.decode = self.join("d", Role.DECODE, **decode)

    def join(self, name: str, role: Role, storage: wire.StorageStatus | None = None, **spec: Any) -> Worker:
        worker = self.engines.join(name, role=role, **spec)
        worker.load = make_load(storage=storage or status())
        return worker

    def generate(self, **fields: Any) -> AsyncGenerator[StreamPart, None]:
        return self.dispatcher.generate(make_request("r", PROMPT, **fields))

    async def first_token(self, token_id: int = 7) -> asyncio.Task[list[int]]:
        task = await self.begin(make_request("r", PROMPT))
        self.engines.emit(self.prefill, 0, token_id)
        await settle()
        return task

    def stored(self, stored: StoredPages | None = STORED) -> None:
        """End the request at prefill, with its pages stored."""
        request_id = self.engines.submits(self.prefill)[-1].request.request_id
        ended = wire.Ended(request_id=request_id, outcome=Outcome.FINISHED, stored=stored)
        self.engines.events.on_outputs(self.prefill, wire.StepOutputs(ended=(ended,)))


def way_of(
    wanted: str, transport: TransportChoice, *storages: wire.StorageStatus | None
) -> tuple[Way | None, WayCause, str]:
    world = RouterBench()
    workers = [world.engines.join("p", role=Role.PREFILL), world.engines.join("d", role=Role.DECODE)]
    for worker, storage in zip(workers, storages or (status(), status()), strict=True):
        worker.load = make_load(storage=storage)
    found = choose_way(wanted, workers[0], workers[1], transport)
    return found.way, found.cause, found.reason


def test_a_way_is_chosen_by_what_is_wanted_and_what_the_two_workers_have_in_common() -> None:
    store, direct, cause = Way.STORE, Way.DIRECT, WayCause
    where = "both workers use the store file:/pages"
    assert way_of("auto", COMMON) == (direct, cause.TRANSPORT, "shm: near")
    assert way_of("auto", NONE) == (store, cause.NO_TRANSPORT, f"{where}; shm: far away")
    assert way_of("direct", COMMON) == (direct, cause.WANTED, "shm: near")
    assert way_of("direct", NONE) == (None, cause.NO_TRANSPORT, "shm: far away")
    assert way_of("store", COMMON) == (store, cause.WANTED, where)
    assert way_of("store", NONE) == (store, cause.WANTED, where)


@pytest.mark.parametrize(
    ("storages", "says"),
    [
        ((None, status()), "worker p has no store (--hicache-storage-backend)"),
        ((status(), None), "worker d has no store (--hicache-storage-backend)"),
        ((status(), status(state="detaching")), "worker d has no store (--hicache-storage-backend)"),
        ((status(breaker="open"), status()), "the store of worker p does not answer"),
        ((status(), status(location="file:/b")), "worker p uses the store file:/pages, worker d file:/b"),
    ],
)
def test_without_a_common_store_pages_travel_directly_or_not_at_all(
    storages: tuple[wire.StorageStatus | None, ...], says: str
) -> None:
    assert way_of("store", COMMON, *storages) == (Way.DIRECT, WayCause.NO_STORE, f"shm: near; {says}")
    for wanted in ("store", "auto"):
        assert way_of(wanted, NONE, *storages) == (None, WayCause.NO_TRANSPORT, f"shm: far away; {says}")


@pytest.mark.parametrize("wanted", HANDOFFS)
def test_pages_with_another_meaning_travel_on_no_way(wanted: str) -> None:
    assert way_of(wanted, OTHER_PAGES) == (None, WayCause.NO_TRANSPORT, "another model")


def test_a_worker_without_a_report_has_no_store() -> None:
    world = RouterBench()
    workers = [world.engines.join("p", role=Role.PREFILL), world.engines.join("d", role=Role.DECODE)]
    assert choose_way("store", workers[0], workers[1], NONE).way is None


async def test_workers_of_two_hosts_with_one_store_hand_over_through_it() -> None:
    world = World("auto")
    far = world.join("far", Role.PREFILL, host_id="two", transports=(make_pool(),))
    world.engines.lose(world.prefill)
    await world.begin(make_request("r", PROMPT))
    (submit,) = world.engines.submits(far)
    assert (submit.mode, submit.handoff) == (Mode.PREFILL, "store")
    assert world.dispatcher.snapshot().handoffs == {(Way.STORE, WayCause.NO_TRANSPORT): 1}


# ---------------------------------------------------------------- the life of a request


async def test_decode_gets_the_request_with_the_first_token_when_the_pages_are_stored() -> None:
    world = World()
    stream = world.generate()
    first = asyncio.create_task(anext(stream))
    await settle()
    (submit,) = world.engines.submits(world.prefill)
    assert (submit.mode, submit.handoff, submit.handoff_id, submit.target_epoch) == (Mode.PREFILL, "store", None, None)
    assert world.engines.submits(world.decode) == []
    world.engines.emit(world.prefill, 0, 7)
    assert (await first).chunk.token_ids == (7,), "the client does not wait for the store"
    assert world.engines.submits(world.decode) == []
    world.stored()
    (submit,) = world.engines.submits(world.decode)
    assert (submit.mode, submit.handoff, submit.request.output_token_ids) == (Mode.FULL, "store", (7,))
    world.engines.emit(world.decode, 1, 8, finish=FinishReason.LENGTH)
    part = await anext(stream)
    assert (part.chunk.token_ids, part.prefill_worker, part.decode_worker) == ((8,), "p", "d")
    assert part.stored == STORED
    assert part.handoff is not None
    assert part.handoff.way is Way.STORE
    world.engines.end(world.decode)
    assert await read_all(stream) == []
    assert world.idle()
    assert world.dispatcher.snapshot().handoffs == {(Way.STORE, WayCause.WANTED): 1}


async def test_a_first_token_that_ends_the_answer_is_not_continued() -> None:
    world = World()
    task = await world.begin(make_request("r", PROMPT))
    world.engines.emit(world.prefill, 0, 7, finish=FinishReason.STOP)
    world.stored(None)
    assert await task == [7]
    assert world.engines.submits(world.decode) == []
    assert world.idle()


@pytest.mark.parametrize("end", ["lost", "failed", "aborted"])
async def test_a_prefill_that_fails_after_the_first_token_fails_no_request(end: str) -> None:
    world = World()
    task = await world.first_token()
    if end == "lost":
        world.engines.lose(world.prefill)
    else:
        world.engines.end(world.prefill, Outcome(end), error_code="timeout")
    world.engines.emit(world.decode, 1, 8, finish=FinishReason.LENGTH)
    world.engines.end(world.decode)
    assert await task == [7, 8]
    assert world.idle()


async def test_a_prefill_that_fails_before_the_first_token_is_replaced() -> None:
    world = World()
    other = world.join("p2", Role.PREFILL)
    task = await world.begin(make_request("r", PROMPT))
    first, second = (world.prefill, other) if world.engines.submits(world.prefill) else (other, world.prefill)
    world.engines.lose(first)
    await settle()
    world.engines.emit(second, 0, 7)
    world.engines.end(second)
    world.engines.emit(world.decode, 1, 8, finish=FinishReason.LENGTH)
    assert await task == [7, 8]


@pytest.mark.parametrize("end", ["gone", "full", "lost"])
async def test_a_decode_worker_that_cannot_continue_is_replaced_once(end: str) -> None:
    world = World()
    task = await world.first_token()
    if end == "gone":
        world.engines.lose(world.decode)
    other = world.join("d2", Role.DECODE)
    world.stored()
    if end != "gone":
        chosen = world.engines.submits(world.decode)
        assert len(chosen) == 1
        if end == "lost":
            world.engines.lose(world.decode)
        else:
            world.engines.end(world.decode, Outcome.FAILED, error_code="overloaded")
    (submit,) = world.engines.submits(other)
    assert (submit.mode, submit.request.output_token_ids) == (Mode.FULL, (7,))
    world.engines.emit(other, 1, 8, finish=FinishReason.LENGTH)
    world.engines.end(other)
    assert await task == [7, 8]
    assert world.idle()


@pytest.mark.parametrize("end", ["full", "lost"])
async def test_without_another_decode_worker_prefill_writes_the_rest(end: str) -> None:
    world = World()
    task = await world.first_token()
    world.stored()
    if end == "lost":
        world.engines.lose(world.decode)
    else:
        world.engines.end(world.decode, Outcome.FAILED, error_code="overloaded", message="full")
    submit = world.engines.submits(world.prefill)[-1]
    assert (submit.mode, submit.handoff, submit.request.output_token_ids) == (Mode.FULL, "store", (7,))
    world.engines.emit(world.prefill, 1, 8, finish=FinishReason.LENGTH)
    world.engines.end(world.prefill)
    assert await task == [7, 8]
    assert world.idle()


async def test_a_client_that_leaves_between_prefill_and_decode_starts_nothing() -> None:
    world = World()
    stream = world.generate()
    first = asyncio.create_task(anext(stream))
    await settle()
    world.engines.emit(world.prefill, 0, 7)
    await first
    await stream.aclose()
    assert len(world.engines.aborts(world.prefill)) == 1
    world.engines.end(world.prefill, Outcome.ABORTED)
    assert world.engines.submits(world.decode) == []
    assert world.idle()


def test_the_option_names_every_way_that_can_be_wanted() -> None:
    assert msgspec.convert(RoutingOptions().handoff, str) in HANDOFFS
