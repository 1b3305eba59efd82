"""Two network namespaces with addresses of their own, and a link between them that is slow, lossy or cut.

    this process ── 10.79.x.y/30 ── one (10.78.0.1) ═══ link ═══ (10.78.0.2) two ── 10.79.x.z/30 ── this process

The link is a pair of virtual devices, disturbed by `tc netem`, where the kernel has it; elsewhere link.py passes its
packets on. Needs root and iproute2. The process of link.py deletes the networks when this process has ended, however it
ended.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

LINK = ("10.78.0.1", "10.78.0.2")


def run(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)


def succeeds(command: str) -> bool:
    return subprocess.run(command.split(), check=False, capture_output=True).returncode == 0


def delete_network(name: str) -> None:
    succeeds(f"ip netns del {name}")
    succeeds(f"ip link del {name}t")


def names_in_use() -> list[tuple[str, int]]:
    """Return the namespaces of all runs, each with the process that made it."""
    listed = subprocess.run(["ip", "netns", "list"], check=False, capture_output=True, text=True).stdout
    return [(name, int(pid)) for name, pid in re.findall(r"^(kv(\d+)[ab])\b", listed, re.MULTILINE)]


def kind_of_link() -> str:
    """Return "netem" or "relay". Raises `RuntimeError` with the reason if neither works here."""
    if not shutil.which("ip"):
        raise RuntimeError("needs ip: apt-get install iproute2")
    probe = f"kv{os.getpid()}probe"
    if not succeeds(f"ip netns add {probe}"):
        raise RuntimeError("this user may not make network namespaces")
    try:
        if shutil.which("tc") and succeeds(f"ip netns exec {probe} tc qdisc add dev lo root netem delay 1ms"):
            return "netem"
        if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
            raise RuntimeError("needs a kernel with netem, or /dev/net/tun")
        if not succeeds(f"ip -n {probe} tuntap add dev link0 mode tun"):
            raise RuntimeError("this user may not make tun devices")
        return "relay"
    finally:
        run(f"ip netns del {probe}")


def _subnets() -> list[tuple[str, str]]:
    """Return our address and that of the network, for each network: others than those of test runs beside this one."""
    first = os.getpid() * 2 % (1 << 14)  # of the subnets of 10.79.0.0/16 with four addresses
    return [
        (f"10.79.{number >> 6}.{number % 64 * 4 + 1}", f"10.79.{number >> 6}.{number % 64 * 4 + 2}")
        for number in (first, first + 1)
    ]


class TwoNetworks:
    def __init__(self) -> None:
        """Make the networks. Raises `RuntimeError` if they cannot be made here."""
        kind = kind_of_link()
        for name, pid in names_in_use():  # of a run that was killed together with its link.py
            if not Path(f"/proc/{pid}").exists():
                delete_network(name)
        self.outside = tuple(theirs for _, theirs in _subnets())  # where this process reaches the two
        self.names = tuple(f"kv{os.getpid()}{letter}" for letter in "ab")
        script = str(Path(__file__).parent / "link.py")
        self._link = subprocess.Popen(
            [sys.executable, script, kind, *self.names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # outlives a signal to our group
        )
        try:
            self._make(kind)
            self._ask("start")
        except BaseException:
            self.close()
            raise

    def _make(self, kind: str) -> None:
        one, two = self.names
        for name, (ours, theirs) in zip(self.names, _subnets(), strict=True):
            run(f"ip netns add {name}")
            run(f"ip -n {name} link set lo up")
            run(f"ip link add {name}t type veth peer name {name}g netns {name}")
            run(f"ip addr add {ours}/30 dev {name}t")
            run(f"ip link set {name}t up")
            run(f"ip -n {name} addr add {theirs}/30 dev {name}g")
            run(f"ip -n {name} link set {name}g up")
        if kind == "netem":
            run(f"ip link add link0 netns {one} type veth peer name link0 netns {two}")
        for name, address in zip(self.names, LINK, strict=True):
            if kind == "relay":
                run(f"ip -n {name} tuntap add dev link0 mode tun")
            run(f"ip -n {name} addr add {address}/24 dev link0")
            run(f"ip -n {name} link set link0 up")

    def disturb(self, **state: float) -> None:
        """Let the link lose, delay and double packets in both directions (`link.State`); without values, repair it."""
        self._ask(json.dumps(state))

    def cut(self, *, up: bool) -> None:
        run(f"ip -n {self.names[0]} link set link0 {'up' if up else 'down'}")

    def close(self) -> None:
        assert self._link.stdin is not None
        self._link.stdin.close()  # link.py deletes the networks
        self._link.wait(timeout=30)
        for name in self.names:
            delete_network(name)

    def _ask(self, line: str) -> None:
        assert self._link.stdin is not None
        assert self._link.stdout is not None
        self._link.stdin.write(line + "\n")
        self._link.stdin.flush()
        assert self._link.stdout.readline() == "ok\n", "link.py has ended: see its standard error"
