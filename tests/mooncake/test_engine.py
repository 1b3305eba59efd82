"""A process has one engine of Mooncake for all its users, and registers memory once."""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from kvist.errors import ConfigError, EngineError
from kvist.mooncake.engine import MooncakeEngine, PeerNames, Transfer, open_engine, separate_engine
from kvist.mooncake.requirements import Network, User, library_obstacle

HERE = Network(host="127.0.0.1")
HANDOFFS = User(title="handoffs", protocol_flag="--h-protocol", devices_flag="--h-device", host_flag="--h-host")
STORAGE = User(title="the storage tier", protocol_flag="--s-protocol", devices_flag="--s-device", host_flag="--s-host")
KIB = 1 << 10
PEER = "10.0.0.1:15777"
Bytes = npt.NDArray[np.uint8]

pytestmark = pytest.mark.skipif(bool(library_obstacle()), reason=library_obstacle() or "-")


@pytest.fixture(scope="module")
def peer() -> Iterator[MooncakeEngine]:
    engine = separate_engine(HERE, HANDOFFS)
    yield engine
    engine.close()


@dataclass
class Shares:
    """Two users' shares of one engine."""

    handoffs: MooncakeEngine
    storage: MooncakeEngine


@pytest.fixture(scope="module")
def started() -> Iterator[MooncakeEngine]:
    """Keep the engine running from test to test: its end takes a second."""
    engine = open_engine(HERE, HANDOFFS)
    yield engine
    engine.close()


@pytest.fixture
def shares(started: MooncakeEngine) -> Iterator[Shares]:
    made = Shares(open_engine(HERE, HANDOFFS), open_engine(HERE, STORAGE))
    assert made.handoffs.session == made.storage.session == started.session
    yield made
    made.handoffs.close()
    made.storage.close()


@pytest.fixture
def memory() -> Bytes:
    return np.zeros(64 * KIB, np.uint8)


def can_write(peer: MooncakeEngine, engine: MooncakeEngine, memory: Bytes, offset: int = 0) -> bool:
    """Return whether a peer can write there."""
    ours = np.full(KIB, 7, np.uint8)
    peer.register(ours.ctypes.data, KIB)
    there = memory.ctypes.data + offset
    memory[offset : offset + KIB] = 0
    done = peer.write(engine.session, [ours.ctypes.data], [there], [KIB])
    peer.unregister(ours.ctypes.data)
    assert done == (memory[offset : offset + KIB] == 7).all()
    return done


def test_memory_of_two_users_is_registered_until_both_have_ended(
    shares: Shares, peer: MooncakeEngine, memory: Bytes
) -> None:
    for engine in (shares.handoffs, shares.storage):
        engine.register(memory.ctypes.data, memory.nbytes)
    assert can_write(peer, shares.handoffs, memory)
    shares.handoffs.unregister(memory.ctypes.data)
    assert can_write(peer, shares.handoffs, memory)
    shares.storage.close()
    assert not can_write(peer, shares.handoffs, memory)


def test_a_part_of_registered_memory_is_registered_already(shares: Shares, peer: MooncakeEngine, memory: Bytes) -> None:
    shares.storage.register(memory.ctypes.data, memory.nbytes)
    shares.handoffs.register(memory.ctypes.data + 8 * KIB, 4 * KIB)
    shares.storage.unregister(memory.ctypes.data)
    assert can_write(peer, shares.handoffs, memory, 8 * KIB)
    shares.handoffs.unregister(memory.ctypes.data + 8 * KIB)
    assert not can_write(peer, shares.handoffs, memory, 8 * KIB)


def test_more_than_the_registered_memory_is_refused(shares: Shares, memory: Bytes) -> None:
    shares.storage.register(memory.ctypes.data + KIB, KIB)
    with pytest.raises(EngineError, match="register the whole of it first"):
        shares.handoffs.register(memory.ctypes.data, memory.nbytes)


