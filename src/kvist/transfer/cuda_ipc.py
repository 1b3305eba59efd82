"""Pools on GPUs: the peer's memory is opened by its handle, and one kernel of ours copies into it.

Two processes on one GPU, or on two that reach each other's memory (NVLink, PCIe peer access): to the kernel that is the
same, an address. A dead peer's memory exists until we drop its map, so a copy under way does no harm.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from kvist.errors import EngineError, Unavailable
from kvist.kv.cuda_memory import ExportedMemory, OpenedMemory, read_export
from kvist.kv.device import DevicePool
from kvist.transfer.device_pages import DevicePages, Mapped
from kvist.transfer.same_host import SameHostTransport, wrong_size
from kvist.wire import PoolAddress

_MAX_FILE_BYTES = 4096
# The kernel takes a killed process's locks away before the driver has stopped its GPU work: a copy that was under way,
# some milliseconds at most, could write pages that were given to others meanwhile.
SETTLE_S = 0.5


def cuda_ipc_transport(pool: DevicePool, runtime_dir: Path, wakeup: Callable[[], None]) -> SameHostTransport[Mapped]:
    device = pool.tensor.device
    return SameHostTransport(
        address=pool.address,
        pages=DevicePages(pool.tensor),
        map_pool=lambda descriptor, address: open_memory(read_file(descriptor, address), device),
        runtime_dir=runtime_dir,
        wakeup=wakeup,
        settle_s=SETTLE_S,
    )


def read_file(descriptor: int, address: PoolAddress) -> ExportedMemory:
    """What that pool's file says. Raises `Unavailable` when the pool is not of that size, or cannot be shared."""
    try:
        exported = read_export(os.pread(descriptor, _MAX_FILE_BYTES, 0))
    except (OSError, EngineError) as error:
        raise Unavailable(f"the peer's pool {address.location} cannot be opened: {error}") from error
    if exported.num_bytes != address.num_pages * address.page_bytes:
        raise wrong_size(address, exported.num_bytes)
    if exported.error:
        raise Unavailable(f"the peer's GPU memory cannot be shared: {exported.error}")
    return exported


def open_memory(exported: ExportedMemory, device: torch.device) -> Mapped:
    try:
        return OpenedMemory(exported.handle, device)
    except EngineError as error:
        raise Unavailable(
            f"the peer's GPU memory cannot be opened from {device}: {error}. Both GPUs must reach each other's memory"
        ) from error
