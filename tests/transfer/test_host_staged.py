"""Pages that travel through a file in host memory: its memory is returned, and a full host fails the handoff alone."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvist.errors import Unavailable
from kvist.memory.runtime_dir import remove_leftovers
from kvist.testing.specs import make_pool
from kvist.transfer.host_pages import HostPages, Pages
from kvist.transfer.host_staged import StagedDevicePages, StagedHostPages, open_file
from kvist.transfer.staging import ArrivalsFile

NUM_PAGES, PAGE_BYTES = 8, 3 << 12


def random_pages(seed: int = 0) -> Pages:
    return np.random.default_rng(seed).integers(0, 256, (NUM_PAGES, PAGE_BYTES), np.uint8)


@pytest.fixture
def arrivals(tmp_path: Path) -> Iterator[ArrivalsFile]:
    made = ArrivalsFile(tmp_path, NUM_PAGES, PAGE_BYTES)
    yield made
    made.close()


def opened(path: Path) -> Any:
    descriptor = os.open(path, os.O_RDWR)
    try:
        return open_file(descriptor, make_pool(location=str(path), num_pages=NUM_PAGES, page_bytes=PAGE_BYTES))
    finally:
        os.close(descriptor)


def test_pages_reach_the_device_when_they_are_verified_and_their_memory_is_returned(arrivals: ArrivalsFile) -> None:
    source, device = random_pages(), torch.zeros((NUM_PAGES, PAGE_BYTES), dtype=torch.uint8)
    receiver = StagedDevicePages(device, arrivals)
    receiver.pages_at_once = 2
    empty = arrivals.path.stat()
    assert (empty.st_size, empty.st_blocks) == (NUM_PAGES * PAGE_BYTES, 0)
    sent = StagedHostPages(source).copy((0, 5, 3), opened(arrivals.path), (7, 1, 2))
    assert not device.any()
    assert arrivals.path.stat().st_blocks > 0
    assert receiver.digests((7, 1, 2)) == sent == HostPages(source).digests((0, 5, 3))
    np.testing.assert_array_equal(device.numpy()[[7, 1, 2]], source[[0, 5, 3]])
    assert not device.numpy()[[0, 3, 4, 5, 6]].any()
    assert arrivals.path.stat().st_blocks == 0


def test_pages_of_a_device_reach_a_pool_on_a_cpu(tmp_path: Path, arrivals: ArrivalsFile) -> None:
    source, pool = random_pages(), tmp_path / "pool"
    pool.write_bytes(bytes(NUM_PAGES * PAGE_BYTES))
    sender = StagedDevicePages(torch.from_numpy(source), arrivals)
    assert sender.copy((6, 2), opened(pool), (0, 1)) == HostPages(source).digests((6, 2))
    received = np.fromfile(pool, np.uint8).reshape(NUM_PAGES, PAGE_BYTES)
    np.testing.assert_array_equal(received[:2], source[[6, 2]])
    assert not received[2:].any()


def test_a_page_that_never_arrived_is_read_as_zeros(arrivals: ArrivalsFile) -> None:
    receiver = StagedDevicePages(torch.ones((NUM_PAGES, PAGE_BYTES), dtype=torch.uint8), arrivals)
    assert receiver.digests((4,)) == HostPages(np.zeros((1, PAGE_BYTES), np.uint8)).digests((0,))


def test_a_file_of_another_size_is_refused(arrivals: ArrivalsFile) -> None:
    os.truncate(arrivals.path, PAGE_BYTES)
    with pytest.raises(Unavailable, match="its address claims"):
        opened(arrivals.path)


def test_a_full_host_fails_the_write_with_a_remedy(arrivals: ArrivalsFile, monkeypatch: pytest.MonkeyPatch) -> None:
    file = opened(arrivals.path)

    def is_full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", is_full)
    with pytest.raises(Unavailable, match=r"No space left on device\. Name a folder .* --runtime-dir"):
        StagedHostPages(random_pages()).copy((0,), file, (0,))


def test_the_file_of_arrivals_is_kept_while_its_process_lives_and_removed_on_close(tmp_path: Path) -> None:
    made = ArrivalsFile(tmp_path, NUM_PAGES, PAGE_BYTES)
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [made.path]
    made.close()
    made.close()
    assert list(tmp_path.iterdir()) == []
