"""One engine's pool and transport on a GPU: python gpu_peer.py RUNTIME_DIR EPOCH DEVICE NUM_PAGES LAYOUT TRANSPORT

DEVICE may be "staged": a pool on the CPU that the transport `mooncake` serves like one on a GPU.
Prints its address, then answers each line of standard input with one line, until the input ends.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch

from kvist.kv.layout import PageLayout
from kvist.memory.device_pool import DevicePool
from kvist.mooncake.engine import open_engine
from kvist.mooncake.requirements import Network
from kvist.plan.transfers import PagesVerified, VerifyPages
from kvist.request import EpochId, HandoffId
from kvist.transfer import TransportContext, Transports, make_transports
from kvist.transfer.epoch import EpochLock, EpochWatch
from kvist.transfer.mooncake import MooncakeTransport, mooncake_kind
from kvist.transfer.mooncake_options import HANDOFFS, MooncakeOptions

STAGED = "staged"


def pool_on(device: str, layout: PageLayout, num_pages: int, runtime_dir: Path) -> DevicePool:
    where = torch.device("cpu" if device == STAGED else device)
    return DevicePool.create(layout, num_pages, device=where, directory=runtime_dir)


def transports_of(
    pool: DevicePool, device: str, runtime_dir: Path, wakeup: Callable[[], None], name: str
) -> tuple[Transports, Path | None]:
    """Return the transport, and the file in which pages arrive before they are verified."""
    if device != STAGED:
        transports = make_transports(pool, runtime_dir=runtime_dir, wakeup=wakeup, names=name)
    else:
        watch = EpochWatch(runtime_dir)
        context = TransportContext(
            pool=pool,
            address=mooncake_kind(MooncakeOptions()).address(name, pool),
            runtime_dir=runtime_dir,
            watch=watch,
            wakeup=wakeup,
            advertised_host="127.0.0.1",
        )
        offered = MooncakeTransport(context, open_engine(Network(host="127.0.0.1"), HANDOFFS), staged=True)
        transports = Transports({name: offered}, watch=watch, wakeup=wakeup)
    arrivals = getattr(transports.offered(name), "arrivals", None)
    return transports, None if arrivals is None else arrivals.path


def main(runtime_dir: str, epoch: str, device: str, num_pages: str, layout: str, name: str) -> None:
    lock = EpochLock(Path(runtime_dir), EpochId(epoch))
    pool = pool_on(device, msgspec.json.decode(layout, type=PageLayout), int(num_pages), Path(runtime_dir))
    woken = threading.Event()
    transport, arrivals = transports_of(pool, device, Path(runtime_dir), woken.set, name)
    [address] = transport.addresses_for(EpochId("source"))
    memory = pool.tensor.view(torch.uint8).view(pool.num_pages, -1)
    print(msgspec.json.encode(address).decode(), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "pages":
            pages = memory.cpu().numpy()
            if arrivals is not None:
                arrived = np.fromfile(arrivals, np.uint8).reshape(pages.shape)
                pages = np.where(arrived.any(axis=1, keepdims=True), arrived, pages)
            print(pages.tobytes().hex(), flush=True)
        elif command["do"] == "put":
            new = torch.frombuffer(bytearray.fromhex(command["pages"]), dtype=torch.uint8)
            memory.copy_(new.view(memory.shape))
            if arrivals is not None:
                np.memmap(arrivals, np.uint8, "r+")[:] = 0  # pages that an earlier test left there
            if memory.is_cuda:
                torch.cuda.synchronize(memory.device)
            print(flush=True)
        else:
            page_ids = tuple(command["page_ids"])
            transport.verify(VerifyPages(handoff_id=HandoffId("h"), page_ids=page_ids, transport=name))
            assert woken.wait(timeout=60)
            woken.clear()
            [report] = transport.poll()
            assert isinstance(report, PagesVerified)
            print(json.dumps(report.checksum), flush=True)
    transport.close()
    pool.close()
    lock.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
