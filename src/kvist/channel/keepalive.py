"""Detects by TCP keep-alive that the host or the network of a peer has failed: the kernel of the peer does not answer.

ZeroMQ's heartbeat is not used, because the process of the peer answers it: the heartbeat would be a second time limit
for silent processes, beside the options of the channel's users.
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
