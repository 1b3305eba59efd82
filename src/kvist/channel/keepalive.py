"""Detects peers whose host or network vanished without a close: by TCP keep-alive, which the peer's kernel answers.

ZeroMQ's heartbeat is not used: the peer's process answers it, and that would be a second time limit for silent
processes, beside the one that the users of the channel have an option for.
"""

from __future__ import annotations

import zmq

_IDLE_S, _INTERVAL_S, _NUM_PROBES = 10, 5, 3


def enable_tcp_keepalive(socket: zmq.Socket[bytes]) -> None:
    """Set the TCP keep-alive options of a socket. Call before the socket binds or connects."""
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _IDLE_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, _INTERVAL_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, _NUM_PROBES)
