"""Pools in host memory: the peer's file is mapped, and numpy writes into the map."""

from __future__ import annotations

import mmap
import os
import stat

import numpy as np

from kvist.errors import Unavailable
from kvist.transfer.host_pages import HostPages, Pages
from kvist.transfer.same_host import SameHostTransport, wrong_size
from kvist.transfer.transport import TransportContext, TransportKind
from kvist.wire import PoolAddress


def shm_transport(context: TransportContext) -> SameHostTransport[Pages]:
    return SameHostTransport(
        address=context.address,
        pages=HostPages(context.pool.bytes),
        map_pool=map_file,
        runtime_dir=context.runtime_dir,
        watch=context.watch,
        wakeup=context.wakeup,
    )


SHM = TransportKind(device_pairs=frozenset({("cpu", "cpu")}), build=shm_transport)


def map_file(descriptor: int, address: PoolAddress) -> Pages:
    num_bytes = address.num_pages * address.page_bytes
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size != num_bytes:
        raise wrong_size(address, status.st_size)  # writing beyond the end of a file would kill the process
    try:
        mapped = mmap.mmap(descriptor, num_bytes)
    except (OSError, ValueError) as error:
        raise Unavailable(f"the peer's pool {address.location} cannot be mapped: {error}") from error
    return np.frombuffer(mapped, dtype=np.uint8).reshape(address.num_pages, address.page_bytes)
