"""Reader processes read pages as the store itself does, also when a process dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvist.door import Given
from kvist.kv.keys import page_digests
from kvist.memory.host_pool import HostPool
from kvist.memory.persistence import PersistentPages
from kvist.page_readers.reads import RESTART_S, ProcessReads, ReaderProcess, read_by_processes
from kvist.store import STORES
from kvist.store.backend import HostMemory, PageStore, StoreContext
from kvist.testing.clocks import FakeClock
from kvist.testing.memory_store import MemoryStore
from kvist.testing.waits import wait_until

NUM_PAGES, PAGE_BYTES = 8, 10_000
KEYS = page_digests(range(NUM_PAGES), 1, "readers")
GIVE_UP_S = 20.0


class Place:
    """A file store with four of eight pages in the second half of a host pool, and its reader."""

    def __init__(self, folder: Path) -> None:
        self.host = HostPool(2 * NUM_PAGES, PAGE_BYTES, pinned=False)
        pages = self.host.tensor.numpy()
        self.into, self.content = pages[:NUM_PAGES], pages[NUM_PAGES:]
        self.content[:] = np.random.default_rng(0).integers(0, 256, self.content.shape, np.uint8)
        address, num_bytes = self.host.tensor.data_ptr(), self.host.tensor.nbytes
        memory = HostMemory(address=address, num_bytes=num_bytes, fd=self.host.fd)
        self.context = StoreContext(namespace="n", page_bytes=PAGE_BYTES, host_memory=memory)
        self.options: Given = {"path": str(folder), "size": 1.0}
        self.folder = folder
        self.store = STORES["file"].make(self.options, self.context)
        assert self.store.put(KEYS[:4], [row.data for row in self.content[:4]]) == 4
        self.clock = FakeClock(100.0)
        self.reads = self.around(self.store)

    def around(self, store: PageStore) -> ProcessReads:
        wrapped = read_by_processes(store, "file", self.options, self.context, most=1, clock=self.clock)
        assert isinstance(wrapped, ProcessReads)
        return wrapped

    def is_ready(self) -> bool:
        """Whether the next call is made by a process."""
        hits = self.store.stats().num_hits
        assert self.get() == 4
        return self.store.stats().num_hits == hits

    def get(self) -> int:
        """Read six pages, of which there are four."""
        self.into[:] = 0
        num_pages = self.reads.get(KEYS[:6], [row.data for row in self.into[:6]])
        assert (self.into[:num_pages] == self.content[:num_pages]).all()
        return num_pages


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path / "store")
    yield place
    place.reads.close()
    place.host.close()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_process_reads_what_the_store_would_read_and_its_counts_are_those_of_the_store(place: Place) -> None:
    assert place.get() == 4, "the process is being started: the thread reads"
    wait_until(place.is_ready)
    before = place.reads.stats()
    assert place.get() == 4
    after = place.reads.stats()
    assert (after.num_hits - before.num_hits, after.num_misses - before.num_misses) == (4, 2)
    assert after.stored_bytes == place.store.stats().stored_bytes > 0

    damaged = next(place.folder.rglob(f"{KEYS[2].hex()}.page"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    assert place.get() == 2
    assert place.reads.stats().num_broken == 1
    assert place.store.stats().num_broken == 0, "a process has found it"
    assert not damaged.exists()
    assert place.reads.exists(KEYS) == 2
    assert place.reads.put(KEYS[2:3], [place.content[2].data]) == 1
    assert place.get() == 4


def test_a_page_outside_the_pool_is_read_by_the_thread(place: Place) -> None:
    wait_until(place.is_ready)
    page = memoryview(bytearray(PAGE_BYTES))
    assert place.reads.get(KEYS[:1], [page]) == 1
    assert page == place.content[0].data


@pytest.mark.parametrize("during_a_call", [False, True])
def test_the_thread_reads_when_a_process_has_died_and_a_new_one_takes_over(
    place: Place, *, during_a_call: bool
) -> None:
    wait_until(place.is_ready)
    (pid,) = place.reads.pids
    if during_a_call:
        os.kill(pid, signal.SIGSTOP)
        found: list[int] = []
        call = threading.Thread(target=lambda: found.append(place.get()))
        call.start()
        time.sleep(0.05)
        assert not found, "the call waits for the process"
        os.kill(pid, signal.SIGKILL)
        call.join(GIVE_UP_S)
        assert found == [4]
    else:
        os.kill(pid, signal.SIGKILL)
        assert place.get() == 4
    assert place.reads.stats().errors == {"reader_died": 1}
    assert place.get() == 4
    assert place.reads.pids == [], "not at once"
    place.clock.advance(RESTART_S)
    wait_until(place.is_ready)
    assert place.reads.pids not in ([], [pid])


def test_a_process_that_cannot_open_the_store_is_not_used(place: Place) -> None:
    place.reads.close()
    place.options = {"path": str(place.folder / "in-use.lock"), "size": 1.0}  # a file, not a folder
    place.reads = place.around(place.store)

    def has_given_up() -> bool:
        assert place.get() == 4
        return not place.reads.pids

    wait_until(has_given_up)
    assert place.reads.stats().errors == {"reader_died": 1}


def test_processes_end_with_the_store_and_not_by_a_signal_to_the_group(place: Place) -> None:
    wait_until(place.is_ready)
    (pid,) = place.reads.pids
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(pid, number)
    assert place.is_ready()
    assert place.reads.pids == [pid]
    place.reads.close()
    assert not is_running(pid)


def test_a_process_ends_with_the_engine_even_when_the_engine_is_killed(place: Place) -> None:
    wait_until(place.is_ready)
    (pid,) = place.reads.pids
    reader: ReaderProcess = place.reads._readers[0]
    reader.end()  # as the death of the engine's process closes the socket
    wait_until(lambda: reader._process.poll() is not None)
    assert not is_running(pid)


def test_only_stores_whose_pages_other_processes_can_reach_get_processes(place: Place, tmp_path: Path) -> None:
    memory = MemoryStore(place.context)
    assert read_by_processes(memory, "memory", {}, place.context, most=4) is memory
    kept = PersistentPages(tmp_path / "kept", namespace="n", num_pages=2, page_bytes=PAGE_BYTES)
    persistent = HostPool(2, PAGE_BYTES, pinned=False, persistent=kept)
    assert persistent.fd is None, "a process that outlives the engine would write into the next one's pool"
    context = StoreContext(
        namespace="n",
        page_bytes=PAGE_BYTES,
        host_memory=HostMemory(address=persistent.tensor.data_ptr(), num_bytes=2 * PAGE_BYTES, fd=persistent.fd),
    )
    assert read_by_processes(place.store, "file", place.options, context, most=4) is place.store
    assert read_by_processes(place.store, "file", place.options, place.context, most=0) is place.store
    persistent.close()
    kept.close()
