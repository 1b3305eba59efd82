"""A process that backs pages up into a folder until test_persistence.py kills it."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from pathlib import Path

import numpy as np
import torch

from kvist.clock import MonotonicClock
from kvist.kv.layout import PageLayout
from kvist.memory.device_pool import DevicePool
from kvist.memory.host_pool import HostPool
from kvist.memory.page_copier import PageMover
from kvist.memory.persistence import PersistentPages
from kvist.plan.tiers import BackUpPages, ForgetPages, PagesBackedUp, PagesForgotten

LAYOUT = PageLayout(num_kv_heads=2, num_layers=4, page_size=16, head_dim=64, dtype="float32")
PAGE_BYTES = LAYOUT.page_bytes
NUM_PAGES = 24


def digest_of(number: int) -> bytes:
    return hashlib.sha256(f"page {number}".encode()).digest()


def page_of(digest: bytes) -> bytes:
    """Return the bytes of a page: random, so that no two pages or parts of pages are equal."""
    return np.random.default_rng(int.from_bytes(digest, "little")).bytes(PAGE_BYTES)


def open_folder(folder: Path, *, namespace: str = "n", num_pages: int = NUM_PAGES) -> PersistentPages:
    return PersistentPages(folder, namespace=namespace, num_pages=num_pages, page_bytes=PAGE_BYTES)


class Writer:
    """Write prefixes of two pages, each into the next two slots, over their former content."""

    def __init__(self, folder: Path, pools: Path) -> None:
        self.persistent = open_folder(folder)
        self.restored = self.persistent.restore()
        self._device = DevicePool.create(LAYOUT, 2, device=torch.device("cpu"), directory=pools)
        host = HostPool(NUM_PAGES, PAGE_BYTES, pinned=False, persistent=self.persistent)
        self._done = threading.Semaphore(0)
        self._mover = PageMover(self._device, host, wakeup=self._done.release, clock=MonotonicClock())

    def write(self, number: int) -> None:
        first = 2 * number % NUM_PAGES
        digests = digest_of(2 * number), digest_of(2 * number + 1)
        for page_id, digest in enumerate(digests):
            self._device.bytes[page_id] = np.frombuffer(page_of(digest), dtype=np.uint8)
        names = ((digests[0], None), (digests[1], digests[0]))
        self._mover.start(BackUpPages(job_id=number, page_ids=(0, 1), host_slots=(first, first + 1), names=names))
        self._done.acquire(timeout=60)
        assert self._mover.poll() == [PagesBackedUp(job_id=number, ok=True)]

    def forget(self, *slots: int) -> None:
        self._mover.start(ForgetPages(job_id=0, host_slots=slots))
        self._done.acquire(timeout=60)
        assert self._mover.poll() == [PagesForgotten(job_id=0)]

    def close(self) -> None:
        self._mover.close()
        self.persistent.close()
        self._device.close()


def write_until_killed(folder: Path, pools: Path, number: int) -> None:
    writer = Writer(folder, pools)
    print(os.getpid(), flush=True)
    while True:
        writer.write(number)
        print(number, flush=True)
        number += 1


def main() -> None:
    """For each number read from stdin, fork a process that writes from that number on (a fork, since importing torch
    takes a second). Print its process id, each number written, and "over" when the process was killed."""
    for line in sys.stdin:
        process_id = os.fork()
        if process_id == 0:
            write_until_killed(Path(sys.argv[1]), Path(sys.argv[2]), int(line))
        os.waitpid(process_id, 0)
        print("over", flush=True)


if __name__ == "__main__":
    main()
