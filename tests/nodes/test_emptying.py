"""A store is emptied only into stores with room, and an attempt that ends early lets it take pages again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import pytest

from kvist.errors import Conflict, Unavailable
from kvist.mooncake.master_admin import DrainJob, MasterAdmin, Segment
from kvist.nodes.emptying import Emptying, check_room
from kvist.testing.clocks import FakeClock


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
    """A master whose job ends when the test says so, with some keys on the SSD of one store only."""

    def __init__(self, alone: Sequence[str] = ()) -> None:
        self.job = DrainJob(success=True, job_id="1", status_name="RUNNING", blocked_units=3)
        self.alone = list(alone)
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
        return iter(["x", *self.alone, "y"])

    def only_on_disk_of(self, client_id: str, keys: Sequence[str]) -> list[str]:
        assert client_id == "run of a"
        return [key for key in keys if key in self.alone]


class Store:
    """The ends of the attempts, and the pages that were moved."""

    def __init__(self, admin: FakeAdmin) -> None:
        self.admin, self.ends = admin, list[bool]()
        self.has_room = True

    async def move(self, keys: Sequence[str]) -> int:
        if not self.has_room:
            return 0
        self.admin.alone = [key for key in self.admin.alone if key not in keys]
        return len(keys)

    def start(self) -> Emptying:
        return Emptying(
            self.admin,
            segment("a", size=9, used=9),
            move_to_memory=self.move,
            on_end=lambda *, succeeded: self.ends.append(succeeded),
            clock=FakeClock(),
        )


async def until_ended(store: Store) -> None:
    async with asyncio.timeout(30):
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