def test_a_closed_share_is_not_used(shares: Shares, memory: Bytes) -> None:
    shares.storage.close()
    shares.storage.close()
    for use in (
        lambda: shares.storage.register(memory.ctypes.data, KIB),
        lambda: shares.storage.write(shares.handoffs.session, [], [], []),
        lambda: shares.storage.read(shares.handoffs.session, 0, 0, 0),
        shares.storage.for_store,
    ):
        with pytest.raises(EngineError, match="after its end"):
            use()


@pytest.mark.usefixtures("shares")
def test_another_network_is_refused_while_the_engine_runs() -> None:
    with pytest.raises(ConfigError) as refused:
        open_engine(Network(host="localhost"), STORAGE)
    assert refused.value.message == (
        "the storage tier would use Mooncake at localhost over tcp, but it runs at 127.0.0.1 over tcp for handoffs, "
        "and a process has one engine: set --s-host, --s-protocol and --s-device as --h-host, --h-protocol and "
        "--h-device"
    )


def test_an_unknown_protocol_is_refused_before_the_library_starts() -> None:
    with pytest.raises(ConfigError, match="--s-protocol pigeon is not one of tcp, rdma"):
        separate_engine(Network(host="127.0.0.1", protocol="pigeon"), STORAGE)


class Scripted:
    """An engine whose pieces have the statuses that the test writes: 0 under way, 1 ended, -1 failed."""

    def __init__(self, **statuses: int) -> None:
        self.library = self
        self.peers = PeerNames()
        self.statuses = {int(piece[1:]): status for piece, status in statuses.items()}
        self.abandoned: list[int] = []

    def transfer_check_status(self, piece: int) -> int:
        status = self.statuses[piece]
        if status:
            del self.statuses[piece]  # the library has forgotten the piece: no one may ask for it again
        return status

    def abandon(self, pieces: Iterable[int]) -> None:
        self.abandoned += pieces


def test_a_transfer_has_ended_when_all_its_pieces_have() -> None:
    engine = Scripted(p7=1, p8=1)
    assert Transfer(engine, PEER, [7, 8]).wait()
    assert not engine.statuses
    assert not engine.abandoned


@pytest.mark.parametrize("refused", [0, -1, 2**64 - 1])
def test_a_transfer_with_a_refused_piece_has_failed_and_waits_for_none(refused: int) -> None:
    engine = Scripted(p7=0, p8=0)
    assert not Transfer(engine, PEER, [7, refused, 8]).wait()
    assert engine.abandoned == [7, 8]


def test_a_transfer_with_a_failed_piece_has_failed_and_abandons_those_behind_it() -> None:
    engine = Scripted(p7=1, p8=-1, p9=0)
    transfer = Transfer(engine, PEER, [7, 8, 9])
    assert not transfer.wait()
    assert not transfer.wait()
    assert engine.abandoned == [9]


def test_a_transfer_that_never_ends_fails_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvist.mooncake.engine.TRANSFER_TIMEOUT_S", 0.01)
    engine = Scripted(p7=0)
    assert not Transfer(engine, PEER, [7]).wait()
    assert engine.abandoned == [7]


def test_a_peer_has_another_name_after_a_failure() -> None:
    names = PeerNames()
    assert names.of(PEER) == PEER
    names.forget(PEER)
    names.forget(PEER)  # of a copy that began before the first one failed
    assert names.of(PEER) == "10.0.0.1:015777"
    names.forget("10.0.0.1:015777")
    assert names.of(PEER) == "10.0.0.1:0015777"
    assert names.of("[::1]:15777") == "[::1]:15777"


def test_the_names_of_a_peer_that_always_fails_are_bounded() -> None:
    names, seen = PeerNames(), set()
    for _ in range(1000):
        seen.add(name := names.of(PEER))
        names.forget(name)
    assert len(seen) == 64


def test_a_failed_transfer_is_the_last_one_with_its_name() -> None:
    engine = Scripted(p7=1, p8=-1)
    assert Transfer(engine, PEER, [7]).wait()
    assert engine.peers.of(PEER) == PEER
    assert not Transfer(engine, PEER, [8]).wait()
    assert engine.peers.of(PEER) != PEER


