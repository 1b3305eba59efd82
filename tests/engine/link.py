"""The link between two network namespaces: python link.py netem|relay NAMESPACE NAMESPACE

Each namespace has a device `link0`, made before the line "start" is read: a virtual one for `netem`, a tun device for
`relay`. Each further line of standard input has the new state of the link as JSON (`State`). Every line is answered by
one line. When the input ends, both namespaces are deleted: this process outlives the one that made them.
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
import subprocess
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

    def netem(self) -> list[str]:
        """Return the arguments of `tc qdisc replace`."""
        words = ["netem", "limit", "100000"]
        if self.delay_s or self.jitter_s:  # netem's jitter lies on both sides of the delay
            middle_us = round(1e6 * (self.delay_s + self.jitter_s / 2))
            words += ["delay", f"{middle_us}us", f"{round(1e6 * self.jitter_s / 2)}us"]
        if self.lost:
            words += ["loss", f"{100 * self.lost:g}%"]
        if self.doubled:
            words += ["duplicate", f"{100 * self.doubled:g}%"]
        return words


def enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot enter a network namespace")


def open_tun(name: str) -> int:
    there = os.open(f"/var/run/netns/{name}", os.O_RDONLY)
    enter(there)
    os.close(there)
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"link0", IFF_TUN | IFF_NO_PI))
    return tun


def run_netem(names: tuple[str, str]) -> None:
    while line := sys.stdin.readline():
        for name in names:
            command = ["tc", "-n", name, "qdisc", "replace", "dev", "link0", "root", *State(**json.loads(line)).netem()]
            subprocess.run(command, check=True)
        print("ok", flush=True)


def relay(names: tuple[str, str]) -> None:
    ends = [open_tun(name) for name in names]
    print("ok", flush=True)
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    state, draw = State(), random.Random(0)
    waiting: list[tuple[float, int, int, bytes]] = []  # due, number, to, packet
    number = 0
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


def main(kind: str, one: str, two: str) -> None:
    names = (one, two)
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        if sys.stdin.readline() == "start\n":
            if kind == "relay":
                relay(names)
            else:
                print("ok", flush=True)
                run_netem(names)
    finally:
        enter(home)
        for name in names:
            for command in (f"ip netns del {name}", f"ip link del {name}t"):
                subprocess.run(command.split(), check=False, capture_output=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
