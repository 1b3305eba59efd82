"""A window on a pool: writes arrive while it is open, and no byte after it was closed."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from kvist.errors import EngineError
from kvist.kv.layout import PageLayout
from kvist.memory.device_pool import DevicePool
from kvist.memory.page_window import HEAD_BYTES, PageWindow

LAYOUT = PageLayout(num_kv_heads=2, num_layers=2, page_size=16, head_dim=8, dtype="float32")
NUM_PAGES = 64


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[DevicePool]:
    made = DevicePool.create(LAYOUT, NUM_PAGES, device=torch.device("cpu"), directory=tmp_path.resolve())
    yield made
    made.close()


@pytest.fixture
def window(pool: DevicePool) -> Iterator[PageWindow]:
    made = PageWindow(Path(pool.address.location), NUM_PAGES * LAYOUT.page_bytes)
    yield made
    made.close()


def receive(into: int, data: bytes) -> int:
    """Let the kernel write into an address, as a socket's `recv` does. Return its result: -1 for EFAULT."""
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, data)
        done: int = ctypes.CDLL(None, use_errno=True).read(read_end, ctypes.c_void_p(into), ctypes.c_size_t(len(data)))
        return done
    finally:
        os.close(read_end)
        os.close(write_end)


def test_bytes_received_through_the_window_are_in_the_pool(pool: DevicePool, window: PageWindow) -> None:
    assert receive(window.address + HEAD_BYTES + LAYOUT.page_bytes, b"abc") == 3
    assert pool.bytes[1, :3].tobytes() == b"abc"
    assert not pool.bytes[0].any()


def test_the_head_is_beside_the_pool_and_not_in_it(pool: DevicePool, window: PageWindow) -> None:
    window.set_head(b"card")
    assert ctypes.string_at(window.address, 4) == b"card"
    assert not pool.bytes.any()


def test_nothing_is_written_through_a_closed_window(pool: DevicePool, window: PageWindow) -> None:
    window.close()
    assert receive(window.address + HEAD_BYTES, b"late") == -1
    assert not pool.bytes.any()


def test_the_pages_do_not_change_after_close_while_a_writer_goes_on(pool: DevicePool, window: PageWindow) -> None:
    stopped = threading.Event()
    data = b"\xff" * 4096

    def write_on() -> None:
        while not stopped.is_set():
            receive(window.address + HEAD_BYTES, data)

    writer = threading.Thread(target=write_on)
    writer.start()
    while not pool.bytes[0].any():
        pass
    window.close()
    pool.bytes[:] = 7
    for _ in range(200):
        assert (pool.bytes == 7).all()
    stopped.set()
    writer.join()


def test_the_addresses_of_a_closed_window_are_not_used_again(pool: DevicePool, window: PageWindow) -> None:
    window.close()
    others = [PageWindow(Path(pool.address.location), NUM_PAGES * LAYOUT.page_bytes) for _ in range(8)]
    taken = np.array([other.address for other in others])
    assert (np.abs(taken - window.address) >= window.num_bytes).all()
    for other in others:
        other.close()


def test_a_pool_that_is_gone_cannot_be_mapped(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be mapped once more"):
        PageWindow(tmp_path / "pool-x.pages", 4096)
