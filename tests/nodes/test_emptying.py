"""A store is emptied only into stores with room, and an attempt that ends early lets it take pages again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import pytest

from kvist.errors import Conflict, Unavailable
from kvist.mooncake.master_admin import DrainJob, HeldPage, MasterAdmin, Segment
from kvist.nodes.emptying import BATCH_BYTES, Emptying, check_room
from kvist.testing.clocks import FakeClock

PAGE_BYTES = BATCH_BYTES // 4


def segment(name: str, *, size: int, used: int, status: str = "OK") -> Segment:
    return Segment(name, name, f"run of {name}", status, size, used)


def test_the_pages_of_a_store_must_fit_into_the_others() -> None:
    store = segment("a", size=100, used=60)
    check_room(store, [store, segment("b", size=100, used=40)])
    check_room(store, [store, segment("b", size=100, used=70), segment("c", size=100, used=70)])
    for others in (
        [],
        [segment("b", size=100, used=41)],
        [segment("b", size=100, used=0, status="DRAINING")],
    ):
        with pytest.raises(Conflict, match=r"do not fit into the other stores .* add a store first"):
            check_room(store, [store, *others])


class FakeAdmin(MasterAdmin):
    """A master whose job ends when the test says so, with some keys in the memory of one store, and some on its SSD
    only."""

    def __init__(self, alone: Sequence[str] = (), in_memory: Sequence[str] = ()) -> None:
        self.job = DrainJob(success=True, job_id="1", status_name="RUNNING", blocked_units=3)
        self.alone, self.in_memory = list(alone), list(in_memory)
        self.cancelled: list[str] = []

    def start_drain(self, segment_names: Sequence[str]) -> DrainJob:
        assert segment_names == ["a"]
        return self.job

    def drain_job(self, job_id: str) -> DrainJob:
        assert job_id == "1"
        return self.job

    def cancel_drain(self, job_id: str) -> None:
        self.cancelled.append(job_id)

    def keys(self) -> Iterator[str]:
        return iter(["x", *self.in_memory, *self.alone, "y"])

    def only_on_disk_of(self, client_id: str, keys: Sequence[str]) -> list[HeldPage]:
        assert client_id == "run of a"
        return [HeldPage(key=key, num_bytes=PAGE_BYTES, num_copies=0) for key in keys if key in self.alone]

    def in_memory_of(self, session: str, keys: Sequence[str]) -> list[HeldPage]:
        assert session == "engine of a"
        return [HeldPage(key=key, num_bytes=PAGE_BYTES, num_copies=2) for key in keys if key in self.in_memory]


class Store:
    """The ends of the attempts, and the pages that were moved."""

    def __init__(self, admin: FakeAdmin) -> None:
        self.admin, self.ends = admin, list[bool]()
        self.has_room = True
        self.moves: list[list[str]] = []

    async def move(self, pages: Sequence[HeldPage]) -> int:
        if not self.has_room:
            return 0
        keys = [page.key for page in pages]
        self.moves.append(keys)
        self.admin.alone = [key for key in self.admin.alone if key not in keys]
        self.admin.in_memory = [key for key in self.admin.in_memory if key not in keys]
        return len(keys)

    def start(self) -> Emptying:
        return Emptying(
            self.admin,
            segment("a", size=9, used=9),
            session="engine of a",
            move=self.move,
            on_end=lambda *, succeeded: self.ends.append(succeeded),
            clock=FakeClock(),
        )


async def until_ended(store: Store) -> None:
    async with asyncio.timeout(60):
        while not store.ends:
            await asyncio.sleep(0.01)


async def test_pages_in_memory_and_on_the_ssd_are_moved() -> None:
    store = Store(FakeAdmin(alone=["k1", "k2"]))
    emptying = store.start()
    await asyncio.sleep(0.05)
    assert emptying.progress()["num_waiting"] == 3
    store.admin.job = DrainJob(success=True, job_id="1", status_name="SUCCEEDED", succeeded_units=7)
    await until_ended(store)
    assert store.ends == [True]
    progress = emptying.progress()
    assert (progress["num_moved"], progress["num_moved_from_ssd"], progress["num_left_on_ssd"]) == (7, 2, 0)
    assert not store.admin.cancelled


async def test_pages_in_memory_are_moved_in_batches_beside_the_masters_job() -> None:
    keys = [f"k{index}" for index in range(10)]
    store = Store(FakeAdmin(in_memory=keys))
    emptying = store.start()
    async with asyncio.timeout(60):
        while emptying.progress()["num_moved"] != 10:
            await asyncio.sleep(0.01)
    assert store.moves == [keys[:4], keys[4:8], keys[8:]], "four pages are as large as a batch may be"
    assert emptying.progress()["moved_bytes"] == 10 * PAGE_BYTES
    assert not store.ends, "the master's job has not ended"
    store.admin.job = DrainJob(success=True, job_id="1", status_name="SUCCEEDED", succeeded_units=1, failed_units=9)
    await until_ended(store)
    assert store.ends == [True]
    assert emptying.progress()["num_moved"] == 11


async def test_an_attempt_that_is_ended_cancels_the_masters_job() -> None:
    store = Store(FakeAdmin())
    emptying = store.start()
    await asyncio.sleep(0.05)
    await emptying.cancel()
    assert (store.ends, store.admin.cancelled) == ([False], ["1"])
    assert emptying.has_failed


@pytest.mark.parametrize("why", ["the job fails", "pages on the SSD find no room"])
async def test_a_failed_attempt_says_why(why: str) -> None:
    store = Store(FakeAdmin(alone=["k1"]))
    store.has_room = False
    status = "FAILED" if why == "the job fails" else "SUCCEEDED"
    store.admin.job = DrainJob(success=True, job_id="1", status_name=status)
    emptying = store.start()
    await until_ended(store)
    assert store.ends == [False]
    assert emptying.has_failed
    assert ("other stores with room" if status == "FAILED" else "1 pages on the SSD") in str(
        emptying.progress()["error"]
    )


async def test_a_master_that_is_gone_fails_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(FakeAdmin())

    def refuse(_names: Sequence[str]) -> DrainJob:
        raise Unavailable("gone")

    monkeypatch.setattr(store.admin, "start_drain", refuse)
    emptying = store.start()
    await until_ended(store)
    assert emptying.progress()["error"] == "gone"
