"""One engine's pool and transport on a GPU: python gpu_peer.py RUNTIME_DIR EPOCH DEVICE NUM_PAGES LAYOUT TRANSPORT

Prints its address, then answers each line of standard input with one line, until the input ends.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import msgspec
import numpy as np
import torch

from kvist.kv.layout import PageLayout
from kvist.memory.device_pool import DevicePool
from kvist.plan.transfers import PagesVerified, VerifyPages
from kvist.request import EpochId, HandoffId
from kvist.transfer import make_transports
from kvist.transfer.epoch import EpochLock


def main(runtime_dir: str, epoch: str, device: str, num_pages: str, layout: str, name: str) -> None:
    lock = EpochLock(Path(runtime_dir), EpochId(epoch))
    pool = DevicePool.create(
        msgspec.json.decode(layout, type=PageLayout),
        int(num_pages),
        device=torch.device(device),
        directory=Path(runtime_dir),
    )
    woken = threading.Event()
    transport = make_transports(pool, runtime_dir=Path(runtime_dir), wakeup=woken.set, names=name)
    [address] = transport.addresses_for(EpochId("source"))
    staged = address.same_host and address.location != pool.address.location
    arrivals = Path(address.location) if staged else None
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
