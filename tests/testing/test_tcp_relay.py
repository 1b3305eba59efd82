"""The relay between two processes: what it does to connections and bytes."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

from kvist.cluster.ports import free_ports
from kvist.testing.tcp_relay import Link, TcpRelay


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while piece := self.request.recv(100):
            self.request.sendall(piece)


@pytest.fixture
def relay() -> Iterator[TcpRelay]:
    (port,) = free_ports(1)
    with socketserver.ThreadingTCPServer(("127.0.0.1", port), _Echo) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with TcpRelay(listen=("127.0.0.2", port), target=("127.0.0.1", port)) as made:
            yield made
        server.shutdown()


def connect(relay: TcpRelay) -> socket.socket:
    return socket.create_connection(relay._listen, timeout=60)


def test_bytes_pass_in_both_directions_and_late_with_a_delay(relay: TcpRelay) -> None:
    with connect(relay) as one:
        one.sendall(b"ping")
        assert one.recv(100) == b"ping"
        relay.set(Link.OPEN, delay_s=0.1)
        began_s = time.monotonic()
        one.sendall(b"late")
        assert one.recv(100) == b"late"
        assert time.monotonic() - began_s >= 0.2


def test_a_black_hole_keeps_connections_and_their_bytes_until_it_is_repaired(relay: TcpRelay) -> None:
    with connect(relay) as one:
        one.sendall(b"ping")
        assert one.recv(100) == b"ping"
        relay.set(Link.BLACK_HOLE)
        one.sendall(b"held")
        with connect(relay) as other:
            other.sendall(b"new")
            for each in (one, other):
                each.settimeout(0.1)
                with pytest.raises(TimeoutError):
                    each.recv(100)
                each.settimeout(5)
            relay.set(Link.OPEN)
            assert (one.recv(100), other.recv(100)) == (b"held", b"new")


def test_a_cut_link_resets_old_and_new_connections(relay: TcpRelay) -> None:
    with connect(relay) as one:
        one.sendall(b"ping")
        assert one.recv(100) == b"ping"
        relay.set(Link.CUT)
        with pytest.raises(ConnectionResetError):
            one.recv(100)
        assert _resets_a_new_connection(relay)
        relay.set(Link.OPEN)
        with connect(relay) as third:
            third.sendall(b"again")
            assert third.recv(100) == b"again"


def _resets_a_new_connection(relay: TcpRelay) -> bool:
    try:
        with connect(relay) as one:
            return one.recv(100) == b""
    except ConnectionResetError:  # of `connect` too, if the relay is quicker than this thread
        return True
