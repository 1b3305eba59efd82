"""The networks of the tests between hosts delay, lose and cut, and are gone after any end of a test run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.engine.link import State
from tests.engine.two_networks import LINK, TwoNetworks, names_in_use

MAKE = "import sys; from tests.engine.two_networks import *; made = TwoNetworks(); print(*made.names, flush=True); "


@pytest.fixture(scope="module")
def networks() -> Iterator[TwoNetworks]:
    try:
        made = TwoNetworks()
    except RuntimeError as error:
        pytest.skip(str(error))
    yield made
    made.close()


def replies(networks: TwoNetworks, num_sent: int) -> list[float]:
    """Send packets from one network to the other and back. Return the time of each reply in seconds."""
    echo = (
        "import socket, sys\n"
        f"s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('{LINK[1]}', 9)); print(flush=True)\n"
        "while True: s.sendto(*s.recvfrom(99))\n"
    )
    ask = (
        "import socket, time\n"
        "s = socket.socket(type=socket.SOCK_DGRAM); s.settimeout(0.3)\n"
        f"for i in range({num_sent}):\n"
        "    try:\n"
        f"        start = time.monotonic(); s.sendto(b'%d' % i, ('{LINK[1]}', 9))\n"
        "        while s.recv(99) != b'%d' % i: pass\n"
        "        print(time.monotonic() - start)\n"
        "    except OSError: pass\n"
    )
    one, two = (["ip", "netns", "exec", name, sys.executable, "-c"] for name in networks.names)
    server = subprocess.Popen([*two, echo], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        server.stdout.readline()
        found = subprocess.run([*one, ask], check=True, capture_output=True, text=True, timeout=60).stdout
    finally:
        server.kill()
        server.communicate()
    return [float(line) for line in found.split()]


def test_the_link_delays_and_loses_packets_and_can_be_cut(networks: TwoNetworks) -> None:
    assert len(replies(networks, 5)) == 5
    networks.disturb(delay_s=0.05)
    delayed = replies(networks, 5)
    assert len(delayed) == 5
    assert min(delayed) >= 0.09
    networks.disturb(lost=0.5)
    assert 0 <= len(replies(networks, 12)) < 12
    networks.disturb(lost=1.0)
    assert replies(networks, 2) == []
    networks.disturb()
    networks.cut(up=False)
    assert replies(networks, 2) == []
    networks.cut(up=True)
    assert len(replies(networks, 5)) == 5


@pytest.mark.usefixtures("networks")
@pytest.mark.parametrize("end", ["pass", "os.kill(os.getpid(), 9)", "os.killpg(os.getpgid(0), 9)"])
def test_no_network_is_left_behind_by_a_run_that_was_killed(end: str) -> None:
    child = "import os; os.setpgid(0, 0); " + MAKE + end
    with subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        names = process.stdout.readline().split()
        assert len(names) == 2
    give_up_s = time.monotonic() + 60
    while {name for name, _ in names_in_use()} & set(names) or any(
        f"{name}t" in os.listdir("/sys/class/net") for name in names
    ):
        assert time.monotonic() < give_up_s, names
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (State(), ""),
        (State(delay_s=0.02), " delay 20000us 0us"),
        (State(delay_s=0.005, jitter_s=0.01, lost=0.01, doubled=0.02), " delay 10000us 5000us loss 1% duplicate 2%"),
        (State(lost=1.0), " loss 100%"),
    ],
)
def test_netem_gets_the_same_state_as_the_relay(state: State, expected: str) -> None:
    assert " ".join(state.netem()) == "netem limit 100000" + expected