class Relay(socketserver.ThreadingTCPServer):
    """A port that asks the engine at `target` where it is: as if engines started one after another at this port."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__((HERE.host, 0), Relayed)
        self.session = f"{HERE.host}:{self.server_address[1]}"
        self.target = ""


class Relayed(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Relay)
        host, _, port = self.server.target.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=10) as there:
            back = threading.Thread(target=_forward, args=(there, self.request), daemon=True)
            back.start()
            _forward(self.request, there)
            back.join(10)


def _forward(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(1 << 16):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def relay() -> Iterator[Relay]:
    with Relay() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_a_peer_that_starts_again_at_its_port_is_reached(shares: Shares, relay: Relay, memory: Bytes) -> None:
    shares.handoffs.register(memory.ctypes.data, memory.nbytes)
    for number in (1, 2):
        peer = separate_engine(HERE, HANDOFFS)
        theirs = np.full(memory.shape, number, np.uint8)
        peer.register(theirs.ctypes.data, theirs.nbytes)
        relay.target = peer.session
        assert shares.handoffs.read(relay.session, memory.ctypes.data, theirs.ctypes.data, memory.nbytes)
        assert (memory == number).all()
        peer.close()


def _end_accepted_connections() -> int:
    """End the connections to ports of this process, as the end of a peer does; return how many there were."""
    opened: list[socket.socket] = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # not a socket
            opened.append(socket.socket(fileno=os.dup(int(descriptor))))
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(each) for each in opened if each.type == socket.SOCK_STREAM]
        listening = {
            each.getsockname()[1] for each in streams if each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        }
        accepted = [each for each in streams if _is_connected(each) and each.getsockname()[1] in listening]
        for each in accepted:
            each.shutdown(socket.SHUT_RDWR)
    return len(accepted)


def _is_connected(each: socket.socket) -> bool:
    with contextlib.suppress(OSError):
        return each.family in (socket.AF_INET, socket.AF_INET6) and bool(each.getpeername())
    return False


def test_a_connection_that_a_peers_predecessor_left_fails_no_read(
    shares: Shares, peer: MooncakeEngine, memory: Bytes
) -> None:
    shares.handoffs.register(memory.ctypes.data, memory.nbytes)
    theirs = np.full(memory.shape, 7, np.uint8)
    peer.register(theirs.ctypes.data, theirs.nbytes)
    assert shares.handoffs.read(peer.session, memory.ctypes.data, theirs.ctypes.data, KIB)
    assert _end_accepted_connections()
    assert shares.handoffs.read(peer.session, memory.ctypes.data, theirs.ctypes.data, memory.nbytes)
    assert (memory == 7).all()
    peer.unregister(theirs.ctypes.data)


def test_scattered_pieces_arrive_where_they_belong(shares: Shares, peer: MooncakeEngine, memory: Bytes) -> None:
    theirs = np.random.default_rng(0).integers(0, 256, memory.shape, np.uint8)
    peer.register(theirs.ctypes.data, theirs.nbytes)
    shares.handoffs.register(memory.ctypes.data, memory.nbytes)
    places = [(20 * KIB, 0, 3 * KIB), (0, 40 * KIB, KIB), (9 * KIB, 5 * KIB, 100)]
    ours = [theirs.ctypes.data + ours for ours, _, _ in places]
    here = [memory.ctypes.data + there for _, there, _ in places]
    assert peer.write(shares.handoffs.session, ours, here, [size for *_, size in places])
    expected = np.zeros_like(memory)
    for start, there, size in places:
        expected[there : there + size] = theirs[start : start + size]
    np.testing.assert_array_equal(memory, expected)
    assert shares.handoffs.read(peer.session, memory.ctypes.data, theirs.ctypes.data, memory.nbytes)
    np.testing.assert_array_equal(memory, theirs)
    peer.unregister(theirs.ctypes.data)


def test_the_last_users_end_is_the_engines_end(peer: MooncakeEngine, memory: Bytes) -> None:
    engine = separate_engine(HERE, HANDOFFS)
    engine.register(memory.ctypes.data, memory.nbytes)
    assert can_write(peer, engine, memory)
    engine.close()
    start_s = time.monotonic()
    assert not can_write(peer, engine, memory)
    assert time.monotonic() - start_s < 60
