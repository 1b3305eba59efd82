"""Pools on GPUs: the peer's memory is opened by its handle, and one of our kernels copies into it.

The processes share one GPU, or use two GPUs that can access each other's memory (NVLink, PCIe peer access); for the
kernel both cases are equal. The memory of a dead peer exists until we drop its map, so a running copy does no harm.
"""

from __future__ import annotations

import os

import torch

from kvist.errors import EngineError, Unavailable
from kvist.memory.cuda_memory import ExportedMemory, OpenedMemory, read_export
from kvist.transfer.device_pages import DevicePages, Mapped
from kvist.transfer.same_host import SameHostTransport, wrong_size
from kvist.transfer.transport import TransportContext, TransportKind
from kvist.wire import PoolAddress

_MAX_FILE_BYTES = 4096
# The operating system releases a killed process's locks before the driver has stopped its GPU work: a copy in flight,
# of some milliseconds at most, could still write pages that have been reused.
SETTLE_S = 0.5


def cuda_ipc_transport(context: TransportContext) -> SameHostTransport[Mapped]:
    device = context.pool.tensor.device
    return SameHostTransport(
        address=context.address,
        pages=DevicePages(context.pool.tensor),
        map_pool=lambda descriptor, address: open_memory(read_file(descriptor, address), device),
        runtime_dir=context.runtime_dir,
        watch=context.watch,
        wakeup=context.wakeup,
    )


CUDA_IPC = TransportKind(
    device_pairs=frozenset({("cuda", "cuda")}),
    build=cuda_ipc_transport,
    settle_s=SETTLE_S,
    obstacle=lambda pool: pool.export_error and f"this GPU's memory cannot be shared: {pool.export_error}",
)


def read_file(descriptor: int, address: PoolAddress) -> ExportedMemory:
    """Read the export of a pool from its file. Raises `Unavailable` if the pool has another size or cannot be
    shared."""
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
