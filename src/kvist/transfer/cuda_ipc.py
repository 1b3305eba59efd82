"""Pools on GPUs: the peer's memory is opened by its handle, and one of our kernels copies into it.

The processes share one GPU, or use two GPUs that can access each other's memory (NVLink, PCIe peer access); for the
kernel both cases are equal. A tensor-parallel engine has a part of its pages on each of its GPUs (device_pages.py). The
memory of a dead peer exists until we drop its map, so a running copy does no harm.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvist.errors import EngineError, Unavailable
from kvist.kernels.operands import WORD_BYTES
from kvist.memory.cuda_memory import ExportedMemory, OpenedMemory, read_export
from kvist.transfer.device_pages import DevicePages
from kvist.transfer.pieces import distinct_parts
from kvist.transfer.same_host import SameHostTransport, wrong_size
from kvist.transfer.transport import TransportContext, TransportKind
from kvist.wire import PoolAddress

if TYPE_CHECKING:
    from kvist.memory.device_pool import DevicePool

_MAX_FILE_BYTES = 4096
# The operating system releases a killed process's locks before the driver has stopped its GPU work: a copy in flight,
# of some milliseconds at most, could still write pages that have been reused.
SETTLE_S = 0.5


def cuda_ipc_transport(context: TransportContext) -> SameHostTransport[OpenedPool]:
    pool = context.pool
    return SameHostTransport(
        address=context.address,
        pages=DevicePages(pool.tensor, pool.pieces()[1:]),
        map_pool=map_pool,
        join_parts=join_parts,
        runtime_dir=context.runtime_dir,
        watch=context.watch,
        wakeup=context.wakeup,
    )


def obstacle(pool: DevicePool) -> str:
    if pool.export_error:
        return f"this GPU's memory cannot be shared: {pool.export_error}"
    return "" if pool.has_all_ranks else "rank 0 has not opened the pages of the other GPUs; only a handoff needs that"


CUDA_IPC = TransportKind(
    device_pairs=frozenset({("cuda", "cuda")}),
    build=cuda_ipc_transport,
    settle_s=SETTLE_S,
    splits_pages=True,
    obstacle=obstacle,
)


class OpenedPart:
    """The exported memory of a peer's rank, as `MappedPart`: opened on each of our GPUs that copies into it."""

    def __init__(self, exported: ExportedMemory, *, offset: int, num_bytes: int) -> None:
        self.exported = exported
        self.offset = offset
        self.num_bytes = num_bytes
        self._opened: dict[torch.device, OpenedMemory] = {}

    def address_on(self, device: torch.device) -> int:
        if device not in self._opened:
            self._opened[device] = open_memory(self.exported, device)
        return self._opened[device].address


@dataclass(frozen=True, slots=True)
class OpenedPool:
    """A peer's pool, as `Mapped`."""

    parts: Sequence[OpenedPart]


def map_pool(descriptor: int, address: PoolAddress) -> OpenedPool:
    return OpenedPool([OpenedPart(read_file(descriptor, address), offset=0, num_bytes=address.page_bytes)])


def join_parts(address: PoolAddress, mapped: Sequence[OpenedPool]) -> OpenedPool:
    """Join the pools of the ranks. Raises `Unavailable` if their parts do not make up a page."""
    distinct_parts(address.parts, address.page_bytes)
    if any(part.offset % WORD_BYTES or part.num_bytes % WORD_BYTES for part in address.parts):
        raise Unavailable(f"the peer's pool {address.location} has parts that are not whole words")
    return OpenedPool(
        [
            OpenedPart(one.exported, offset=part.offset, num_bytes=part.num_bytes)
            for part, pool in zip(address.parts, mapped, strict=True)
            for one in pool.parts
        ]
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


def open_memory(exported: ExportedMemory, device: torch.device) -> OpenedMemory:
    try:
        return OpenedMemory(exported.handle, device)
    except EngineError as error:
        raise Unavailable(
            f"the peer's GPU memory cannot be opened from {device}: {error}. Both GPUs must reach each other's memory"
        ) from error
