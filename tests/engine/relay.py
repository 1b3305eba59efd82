"""A link between two network namespaces: python relay.py NAMESPACE NAMESPACE

Each namespace has a tun device `link0`, made before. Each line of standard input has the new state of the link as JSON
(`State`) and is answered by one line; the relay ends with its input. A relay replaces `tc netem`, which some kernels
lack.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import struct
import sys
import time
from dataclasses import dataclass

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_STDIN = 0


@dataclass(frozen=True)
class State:
    delay_s: float = 0.0
    jitter_s: float = 0.0  # added to the delay; reorders packets
    lost: float = 0.0  # parts of all packets
    doubled: float = 0.0


def open_link(namespace: str) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    there = os.open(f"/var/run/netns/{namespace}", os.O_RDONLY)
    if libc.setns(there, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"cannot enter the namespace {namespace}")
    os.close(there)
    link = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(link, TUNSETIFF, struct.pack("16sH22x", b"link0", IFF_TUN | IFF_NO_PI))
    return link


def main(one: str, two: str) -> None:
    ends = [open_link(one), open_link(two)]
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    state, draw = State(), random.Random(0)
    waiting: list[tuple[float, int, int, bytes]] = []  # due, number, to, packet
    number = 0
    print("ready", flush=True)
    while True:
        timeout_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for source in select.select([*ends, _STDIN], [], [], timeout_s)[0]:
            if source == _STDIN:
                line = sys.stdin.readline()
                if not line:
                    return
                state = State(**json.loads(line))
                print("ok", flush=True)
                continue
            packet = os.read(source, 65536)
            for _ in range(1 + (draw.random() < state.doubled)):
                if draw.random() >= state.lost:
                    number += 1
                    due_s = time.monotonic() + state.delay_s + draw.random() * state.jitter_s
                    heapq.heappush(waiting, (due_s, number, other[source], packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, to, packet = heapq.heappop(waiting)
            with contextlib.suppress(OSError):  # the link is down, or its queue is full: the packet is lost
                os.write(to, packet)


if __name__ == "__main__":
    main(*sys.argv[1:])
